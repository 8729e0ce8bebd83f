"""Which hosts a URL of a data set may lead to: public ones, checked at the address that is really connected to.

A list of URLs is somebody else's text. One of them may name the metadata service of a cloud machine, a router or a
database beside this one, directly, by a name that resolves to it, by a name that resolves to it only the second time,
or by a redirect. So three things are checked: the URL's own text (`check_url`), every address that a name resolves to
(`resolver`), and once more the address of each socket before it connects (`socket_factory`), whatever led there.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from molmo_model.data.downloads import Status

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver
    from yarl import URL

Resolve = Callable[[str], Awaitable[list[str]]]
"""From a host's name to its addresses; raises OSError."""

_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""The last 32 bits are an IPv4 address, which a gateway connects to."""
_CLOSED = tuple(
    ipaddress.ip_network(name)
    for name in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20")
)
"""Besides what `ipaddress` knows, which differs between versions of Python: the metadata service of Azure, a public
number that only the machine's own host answers, and reserved blocks of the IANA registries (RFC 6890, 7526, 9637). The
metadata services of other clouds have private numbers."""
MAX_URL = 8000
"""Characters; servers take no longer ones."""


class Refused(Exception):
    """A URL is settled as a failure."""

    def __init__(self, status: Status, reason: str, http_status: int = 0) -> None:
        super().__init__(reason)
        self.status, self.reason, self.http_status = status, reason, http_status


class Guard:
    """Says which addresses may be connected to.

    Args:
        loopback: also 127.0.0.0/8 and ::1, for a test's own server. No param and no option of a command leads here: it
            is an argument of `fetching.download` and of `pipelines.download.main`, which a test writes out.
    """

    def __init__(self, loopback: bool = False) -> None:
        self.loopback = loopback

    def problem(self, address: str) -> str | None:
        """Why an address, without brackets, is refused; None where it is public."""
        try:
            number = ipaddress.ip_address(address)
        except ValueError:
            return f"{address} is no address"
        if self.loopback and _within(number, _LOOPBACK):
            return None
        return None if _is_public(_inner(number)) else f"{address} is not a public address"

    def check(self, address: str) -> None:
        """Raises `Refused` for an address that is not public."""
        if (problem := self.problem(address)) is not None:
            raise Refused(Status.BLOCKED, problem)

    def check_url(self, text: str) -> "URL":
        """The URL, after what can be seen from its text was checked.

        Raises:
            Refused: it is none, not of http or https, holds credentials, or its host is an address that is not public.
        """
        from yarl import URL

        if len(text) > MAX_URL:
            raise Refused(Status.BAD_URL, f"is longer than {MAX_URL} characters")
        try:
            url = URL(text.strip())
            host, port, user = url.raw_host, url.port, url.raw_user or url.raw_password
        except (ValueError, TypeError) as error:  # of hosts that are no names, ports that are no numbers
            raise Refused(Status.BAD_URL, "is no URL that can be read") from error
        if url.scheme not in ("http", "https"):
            raise Refused(Status.BAD_URL, f"is of scheme {url.scheme[:20]!r}, not http or https")
        if not host or not port:
            raise Refused(Status.BAD_URL, "names no host")
        if user:
            raise Refused(Status.BAD_URL, "holds a user's name or password")
        if (address := _literal(host)) is not None:
            self.check(address)
            if host not in (address, f"{address}."):  # such as 0x8.8.8.8; no data set has reason to
                raise Refused(Status.BAD_URL, f"writes the address {address} in another form")
        return url

    def resolver(self, resolve: Resolve) -> "AbstractResolver":
        """aiohttp's resolver that refuses a name as soon as one of its addresses is not public."""
        from aiohttp.abc import AbstractResolver, ResolveResult

        guard = self

        class CheckedResolver(AbstractResolver):
            async def resolve(
                self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
            ) -> list[ResolveResult]:
                addresses = await resolve(host)
                if not addresses:
                    raise Refused(Status.DNS, "the host has no address")
                for address in sorted(addresses):
                    guard.check(address)
                return [
                    ResolveResult(
                        hostname=host,
                        host=address,
                        port=port,
                        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                        proto=0,
                        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                    )
                    for address in addresses
                ]

            async def close(self) -> None:
                pass

        return CheckedResolver()

    def socket_factory(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for one address, (family, type, protocol, name, (address, port, ...)), if that is public."""
        family, kind, protocol, _, place = info
        self.check(place[0])
        return socket.socket(family, kind, protocol)


def system_resolve(seconds: float, executor: Any = None) -> Resolve:
    """The system's resolver, in threads of `executor`, bounded in time."""

    async def resolve(host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(executor, _addresses, host)
        try:
            return await asyncio.wait_for(asked, seconds)
        except TimeoutError as error:
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer within {seconds:g} s") from error

    return resolve


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except UnicodeError as error:  # a label of more than 63 letters
        raise socket.gaierror(socket.EAI_NONAME, "is no name of a host") from error
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def _literal(host: str) -> str | None:
    """The address that a host's text is, in any form that a system's resolver takes for one (127.1, 0x7f000001,
    2130706433, 0177.0.0.1); None for a name."""
    host = host.rstrip(".")
    if ":" in host:
        return host  # yarl has written it in its one form already
    try:
        return str(ipaddress.IPv4Address(socket.inet_aton(host)))
    except (OSError, ValueError):
        return None


def _inner(number: Any) -> Any:
    """The IPv4 address inside an IPv6 one that stands for it (mapped, 6to4, NAT64), or the address itself."""
    if number.version == 4:
        return number
    inner = number.ipv4_mapped or number.sixtofour
    if inner is None and number in _NAT64:
        inner = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return number if inner is None else inner


def _is_public(number: Any) -> bool:
    if number.is_multicast or number.is_reserved or not number.is_global or _within(number, _CLOSED):
        return False
    return number.version == 4 or number in _GLOBAL_UNICAST


def _within(number: Any, networks: tuple[Any, ...]) -> bool:
    return any(number in network for network in networks)
