"""Serves a checkpoint behind OpenAI's chat API, for other programs: evaluation harnesses, scripts, chat windows.

usage: python -m pipelines.serve checkpoint=FOLDER [host=127.0.0.1] [port=8000] [name=NAME] [style=NAME]
                                 [engine=auto] [precision=fp32] [quantization=none] [batch=64] [max_tokens=256]
                                 [key=VARIABLE] [urls=false]

checkpoint    a checkpoint's name or folder, such as sft/step-000500 or artifacts/checkpoints/sft/step-000500
host, port    where it listens; another host than this machine's own wants a key. port=0 takes a free one
name          what requests call the model; the checkpoint's name
style         task family that questions are asked in which name none, such as vqa2 (docs/prompts.md)
engine        auto, slots or generate, as eval.engine; auto chooses for every request by its decoding
precision     fp32, bf16, fp16 or bf16_weights
quantization  none, int8 or int4 (on a GPU), of the language model's matrices
batch         questions that are answered together
max_tokens    of an answer whose request does not say
key           environment variable with the key that requests must carry (Authorization: Bearer ...)
urls          true opens pictures at http(s) addresses; those of private networks never. data: URIs always work

GET /v1/models, POST /v1/chat/completions, GET /health; docs/serving.md says what is taken and what is refused. Not a
stage: writes no artefact. Stops on SIGTERM and Ctrl-C after the answers in hand. Exit codes: 0 stopped, 2 refused with
a message.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.errors import ConfigError
from pipelines.stage import arguments, checkpoint_folder, exit_on_error, option

if TYPE_CHECKING:
    import uvicorn

    from molmo_model.artifacts import Manifest
    from molmo_model.config import Engine, EvalPrecision, Quantization
    from molmo_model.eval.answering import Answer, Asking, Question
    from molmo_model.eval.inference import Predictor
    from molmo_model.eval.server import Desk
    from molmo_model.eval.slot_inference import SlotPredictor
    from molmo_model.preprocessing.preprocessor import Preprocessor

DEFAULTS = {
    "checkpoint": "",
    "host": "127.0.0.1",
    "port": "8000",
    "name": "",
    "style": "",
    "engine": "auto",
    "precision": "fp32",
    "quantization": "none",
    "batch": "64",
    "max_tokens": "256",
    "key": "",
    "urls": "false",
}
CONNECTIONS = 512
"""At the same time; further ones are answered 503."""
GRACE_S = 60
"""Seconds that the answers in hand have when the server is told to stop."""


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    checkpoint: Path
    host: str
    port: int
    name: str
    style: str
    engine: "Engine"
    precision: "EvalPrecision"
    quantization: "Quantization"
    batch: int
    max_tokens: int
    key: str
    """The key itself; empty wants none."""
    urls: bool


def parse(argv: Sequence[str]) -> Settings:
    """The settings of a command line.

    Raises:
        ConfigError: an unknown, missing, repeated or wrong option, by name.
    """
    from molmo_model.config import Engine, EvalPrecision, Quantization, lookup

    own = (Engine.auto, Engine.slots, Engine.generate)
    given: dict[str, str] = {}
    for argument in argv:
        name, value = option(argument)
        if name not in DEFAULTS or not value:
            raise ConfigError(f"{argument!r} is no option; write one of {', '.join(f'{o}=...' for o in DEFAULTS)}")
        if name in given:
            raise ConfigError(f"{name}= is given twice")
        given[name] = value
    if "checkpoint" not in given:
        raise ConfigError("checkpoint= is missing; --help shows the usage")
    values = DEFAULTS | given
    folder = checkpoint_folder(values["checkpoint"])
    if values["urls"] not in ("true", "false"):
        raise ConfigError(f"urls={values['urls']} must be true or false")
    key = os.environ.get(values["key"], "") if values["key"] else ""
    if values["key"] and not key:
        raise ConfigError(f"key={values['key']}: there is no such environment variable, or it is empty")
    if not key and not _is_loopback(values["host"]):
        raise ConfigError(
            f"host={values['host']} can be reached from other machines; name a key's environment variable with key="
        )
    return Settings(
        checkpoint=folder,
        host=values["host"],
        port=_number(values, "port", 0, 65535),
        name=values["name"] or "/".join(folder.parts[-2:]),
        style=values["style"],
        engine=lookup({item.value: item for item in own}, values["engine"], "engine"),
        precision=lookup({item.value: item for item in EvalPrecision}, values["precision"], "precision"),
        quantization=lookup({item.value: item for item in Quantization}, values["quantization"], "quantization"),
        batch=_number(values, "batch", 1, 4096),
        max_tokens=_number(values, "max_tokens", 1, 2**20),
        key=key,
        urls=values["urls"] == "true",
    )


def serve(settings: Settings) -> None:
    """Loads the model, says where it listens and answers until told to stop.

    Raises:
        MolmoError: the checkpoint cannot be loaded, or the place to listen at is taken.
    """
    import uvicorn

    from molmo_model.eval.chat_messages import fingerprint
    from molmo_model.eval.chat_requests import Rules
    from molmo_model.eval.server import application, fetcher
    from molmo_model.preprocessing.system_prompts import default_style

    checkpoint = _checked(settings.checkpoint)
    model = Model.load(settings)
    desk = model.desk(settings.batch)
    rules = Rules(
        settings.name,
        settings.style or default_style(model.preprocessor.config.system_prompt),
        fetcher() if settings.urls else None,
        settings.max_tokens,
    )
    facts = {
        "engine": settings.engine.value,
        "precision": settings.precision.value,
        "quantization": settings.quantization.value,
    }
    app = application(
        desk, rules, key=settings.key, fingerprint=None if checkpoint is None else fingerprint(checkpoint), facts=facts
    )
    place = _listen(settings.host, settings.port)
    quiet = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    host, port = place.getsockname()[:2]
    print(f"serve: {settings.name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    _run(quiet, desk, place)


@dataclass(frozen=True)
class Model:
    """Our engines with the model of one checkpoint, as one: for every question the engine that evaluation would take.

    See `molmo_model.eval.answering.Answering`. Used by one thread at a time.
    """

    settings: Settings
    preprocessor: "Preprocessor"
    engines: Mapping["Engine", "SlotPredictor | Predictor"]

    @classmethod
    def load(cls, settings: Settings) -> "Model":
        """The model of the settings' checkpoint, once, in both engines.

        Raises:
            ConfigError: a quantisation that this machine cannot do.
            CheckpointError: the folder is missing, or no checkpoint that can be loaded.
        """
        from molmo_model.config import Engine, Quantization
        from molmo_model.eval.inference import Predictor
        from molmo_model.eval.loading import load_answering
        from molmo_model.eval.slot_inference import SlotPredictor

        folder, precision, quantization = settings.checkpoint, settings.precision, settings.quantization
        model, preprocessor = load_answering(folder, precision, quantization=quantization)
        engines: dict[Engine, SlotPredictor | Predictor] = {}
        engines[Engine.generate] = Predictor(model, preprocessor, precision)
        if settings.engine is not Engine.generate and quantization is Quantization.none:
            engines[Engine.slots] = SlotPredictor(model, preprocessor, precision)
        for engine in engines.values():
            engine.batch_size = settings.batch
        return cls(settings, preprocessor, engines)

    @property
    def made(self) -> Mapping[str, Any]:
        return {"precision": self.settings.precision.value}

    def answers(
        self, questions: Sequence["Question"], read: Callable[[int], "Question"], asking: "Asking"
    ) -> Iterator["tuple[int, Answer]"]:
        """See `Answering`.

        Raises:
            ConfigError: the engine of the settings cannot do what is asked.
        """
        from molmo_model.config import EvalConfig, TaskConfig
        from molmo_model.eval.engines import resolved

        evaluation = EvalConfig(engine=self.settings.engine, quantization=self.settings.quantization)
        task = TaskConfig(max_new_tokens=asking.max_new_tokens, decoding=asking.decoding)
        engine = self.engines[resolved(evaluation, task, self.settings.checkpoint)]
        engine.preprocessor = self.preprocessor
        yield from engine.answers(questions, read, asking)

    def desk(self, batch: int) -> "Desk":
        """The queue in front of the model."""
        from molmo_model.eval.server import Desk, length_limit
        from molmo_model.model_config import PromptTemplates
        from molmo_model.preprocessing.preprocessor import Preprocessor

        worded = self.preprocessor
        config = replace(worded.config, prompt_templates=PromptTemplates.none)
        letter = replace(self, preprocessor=Preprocessor(config, worded.tokenizer, worded.frame_scorer))
        (any_engine, *_) = self.engines.values()
        positions = any_engine.model.config.text_config.max_position_embeddings
        require = length_limit({False: worded, True: letter.preprocessor}, positions)
        return Desk({False: self, True: letter}, require, most=batch)


def _run(config: "uvicorn.Config", desk: "Desk", place: socket.socket) -> None:
    """Answers until a signal comes."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            desk.close()  # who waits is told so at once
            super().handle_exit(sig, frame)

    # uvicorn raises what stopped it once more when all is done: nothing is left to stop then
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(config).run(sockets=[place])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        place.close()


def _checked(folder: Path) -> "Manifest | None":
    """The manifest of a checkpoint, whose files are what it says; None where a folder of another origin has none."""
    from molmo_model.artifacts import MANIFEST, read_manifest, verify_file

    if not (folder / MANIFEST).exists():
        print("serve: the folder has no manifest: answers will not say which weights they are of (system_fingerprint)")
        return None
    checkpoint = read_manifest(folder, "molmo/checkpoint")
    for file, entry in checkpoint.files.items():
        if "/" not in file:
            verify_file(folder / file, entry)
    return checkpoint


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise ConfigError(f"host={host} port={port}: cannot listen there: {error.strerror or error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _number(values: dict[str, str], name: str, least: int, most: int) -> int:
    text = values[name]
    if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name}={text} must be a whole number from {least} to {most}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    with exit_on_error("serve"):
        serve(parse(argv))


if __name__ == "__main__":
    main()
