"""The engine `openai`: a model that some server with OpenAI's chat API answers for, ours or anybody's.

`eval.served_model` names the model, `runtime.engine_url` says where it is: a colleague's vLLM with our Molmo2 export,
or `python -m pipelines.serve`. What is sent is in `eval.chat_messages`. Requests go out side by side and answers come
back as they are ready; what may pass (429, 5xx, timeouts, broken answers) is tried again, slower each time.

The server's own code, precision and image processing are its own affair: only what it is called is part of an answer's
key. One of ours says which weights it has (`system_fingerprint`) and in what precision; others than those of the
checkpoint that is evaluated are refused.
"""

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from molmo_model.data.example import item_id
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval.answering import Answer, Asking, Question
from molmo_model.eval.chat_messages import FINGERPRINT, chat_request, require_pictures, unsendable
from molmo_model.preprocessing.prompts import PromptFormat

T = TypeVar("T")

FINISHED = ("stop", "length")
LATER = frozenset({408, 409, 425, 429})
"""Besides 5xx: what a server answers that wants to be asked again."""
OF_ONE_ITEM = frozenset({400, 413, 415, 422})
"""Refusals that say more of one question than of the server; others end the run."""
MOST_REFUSED = 8
"""So many refused questions end the run; fewer are named together at its end, when all others are answered."""
SHOWN_LETTERS = 300
"""Of what a server says, in an error."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    attempts: int = 6
    connect_s: float = 10.0
    answer_s: float = 300.0
    """For one whole answer, the server's own queue included."""
    backoff_s: float = 0.5
    """Before the second attempt; doubles with each further one, and up to as much again is drawn on top."""
    most_backoff_s: float = 30.0
    """Also of what a server may ask for (Retry-After)."""


PATIENCE = Patience()


class _Later(Exception):
    """A failure that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Refused(Exception):
    """A failure that stays; `ends` where no further question is worth asking. `status` is 0 without an answer."""

    def __init__(self, reason: str, status: int = 0, ends: bool = True) -> None:
        super().__init__(reason)
        self.status, self.ends = status, ends


def key_from(variable: str) -> str:
    """The server's key in an environment variable; empty where there is none.

    Raises:
        ConfigError: it holds what no header can; the key itself is not shown.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the key in ${variable} has letters that no HTTP header can hold")
    return key


class Served:
    """A model behind a server; see `eval.answering.Answering`.

    Args:
        url: the server's address up to and including `/v1`.
        model: what it calls the model.
        form: how the evaluated checkpoint writes prompts.
        key: sent as `Authorization: Bearer`; never shown.
        requests: at the same time.
        fingerprint, precision: of the evaluated checkpoint, which one of our own servers must have.

    Raises:
        ConfigError: the URL is none, or holds a password.
    """

    def __init__(
        self,
        url: str,
        model: str,
        form: PromptFormat,
        *,
        key: str = "",
        requests: int = 16,
        fingerprint: str | None = None,
        precision: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.url, self.model, self.form, self.requests = checked_url(url), model, form, requests
        self.fingerprint, self.precision = fingerprint, precision
        self.patience = patience or PATIENCE
        self._key = key

    @property
    def made(self) -> Mapping[str, Any]:
        return {"requests": self.requests}

    def answers(
        self, questions: Sequence[Question], read: Callable[[int], Question], asking: Asking
    ) -> Iterator[tuple[int, Answer]]:
        """As they come; see `Answering`.

        Raises:
            ConfigError: settings that no server can be asked for, or a server that has another model.
            EvaluationError: naming URL, reason and item, when everything that could be answered was.
        """
        if reasons := unsendable(asking):
            raise ConfigError(f"the engine openai cannot send {', '.join(reasons)}; use another one")
        for question in questions:
            require_pictures(question)
        failed: list[tuple[str, _Refused]] = []
        running: dict[asyncio.Task[Answer], int] = {}
        numbers = iter(range(len(questions)))
        # the loop runs only while this generator is asked for its next answer; between, answers wait in the sockets
        with asyncio.Runner() as runner, closing_in(runner, self._client(), running) as client:
            runner.run(self._check_server(client))
            stop = asyncio.Event()
            while True:
                while not stop.is_set() and len(running) < self.requests:
                    if (index := next(numbers, None)) is None:
                        break
                    body = json.dumps(chat_request(read(index), self.form, self.model, asking)).encode()
                    task = runner.get_loop().create_task(self._answer(client, body, stop))
                    running[task] = index
                if not running:
                    break
                for task in runner.run(_first(running)):
                    index = running.pop(task)
                    try:
                        answer = task.result()
                    except _Refused as refused:
                        failed.append((item_id(questions[index].example, questions[index].conversation), refused))
                        if refused.ends or len(failed) >= MOST_REFUSED:
                            stop.set()
                        continue
                    yield index, answer
        if failed:
            raise EvaluationError(self._failures(failed, len(questions)))

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        seconds = self.patience.connect_s
        timeout = httpx.Timeout(None, connect=seconds)  # `_send` bounds the whole
        limits = httpx.Limits(max_connections=self.requests)
        return httpx.AsyncClient(
            headers={**headers, "Content-Type": "application/json"}, timeout=timeout, limits=limits
        )

    async def _check_server(self, client: httpx.AsyncClient) -> None:
        """Compares the list of models, where the server has one, with what is wanted of it.

        Raises:
            ConfigError: it has no model of that name, or one of other weights or precision.
            EvaluationError: it does not answer.
        """
        try:
            listed = await self._send(client, "GET", "/models", None, asyncio.Event(), _models)
        except _Refused as refused:
            if refused.status == 404:
                return  # a server without such a list
            raise EvaluationError(f"{self.url}: {refused}; start the server, or correct runtime.engine_url") from None
        if self.model not in listed:
            raise ConfigError(
                f"eval.served_model is {self.model!r}, but {self.url} has {', '.join(map(repr, listed)) or 'none'}"
            )
        own = listed[self.model]
        self._check_weights(own.get("fingerprint"))
        if self.precision is not None and own.get("precision", self.precision) != self.precision:
            raise ConfigError(
                f"{self.url} answers in precision {own['precision']}, eval.precision is {self.precision}; change either"
            )

    def _check_weights(self, found: Any) -> None:
        """Raises `ConfigError` where a server of ours has other weights than the evaluated checkpoint."""
        if self.fingerprint is None or not isinstance(found, str) or not found.startswith(FINGERPRINT):
            return
        if found != self.fingerprint:
            raise ConfigError(
                f"{self.url} answers with another checkpoint: its fingerprint is {found}, that of the evaluated one "
                f"{self.fingerprint}; serve the checkpoint that is evaluated"
            )

    async def _answer(self, client: httpx.AsyncClient, body: bytes, stop: asyncio.Event) -> Answer:
        return await self._send(client, "POST", "/chat/completions", body, stop, self._read)

    def _read(self, raw: Any) -> Answer:
        """The answer in a completion.

        Raises:
            LookupError, TypeError, ValueError: it is none.
            _Refused: the server ended it in a way that is no answer.
            ConfigError: of other weights than the checkpoint's.
        """
        self._check_weights(raw.get("system_fingerprint") if isinstance(raw, dict) else None)
        choice, usage = raw["choices"][0], raw["usage"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        tokens, prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        if reason not in FINISHED:
            raise _Refused(
                f"the answer ended with finish_reason {reason!r}, not {' or '.join(FINISHED)}", 200, ends=False
            )
        if not isinstance(text, str) or not isinstance(tokens, int) or not isinstance(prompt_tokens, int):
            raise TypeError("content must be text, usage whole numbers")
        return Answer(text.strip(), reason, tokens, prompt_tokens)

    async def _send(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: bytes | None,
        stop: asyncio.Event,
        read: Callable[[Any], T],
    ) -> T:
        """What `read` makes of a server's answer; tried again while the failure may pass and nobody said stop."""
        patience, wait_s = self.patience, self.patience.backoff_s
        for attempt in range(1, patience.attempts + 1):
            try:
                async with asyncio.timeout(patience.answer_s):
                    response = await client.request(method, self.url + path, content=body)
                return self._explained(response, read)
            except TimeoutError:
                later = _Later(f"no answer within {patience.answer_s:g} s")
            except httpx.TransportError as error:
                later = _Later(f"no connection: {self._shown(str(error)) or type(error).__name__}")
            except _Later as passing:
                later = passing
            if attempt == patience.attempts or stop.is_set():
                break
            pause = min(max(wait_s * random.uniform(1, 2), later.wait_s), patience.most_backoff_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
            wait_s *= 2
        raise _Refused(f"{later} ({attempt} attempts)")

    def _explained(self, response: httpx.Response, read: Callable[[Any], T]) -> T:
        """What `read` makes of a whole answer, or why there is none."""
        status = response.status_code
        if status in LATER or status >= 500:
            asked = seconds_of(response.headers.get("Retry-After", ""))
            raise _Later(f"status {status}: {self._said(response)}", asked)
        if status != 200:
            raise _Refused(f"status {status}: {self._said(response)}", status, ends=status not in OF_ONE_ITEM)
        try:
            return read(response.json())
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            reason = self._shown(f"{type(error).__name__}: {error}")
            raise _Later(f"status 200, but no answer that can be read: {reason}") from error

    def _said(self, response: httpx.Response) -> str:
        """What the server says of a failure."""
        try:
            return self._shown(str(response.json()["error"]["message"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            return self._shown(response.text)

    def _shown(self, text: str) -> str:
        """A server's words, fit for a message: without the key, which some servers repeat, printable and short."""
        plain = text.replace(self._key, "***") if self._key else text
        return "".join(letter if letter.isprintable() else " " for letter in plain[:SHOWN_LETTERS]).strip()

    def _failures(self, failed: Sequence[tuple[str, _Refused]], asked: int) -> str:
        named = "; ".join(f"item {item}: {refused}" for item, refused in failed[:MOST_REFUSED])
        return (
            f"{self.url}, model {self.model!r}: {len(failed)} of {asked} questions failed: {named}. What was answered "
            "is kept: run it again to ask only the rest"
        )


async def _first(running: Iterable["asyncio.Task[Answer]"]) -> set["asyncio.Task[Answer]"]:
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    return done


@contextlib.contextmanager
def closing_in(
    runner: asyncio.Runner, client: httpx.AsyncClient, running: Mapping["asyncio.Task[Answer]", int]
) -> Iterator[httpx.AsyncClient]:
    """The client, whose requests in flight are broken off when the caller is done, fails or loses interest."""

    async def end() -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await client.aclose()

    try:
        yield client
    finally:
        runner.run(end())


def _models(raw: Any) -> dict[str, dict[str, Any]]:
    """Models by name, with what ours says of them."""
    return {str(entry["id"]): entry.get("molmo") or {} for entry in raw["data"]}


def seconds_of(header: str) -> float:
    """What a Retry-After header asks to wait, if it says so in seconds; 0 otherwise."""
    text = header.strip()
    return float(text[:9]) if text.isascii() and text.isdecimal() else 0.0


def checked_url(url: str) -> str:
    """A server's address without the slash at its end.

    Raises:
        ConfigError: no address of http or https, or one with a password or a query in it, which would be shown.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"runtime.engine_url is no address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"runtime.engine_url is {url!r}; write an address such as http://127.0.0.1:8000/v1")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigError(
            f"runtime.engine_url (host {parsed.host}) holds a password or a query; put the key in an environment "
            "variable and name it in runtime.engine_key"
        )
    return url.rstrip("/")
