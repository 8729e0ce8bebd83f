"""Our model behind OpenAI's chat API: requests that arrive together are answered in one batch.

    request -> checked and its pictures decoded (`chat_requests`, a few threads) -> queue -> one thread with the model

`Desk` is the queue and its thread, `application` the routes of a starlette app; `pipelines.serve` runs it. Prompts and
answers are neither logged nor kept.
"""

import asyncio
import hmac
import json
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from molmo_model.errors import DataError, MolmoError
from molmo_model.eval.answering import Answer, Answering, Asking, Question
from molmo_model.eval.chat_requests import (
    MAX_IMAGE_BYTES,
    ChatRequest,
    RequestError,
    Rules,
    cut,
    parse_json,
    read_request,
)
from molmo_model.eval.limits import limited

if TYPE_CHECKING:
    from molmo_model.preprocessing.preprocessor import Preprocessor

MAX_BODY_BYTES = 96 * 2**20
"""Of one request, pictures included."""
READERS = 4
"""Threads that check requests and decode their pictures: each may hold one of `image.MAX_PIXELS`."""
BODY_S = 120.0
"""Seconds for a request's body to arrive."""
STOPPING = "the server is stopping"
POLL_S = 0.2
"""How often the model's thread looks whether the server stops."""


@dataclass(eq=False)
class _Asked:
    """A question in the queue."""

    question: Question
    asking: Asking
    verbatim: bool
    answered: "asyncio.Future[Answer]"
    loop: asyncio.AbstractEventLoop

    def settle(self, outcome: Answer | Exception) -> None:
        """Tells the waiting request, unless it is gone; from any thread."""

        def tell() -> None:
            if not self.answered.done():
                if isinstance(outcome, Exception):
                    self.answered.set_exception(outcome)
                else:
                    self.answered.set_result(outcome)

        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(tell)


@dataclass
class Desk:
    """Where questions wait for the model, and the thread that asks it.

    Several questions of equal settings that wait at the same moment are answered together. One that cannot be answered
    does not spoil the others: they are then asked one by one.
    """

    engines: Mapping[bool, Answering]
    """The model, by whether messages are taken to the letter (`ChatRequest.verbatim`)."""
    require: Callable[[Question, Asking, bool], None] = lambda question, asking, verbatim: None
    """Raises `RequestError` or `DataError` for what the model cannot take; called in the model's thread."""
    most: int = 64
    """Questions of one batch."""
    wait_s: float = 0.01
    """How long the first question of a batch waits for company."""
    waiting: int = 256
    """Questions that may wait; further ones are told to come later."""
    _queue: "queue.Queue[_Asked]" = field(init=False)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._queue = queue.Queue(self.waiting)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Takes no more questions; those in hand are answered, those that wait are told. Safe in a signal's handler."""
        self._stopping.set()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Closes and waits for the batch in hand."""
        self.close()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    async def ask(self, request: ChatRequest) -> Answer:
        """The answer, without heed of `stop` texts.

        Raises:
            RequestError: too many wait, the server stops, or the model cannot take the question.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(request.question, request.asking, request.verbatim, loop.create_future(), loop)
        if not self.alive:
            raise RequestError(STOPPING, code="stopping", status=503)
        try:
            self._queue.put_nowait(asked)
        except queue.Full:
            message = f"{self.waiting} questions are waiting already; come again later"
            raise RequestError(message, code="rate_limit_exceeded", status=429) from None
        return await asked.answered

    def _work(self) -> None:
        while not self._stopping.is_set():
            with suppress(queue.Empty):
                first = self._queue.get(timeout=POLL_S)
                for group in _alike([first, *self._company()]):
                    self._answer(group)
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait().settle(RequestError(STOPPING, code="stopping", status=503))

    def _company(self) -> list[_Asked]:
        """What else arrives within `wait_s`, or waits already."""
        found: list[_Asked] = []
        until = time.monotonic() + self.wait_s
        with suppress(queue.Empty):
            while len(found) < self.most - 1:
                left = until - time.monotonic()
                found.append(self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait())
        return found

    def _answer(self, group: Sequence[_Asked]) -> None:
        able = []
        for one in group:
            if one.answered.cancelled():  # nobody waits for it any more
                continue
            try:
                self.require(one.question, one.asking, one.verbatim)
                able.append(one)
            except (MolmoError, RequestError) as error:
                one.settle(error)
        left = dict(enumerate(able))
        try:
            self._together(left)
        except Exception as error:  # whatever it is, the server outlives it
            for one in left.values():
                if len(able) == 1:
                    one.settle(error)
                else:
                    self._answer([one])

    def _together(self, left: dict[int, _Asked]) -> None:
        """Answers questions of equal settings and takes them out of `left`."""
        if not left:
            return
        asked = dict(left)
        first, questions = asked[0], [one.question for one in asked.values()]
        engine = self.engines[first.verbatim]
        for index, answer in engine.answers(questions, lambda number: asked[number].question, first.asking):
            left.pop(index).settle(answer)


def length_limit(preprocessors: Mapping[bool, "Preprocessor"], positions: int) -> Callable[..., None]:
    """What `Desk.require` checks: prompt and answer fit into the positions that the model has.

    Args:
        preprocessors: by `ChatRequest.verbatim`.
    """

    def require(question: Question, asking: Asking, verbatim: bool) -> None:
        sizes = [(image.width, image.height) for image in question.example.images]
        talk = question.example.conversations[question.conversation]
        preprocessor = limited(preprocessors[verbatim], asking, len(sizes))
        tokens, _ = preprocessor.cost(sizes, [talk], id="request")
        if tokens + asking.max_new_tokens > positions:
            message = (
                f"the prompt has {tokens} tokens and the answer may have {asking.max_new_tokens}, together more than "
                f"the {positions} positions of the model"
            )
            raise RequestError(message, "max_tokens", "context_length_exceeded")

    return require


def _alike(asked: Sequence[_Asked]) -> list[list[_Asked]]:
    """Questions of equal settings together, in the order of arrival."""
    groups: dict[str, list[_Asked]] = {}
    for one in asked:
        groups.setdefault(repr((one.asking, one.verbatim)), []).append(one)
    return list(groups.values())


def application(
    desk: Desk, rules: Rules, *, key: str = "", fingerprint: str | None = None, facts: Mapping[str, Any] | None = None
) -> Starlette:
    """The server's routes.

    Args:
        key: what requests must carry as `Authorization: Bearer`; empty wants none.
        fingerprint: tells which weights answer; see `chat_messages.fingerprint`.
        facts: what else the list of models says of ours, such as the precision.
    """
    readers = ThreadPoolExecutor(READERS, "read")
    model = {"id": rules.model, "object": "model", "created": 0, "owned_by": "molmo-mlops"}
    model |= {"molmo": {"fingerprint": fingerprint, **(facts or {})}}

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if desk.alive else JSONResponse({"status": STOPPING}, 503)

    async def models(request: Request) -> Response:
        _check_key(request, key)
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        _check_key(request, key)
        if request.path_params["name"] != rules.model:
            raise RequestError("there is no such model here", "model", "model_not_found", 404)
        return JSONResponse(model)

    async def chat(request: Request) -> Response:
        _check_key(request, key)
        body = await _body(request)
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(readers, lambda: read_request(parse_json(body), rules))
        answer = await _unless_gone(request, desk.ask(asked))
        said = Completion(asked, answer, rules.model, fingerprint)
        if asked.stream:
            return StreamingResponse(
                said.chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return JSONResponse(said.to_json())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        desk.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, desk.stop)
            readers.shutdown(wait=False, cancel_futures=True)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        RequestError: _refused,
        MolmoError: _refused,
        HTTPException: _no_route,
        ClientDisconnect: _gone,
        Exception: _failed,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


class Completion:
    """An answer in OpenAI's form, whole or as a stream."""

    def __init__(self, request: ChatRequest, answer: Answer, model: str, fingerprint: str | None) -> None:
        text, stopped = cut(answer.text, request.stop)
        self.text, self.finish = text, "stop" if stopped else answer.finish_reason
        self.with_usage = request.usage
        self.usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": answer.prompt_tokens + answer.tokens,
        }
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def to_json(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage}

    async def chunks(self) -> AsyncIterator[str]:
        """Server-sent events: the whole text in one, because it is known only as a whole."""
        steps: list[tuple[dict[str, str], str | None]] = [
            ({"role": "assistant", "content": ""}, None),
            ({"content": self.text}, None),
            ({}, self.finish),
        ]
        for delta, finish in steps:
            yield self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}], None)
        if self.with_usage:
            yield self._event([], self.usage)
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        shown = {"usage": usage} if self.with_usage else {}
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', 'choices': choices, **shown})}\n\n"


def fetcher(folder: Path | None = None, *, loopback: bool = False) -> Callable[[str], bytes]:
    """Opens pictures at http and https URLs, those of private addresses excepted; see `data.public_hosts`.

    Args:
        folder: where they lie for a moment; None is the system's for such things.
        loopback: only for tests.
    """
    from molmo_model.data.downloads import Download, Status, Store
    from molmo_model.data.fetching import Limits, download

    limits = Limits(concurrency=1, retries=0, total_s=30.0, max_bytes=MAX_IMAGE_BYTES)

    def fetch(url: str) -> bytes:
        rows: list[Download] = []
        with tempfile.TemporaryDirectory(dir=folder) as place:
            store = Store(Path(place) / "files")
            download([(url, None)], store, Path(place) / "part", rows.append, limits, loopback=loopback)
            if rows[0].status is not Status.OK:
                raise DataError(f"the image at the given URL cannot be had: {rows[0].reason}")
            return store.path(rows[0].sha256).read_bytes()

    return fetch


async def _body(request: Request) -> bytes:
    """A request's whole body, bounded in bytes and time. What is too long is read to its end, within reason, because
    most clients look at the answer only then."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a page in a browser can send other types to this machine without being asked whether it may
        raise RequestError("Content-Type must be application/json", code="invalid_content_type", status=415)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    parts.append(part)
                elif size > 2 * MAX_BODY_BYTES:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {BODY_S:g} s"
        raise RequestError(message, code="timeout", status=408) from None
    if size > MAX_BODY_BYTES:
        message = f"the request has more than {MAX_BODY_BYTES} bytes; send fewer or smaller pictures"
        raise RequestError(message, code="request_too_large", status=413)
    return b"".join(parts)


async def _unless_gone(request: Request, answering: Any) -> Answer:
    """The answer, given up as soon as nobody listens any more.

    Raises:
        ClientDisconnect: nobody does.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(answering), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            found: Answer = answer.result()
            return found
        raise ClientDisconnect
    finally:
        answer.cancel()
        left.cancel()


def _check_key(request: Request, key: str) -> None:
    """Raises `RequestError` unless the request carries the key, compared in constant time."""
    given = request.headers.get("authorization", "").encode()
    if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
        raise RequestError(
            "the key in the Authorization header is missing or wrong", code="invalid_api_key", status=401
        )


async def _refused(request: Request, error: Exception) -> Response:
    refused = error if isinstance(error, RequestError) else RequestError(str(error))
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(refused.status)
    return JSONResponse(refused.to_json(), refused.status, headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(RequestError(message, code="not_found", status=error.status_code).to_json(), error.status_code)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    failed = RequestError("the model could not answer; the server's log says why", code="server_error", status=500)
    return JSONResponse(failed.to_json(), 500)
