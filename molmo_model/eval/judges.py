"""Judges: language models that are asked about answers, and what they said, kept on disk.

A judgement is asked for once: it is kept under a digest of provider, model, prompt and settings, in files of the same
sealed lines as the journal of predictions. The judge `offline` asks nobody: it knows what the cache knows, and counts
the rest as missing. The judge `openai` sends what is missing to a server with OpenAI's chat API. A server that fails is
asked again a few times, later and later; a prompt that still has no answer is missing, and the next run asks it again.
"""

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.artifacts import digest_of
from molmo_model.config import EvalConfig, JudgeProvider, RuntimeConfig
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval.journal import seal, unseal

if TYPE_CHECKING:
    import httpx

SETTINGS: Mapping[str, Any] = {"temperature": 0}
"""Of every request, and of every judgement's key: the likeliest answer."""
ATTEMPTS = 5
"""Requests for one prompt before it counts as missing."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; twice as long before each further one."""
LONGEST_PAUSE = 30.0
"""Seconds that a server's `Retry-After` is followed at most."""
TIMEOUT = 120.0
"""Seconds for one answer."""
FORBIDDEN = (401, 403, 404)
"""Statuses that no other prompt would change: the key, the address or the model's name is wrong."""


class Judgements:
    """What judges said, by key: all `*.jsonl` of a folder are read, `<writer>.jsonl` is written.

    Attributes:
        problems: lines that were skipped, one sentence each, naming file and line.
    """

    def __init__(self, folder: str | Path, writer: str = "judgements") -> None:
        self.path = Path(folder) / f"{writer}.jsonl"
        self.problems: list[str] = []
        self._known: dict[str, str] = {}
        for path in sorted(self.path.parent.glob("*.jsonl")):
            self._read(path)

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def add(self, key: str, answer: str, about: Mapping[str, Any]) -> None:
        """Keeps an answer and returns once it is on the disk.

        Args:
            about: model and prompt, for people who look into the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = seal({"key": key, "answer": answer, **about})
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # a kill tore the last line: it ends here
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._known[key] = answer

    def _read(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            record = unseal(line)
            if record is None:
                self.problems.append(f"{path}:{number}: checksum does not match; the judgement is asked for again")
            else:
                self._known.setdefault(record["key"], record["answer"])


class CachedJudge:
    """A judge with its cache.

    Attributes:
        name: who judges, for people and for `metrics.json`.
        asked: prompts so far; missing: of them those without an answer; sent: of them those that went to the server.
        problems: why prompts have no answer, each reason once.
    """

    def __init__(self, name: str, model: str | None, cache: Judgements, server: "ChatServer | None") -> None:
        self.name = name
        self.asked = self.missing = self.sent = 0
        self.problems: list[str] = list(cache.problems)
        self._model, self._cache, self._server = model, cache, server

    def ask(self, prompts: Sequence[str]) -> list[str | None]:
        """The answers, in order; None where there is none."""
        keys = {prompt: self._key(prompt) for prompt in prompts}
        unknown = [prompt for prompt, key in keys.items() if self._cache.get(key) is None]
        if self._server is not None and unknown:
            self.sent += len(unknown)
            for prompt, answer, problem in self._server.answers(unknown):
                if answer is not None:
                    self._cache.add(keys[prompt], answer, {"model": self._model, "prompt": prompt})
                elif problem not in self.problems:
                    self.problems.append(problem)
        answers = [self._cache.get(keys[prompt]) for prompt in prompts]
        self.asked += len(answers)
        self.missing += answers.count(None)
        return answers

    def _key(self, prompt: str) -> str:
        provider = JudgeProvider.openai.value  # of whom an offline judge knows the answers
        return digest_of({"provider": provider, "model": self._model, "prompt": prompt, "settings": dict(SETTINGS)})


class ChatServer:
    """A server with OpenAI's chat API, asked by several threads at the same time."""

    def __init__(self, url: str, key: str | None, model: str, requests: int) -> None:
        self._url, self._key, self._model, self._requests = url.rstrip("/"), key, model, max(1, requests)

    def answers(self, prompts: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
        """(prompt, answer or None, why there is none), as they come.

        Raises:
            EvaluationError: the server refuses key, address or model; what was answered before is kept.
        """
        import httpx  # takes longer to import than a task without a judge takes to be scored

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self._requests)
        with (
            httpx.Client(headers=headers, timeout=TIMEOUT, limits=limits) as client,
            ThreadPoolExecutor(self._requests) as pool,
        ):
            stop = threading.Event()
            futures = {pool.submit(self._answer, client, prompt, stop): prompt for prompt in prompts}
            try:
                for future in as_completed(futures):
                    yield futures[future], *future.result()
            finally:  # interrupted, or refused: nobody waits for further attempts
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, client: "httpx.Client", prompt: str, stop: threading.Event) -> tuple[str | None, str]:
        problem = ""
        for attempt in range(ATTEMPTS):
            answer, problem, pause = self._try(client, prompt)
            if answer is not None or pause is None:
                return answer, problem
            if attempt + 1 < ATTEMPTS and stop.wait(max(pause, FIRST_PAUSE * 2**attempt)):
                return None, problem
        return None, f"{problem}, {ATTEMPTS} times"

    def _try(self, client: "httpx.Client", prompt: str) -> tuple[str | None, str, float | None]:
        """The answer, or what is wrong and the least seconds to wait before another try; None: it would be no use."""
        import httpx

        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], **SETTINGS}
        try:
            response = client.post(f"{self._url}/chat/completions", json=body)
        except httpx.TransportError as error:
            return None, f"{self._where()}: {type(error).__name__}", 0.0
        status = response.status_code
        if status in FORBIDDEN:
            raise EvaluationError(
                f"{self._where()} answers {status} to the judge {self._model!r}: {self._shown(response)!r}; see "
                f"runtime.judge_url, the variable that runtime.judge_key names, and eval.judge_model"
            )
        if status == 429 or status >= 500:
            return None, f"{self._where()}: status {status}", _retry_after(response.headers.get("Retry-After"))
        if status != 200:
            return None, f"{self._where()}: status {status}, {self._shown(response)!r}", None
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None, f"{self._where()}: an answer that is not OpenAI's JSON", 0.0
        if not isinstance(text, str) or not text.strip():
            return None, f"{self._where()}: an empty answer", 0.0
        return text.strip(), "", None

    def _shown(self, response: "httpx.Response") -> str:
        """The beginning of what a server says, without the key, which some repeat."""
        text = response.text.replace(self._key, "(key)") if self._key else response.text
        return text[:200]

    def _where(self) -> str:
        """The address without what may be secret in it."""
        import httpx

        url = httpx.URL(self._url)
        return f"judge at {url.scheme}://{url.netloc.decode()}{url.path}"


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks for; a date or nonsense counts as none."""
    try:
        return min(max(float(value or 0.0), 0.0), LONGEST_PAUSE)
    except ValueError:
        return 0.0


def judge_of(
    settings: EvalConfig, runtime: RuntimeConfig, cache: str | Path, environment: Mapping[str, str] = os.environ
) -> CachedJudge:
    """The judge that the params choose.

    Args:
        cache: folder of the judgements.
        environment: where the key is looked up, under the name `runtime.judge_key`.

    Raises:
        ConfigError: the judge `openai` lacks its address or its model.
    """
    model = settings.judge_model
    known = Judgements(cache)
    if settings.judge == JudgeProvider.offline:
        return CachedJudge(f"offline ({model})" if model else "offline", model, known, None)
    if not (runtime.judge_url and model):
        lacking = "runtime.judge_url" if not runtime.judge_url else "eval.judge_model"
        raise ConfigError(
            f"eval.judge is openai, but {lacking} is not set; name the server and its model, or use offline"
        )
    server = ChatServer(runtime.judge_url, environment.get(runtime.judge_key), model, runtime.engine_requests)
    return CachedJudge(f"openai ({model})", model, known, server)
