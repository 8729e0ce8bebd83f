"""Asks the web for the files of a dataset of URLs: bounded in everything, polite to hosts, closed to private addresses.

One URL after another leaves a `Download` row, whatever happens: a file in the store, or the kind of failure and its
reason. What a server sends is untrusted until it was looked at: it is counted while it streams, hashed, and its header
must be that of an image or film the project reads (`open_image`, `peek_video`); pixels are not decoded here.

Only what may pass is tried again: 429, 5xx, timeouts and broken connections. A host that says when it wants to be asked
again (Retry-After) is left alone until then, with all its URLs, if that is soon enough.
"""

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_model.data.downloads import Download, Status, Store
from molmo_model.data.host_turns import HostTurns, Job
from molmo_model.data.public_hosts import Guard, Refused, Resolve, system_resolve
from molmo_model.errors import DataError, StorageError

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession
    from yarl import URL

CHUNK = 2**16
PROBERS = 2
"""Threads that look at headers; each holds one file in memory."""
REDIRECTS = (301, 302, 303, 307, 308)
KINDS = {401: Status.FORBIDDEN, 403: Status.FORBIDDEN, 404: Status.GONE, 410: Status.GONE, 451: Status.FORBIDDEN}
"""What answers other than 200 are called; others are `http`."""
OF_HOSTS = (Status.DNS, Status.CONNECTION, Status.TIMEOUT, Status.RATE_LIMITED)
"""Failures that say more of the host than of the URL. A dead host of ten thousand URLs would cost days."""
SHOWN_LETTERS = 160
"""Of what a server says, in a reason."""


@dataclass(frozen=True)
class Limits:
    """What a download may cost."""

    concurrency: int = 32
    """URLs asked for at once."""
    per_host: int = 4
    """Of these at one host."""
    connect_s: float = 15.0
    """Seconds to find the host's address, and again to connect."""
    read_s: float = 20.0
    """Seconds without a byte."""
    total_s: float = 180.0
    """Seconds for one attempt at one URL, redirects included: also a body that drips ends."""
    max_bytes: int = 64 * 2**20
    """Of one file."""
    max_pixels: int = 50_000_000
    """Of one picture, or of one frame of a film."""
    redirects: int = 5
    retries: int = 3
    """Further attempts after the first one."""
    backoff_s: float = 1.0
    """Seconds before the second attempt; doubles with each further one."""
    host_failures: int = 12
    """So many URLs of one host in a row without an answer, or all with 429: its other URLs are not asked any more and
    get the same row."""
    retry_after_s: float = 60.0
    """Longest wait that a server may ask for; one that asks for more is a failure."""
    user_agent: str = "molmo-downloads/1 (research data; one request per file)"


class _Later(Refused):
    """A failure that may pass."""

    wait_s: float | None = None
    """What the server asked for."""


def download(
    wanted: Iterable[tuple[str, str | None]],
    store: Store,
    scratch: Path,
    settled: Callable[[Download], None],
    limits: Limits,
    *,
    loopback: bool = False,
    resolve: Resolve | None = None,
) -> None:
    """Asks for every URL and calls `settled` with its row as soon as it is known, in no particular order.

    Args:
        wanted: different URLs with the SHA-256 of their content where it is known; another content is refused.
        store: where the files go.
        scratch: a folder on the same disk for files that are not whole; emptied.
        settled: called in this thread; what it raises ends the download.
        limits: what it may cost.
        loopback: allows this machine's own servers, and no other private address. Only for tests.
        resolve: how names become addresses; default is the system's resolver. Only for tests.

    Raises:
        StorageError: the store cannot be written.
        KeyboardInterrupt: everything settled so far has been told.
    """
    asyncio.run(_Downloader(store, scratch, settled, limits, Guard(loopback), resolve).run(wanted))


class _Downloader:
    """The state of one `download`."""

    def __init__(
        self,
        store: Store,
        scratch: Path,
        settled: Callable[[Download], None],
        limits: Limits,
        guard: Guard,
        resolve: Resolve | None,
    ) -> None:
        self.store, self.scratch, self.settled, self.limits, self.guard = store, scratch, settled, limits, guard
        self.resolve = resolve
        self.turns = HostTurns(limits.per_host)
        self.failures: Counter[str] = Counter()
        self.parts = itertools.count()
        self.probers = ThreadPoolExecutor(PROBERS, "probe")
        self.resolvers = ThreadPoolExecutor(4 * limits.concurrency, "resolve")  # one that was given up stays busy

    async def run(self, wanted: Iterable[tuple[str, str | None]]) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        with _disk(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
        for url, expected in wanted:
            try:
                self.turns.add(Job(url, str(self.guard.check_url(url).raw_host), expected))
            except Refused as refused:
                self._settle(url, refused)
        running: set[asyncio.Task[None]] = set()
        try:
            async with self._session() as session:
                await self._work(session, running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self.probers.shutdown(wait=False, cancel_futures=True)
            self.resolvers.shutdown(wait=False, cancel_futures=True)
            shutil.rmtree(self.scratch, ignore_errors=True)

    async def _work(self, session: "ClientSession", running: set[asyncio.Task[None]]) -> None:
        """Keeps `concurrency` URLs in flight until none is left."""
        while True:
            while len(running) < self.limits.concurrency and (job := self.turns.take(time.monotonic())):
                running.add(asyncio.create_task(self._attempt(session, job)))
            pause = self.turns.seconds_to_next(time.monotonic())
            if not running:
                if pause is None:
                    return
                await asyncio.sleep(pause)
                continue
            if len(running) == self.limits.concurrency:
                pause = None  # what is due waits for one of them
            done, _ = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            running -= done
            for task in done:
                task.result()

    def _session(self) -> "ClientSession":
        """A session without cookies and proxies, whose every connection goes through the guard."""
        import aiohttp

        limits = self.limits
        connector = aiohttp.TCPConnector(
            limit=limits.concurrency,
            limit_per_host=limits.per_host,  # also where redirects of many hosts lead to one
            resolver=self.guard.resolver(self.resolve or system_resolve(limits.connect_s, self.resolvers)),
            socket_factory=self.guard.socket_factory,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,  # a few kilobytes may unpack to gigabytes
            headers={"User-Agent": limits.user_agent, "Accept": "*/*", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s, sock_read=limits.read_s),
        )

    async def _attempt(self, session: "ClientSession", job: Job) -> None:
        """Asks once, and settles the URL or postpones it."""
        job.attempts += 1
        part = self.scratch / str(next(self.parts))
        try:
            row = await self._explained(session, job, part)
        except Refused as refused:
            self.turns.finish(job)
            self._postpone_or_settle(job, refused)
        else:
            self.turns.finish(job)
            self.failures.pop(job.host, None)
            self.settled(row)
        finally:
            part.unlink(missing_ok=True)

    def _postpone_or_settle(self, job: Job, refused: Refused) -> None:
        """What follows from a failure: another attempt, a row, or rows for all that is left of the host."""
        limits = self.limits
        of_host = refused.status in OF_HOSTS and not job.moved
        given_up = of_host and self.failures[job.host] >= limits.host_failures
        if isinstance(refused, _Later) and job.attempts <= limits.retries and not given_up:
            backoff = limits.backoff_s * 2 ** (job.attempts - 1) * random.uniform(0.75, 1.25)
            whole_host = of_host and refused.status is Status.RATE_LIMITED
            self.turns.postpone(job, time.monotonic() + max(backoff, refused.wait_s or 0.0), whole_host)
            return
        self._settle(job.url, refused)
        if not of_host:
            self.failures.pop(job.host, None)
            return
        self.failures[job.host] += 1
        if self.failures[job.host] >= limits.host_failures:
            for other in self.turns.drop(job.host):
                self._settle(other.url, refused)

    def _settle(self, url: str, refused: Refused) -> None:
        self.settled(Download(url, refused.status, refused.reason, refused.http_status))

    async def _explained(self, session: "ClientSession", job: Job, part: Path) -> Download:
        """The row of a file that was had; whatever goes wrong with the answer becomes `Refused` or `_Later`."""
        import aiohttp

        limits = self.limits
        try:
            async with asyncio.timeout(limits.total_s):
                sha256, size = await self._fetch(session, job, part)
            return await self._keep(job, part, sha256, size)
        except (Refused, StorageError):
            raise
        except aiohttp.InvalidURL as error:
            raise Refused(Status.BAD_URL, "is no URL that can be asked for") from error
        except aiohttp.ClientConnectorDNSError as error:
            again = error.os_error.errno == socket.EAI_AGAIN
            raise (_Later if again else Refused)(Status.DNS, "the host has no address that can be found") from error
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as error:
            raise Refused(Status.TLS, f"the host's encryption is not valid: {type(error).__name__}") from error
        except aiohttp.ConnectionTimeoutError as error:
            raise _Later(Status.TIMEOUT, f"no connection within {limits.connect_s:g} s") from error
        except aiohttp.ServerTimeoutError as error:
            raise _Later(Status.TIMEOUT, f"no byte for {limits.read_s:g} s") from error
        except TimeoutError as error:
            raise _Later(Status.TIMEOUT, f"not done within {limits.total_s:g} s") from error
        except aiohttp.ClientPayloadError as error:
            raise _Later(Status.INCOMPLETE, "the body ended early") from error
        except aiohttp.ClientConnectionError as error:
            number = getattr(error, "errno", None)
            what = os.strerror(number) if isinstance(number, int) and number > 0 else "it was closed"
            raise _Later(Status.CONNECTION, f"no connection: {what}") from error
        except Exception as error:  # one server's nonsense must not end the download of all others
            raise Refused(Status.PROTOCOL, f"no answer that can be read: {type(error).__name__}") from error

    async def _fetch(self, session: "ClientSession", job: Job, part: Path) -> tuple[str, int]:
        """Follows redirects, each checked like the URL itself, and writes the body to `part`; its SHA-256 and size."""
        place, job.moved = self.guard.check_url(job.url), False
        seen = {place}
        for _ in range(self.limits.redirects + 1):
            async with session.get(place, allow_redirects=False) as response:
                if response.status not in REDIRECTS:
                    self._check_answer(response)
                    return await self._receive(response, part)
                place = self._target(place, response)
            if place in seen:
                raise Refused(Status.REDIRECT, "leads in a circle", response.status)
            seen.add(place)
            job.moved = True
        raise Refused(Status.REDIRECT, f"more than {self.limits.redirects} redirects", response.status)

    def _target(self, place: "URL", response: "ClientResponse") -> "URL":
        from yarl import URL

        location = response.headers.get("Location", "")
        try:
            target = place.join(URL(location)) if location else None
        except ValueError:
            target = None
        if target is None:
            raise Refused(Status.REDIRECT, "redirects to what is no URL", response.status)
        try:
            return self.guard.check_url(str(target))
        except Refused as refused:
            status = Status.BLOCKED if refused.status is Status.BLOCKED else Status.REDIRECT
            # without path and query, which may hold a token
            where = shown(f"{target.scheme}://{target.host or ''}")
            raise Refused(status, f"redirects to {where}: {refused.reason}", response.status) from refused

    def _check_answer(self, response: "ClientResponse") -> None:
        """Raises `Refused` or `_Later` for an answer that is not the file."""
        status = response.status
        if status == 429 or status >= 500:
            kind = Status.RATE_LIMITED if status == 429 else Status.SERVER_ERROR
            later = _Later(kind, f"the server answers {status}", status)
            header = response.headers.get("Retry-After", "")
            later.wait_s = seconds_of(header)
            if later.wait_s is not None and later.wait_s > self.limits.retry_after_s:
                reason = f"Retry-After is {shown(header)!r}, more than {self.limits.retry_after_s:g} s"
                raise Refused(kind, f"the server answers {status}; {reason}", status)
            raise later
        if status != 200:
            raise Refused(KINDS.get(status, Status.HTTP), f"the server answers {status}", status)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("identity", ""):
            raise Refused(Status.UNREADABLE, f"is sent as {shown(encoding)!r}, which was not asked for", status)
        if response.content_length is not None and response.content_length > self.limits.max_bytes:
            raise Refused(Status.TOO_LARGE, f"more than {self.limits.max_bytes} bytes (max_bytes)", status)

    async def _receive(self, response: "ClientResponse", part: Path) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        with contextlib.ExitStack() as stack:
            with _disk(part):
                file = stack.enter_context(open(part, "wb"))
            async for chunk in response.content.iter_chunked(CHUNK):
                size += len(chunk)
                if size > self.limits.max_bytes:
                    raise Refused(Status.TOO_LARGE, f"more than {self.limits.max_bytes} bytes (max_bytes)", 200)
                digest.update(chunk)
                with _disk(part):
                    file.write(chunk)
            with _disk(part):
                file.flush()
        return digest.hexdigest(), size

    async def _keep(self, job: Job, part: Path, sha256: str, size: int) -> Download:
        """Compares and looks at a whole file and moves it into the store."""
        if job.expected is not None and sha256 != job.expected:
            raise Refused(Status.CHANGED, f"has sha256 {sha256}, not {job.expected}", 200)
        loop = asyncio.get_running_loop()
        kind, width, height = await loop.run_in_executor(self.probers, probe, part, self.limits.max_pixels)
        with _disk(part):
            self.store.adopt(part, sha256)
        return Download(job.url, Status.OK, "", 200, sha256, size, kind, width, height)


def probe(path: Path, max_pixels: int) -> tuple[str, int, int]:
    """Format, width and height of an image or a film, by its header.

    Raises:
        Refused: it is neither, or has too many pixels.
    """
    from molmo_model.data.datasets.chat_images import NoImage, TooManyPixels, open_image
    from molmo_model.data.datasets.chat_rows import RowError
    from molmo_model.data.video_file import LIMITS, peek_video

    with _disk(path):
        data = path.read_bytes()
    try:
        with open_image(data, max_pixels, "") as picture:
            return ("JPEG" if picture.format == "MPO" else str(picture.format)), *picture.size
    except TooManyPixels as error:
        raise Refused(Status.TOO_MANY_PIXELS, error.reason, 200) from error
    except NoImage as error:
        with contextlib.suppress(DataError):
            return peek_video(data, limits=replace(LIMITS, pixels=max_pixels))
        raise Refused(Status.UNREADABLE, f"{error.reason}, and no film", 200) from error
    except RowError as error:
        raise Refused(Status.UNREADABLE, error.reason, 200) from error


def seconds_of(header: str) -> float | None:
    """What a Retry-After header asks to wait: seconds, or a date; None where it is neither."""
    text = header.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:20])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    with contextlib.suppress(OverflowError, ValueError):
        aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return max(0.0, aware.timestamp() - time.time())
    return None


def shown(text: str) -> str:
    """What a server said, fit for a table: printable, valid Unicode and short."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:SHOWN_LETTERS])
    return plain.encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Tells trouble with our own disk from trouble with a server: it must stop the run, not become a URL's failure."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; check the disk, then run it again") from error
