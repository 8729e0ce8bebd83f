"""The real server as a process of its own, and a false one that misbehaves as told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHECKPOINT = "base/step-000000"
ROOT = Path(__file__).parent.parent.parent


class ServerProcess:
    """`python -m pipelines.serve` in a folder; a context manager."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        self.folder, self.options, self.port = folder, options, port

    def __enter__(self) -> "ServerProcess":
        command = [sys.executable, "-m", "pipelines.serve", f"checkpoint={CHECKPOINT}", f"port={self.port}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *self.options],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if " on http" in line:
                self.url = line.split(" on ")[1].strip()
                self.port = int(self.url.split(":")[2].split("/")[0])
                return self
        raise AssertionError(self.process.communicate()[1])

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


Reply = tuple[int, Any]
"""A status and a body: JSON, or bytes as they are. Status 0 hangs; -1 hangs up."""


def completion(text: str = "7", **changes: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}, **changes}


class FalseServer:
    """Answers chat requests with what `reply` says of the body and of how often that body came; loopback, free port."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply], models: Reply | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        self.most = self.now = 0
        counts: dict[str, int] = {}
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                self.answer(*(models or (200, {"data": [{"id": "m"}]})))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append(body)
                    outer.headers.append(dict(self.headers))
                    key = json.dumps(body)
                    counts[key] = counts.get(key, 0) + 1
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                time.sleep(0.02)
                with lock:
                    outer.now -= 1
                self.answer(*reply(body, counts[key]))

            def answer(self, status: int, body: Any) -> None:
                if status <= 0:
                    outer.released.wait(30 if status == 0 else 0)
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "FalseServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
