"""A web server of a test's own, on loopback and a free port, that can answer anything, valid HTTP or not.

It is written on sockets, not on the library that the downloader uses, so that the two cannot share a mistake.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]
REASONS = {200: "OK", 302: "Found"}


def answer(body: bytes = b"", status: int = 200, headers: dict[str, str] | None = None, length: bool = True) -> Reply:
    """A whole answer; `length` False leaves Content-Length out, so the body ends with the connection."""

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, {"Content-Length": str(len(body))} if length else {}, headers) + body)

    return reply


def head(status: int, *headers: dict[str, str] | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'X')}", "Connection: close"]
    lines += [f"{name}: {value}" for part in headers for name, value in (part or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def redirect(to: str, status: int = 302) -> Reply:
    return answer(b"moved", status, {"Location": to})


def after(seconds: float, reply: Reply) -> Reply:
    async def later(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        await reply(writer)

    return later


def in_turn(*replies: Reply) -> Reply:
    """Another reply each time; the last one again and again."""
    left = list(replies)

    async def reply(writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(writer)

    return reply


@dataclass
class Site:
    """The server; a context manager. Unknown paths are 404."""

    replies: dict[str, Reply] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    """How often each path was."""
    requests: list[str] = field(default_factory=list)
    """Whole heads of the requests."""
    times: list[tuple[float, str]] = field(default_factory=list)
    most: Counter[str] = field(default_factory=Counter)
    """Most requests at one moment, by the name of the host, and of all together as `all`."""
    port: int = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def __enter__(self) -> "Site":
        self._loop = asyncio.new_event_loop()
        self._now: Counter[str] = Counter()
        ready = threading.Event()

        async def start() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            ready.set()

        def run() -> None:
            self._loop.run_until_complete(start())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = ""
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = request.split(" ")[1]
            host = (
                next(line for line in request.split("\r\n") if line.lower().startswith("host:")).split(":")[1].strip()
            )
            self.requests.append(request)
            self.times.append((self._loop.time(), path))
            self.asked[path] += 1
            for name in (host, "all"):
                self._now[name] += 1
                self.most[name] = max(self.most[name], self._now[name])
            await self.replies.get(path, answer(b"no", 404))(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for name in (host, "all") if host else ():
                self._now[name] -= 1
            writer.close()
