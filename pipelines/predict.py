"""Stage 1 of evaluation: asks one checkpoint the questions of one task and writes its answers.

Answers are journalled as they come, under a key of everything that can change them, so a killed run goes on where it
was, and an answer that any earlier run gave to the same question is not computed again. The only evaluation stage that
needs torch, and only when something is left to ask. Several GPUs share the questions (`runtime.eval_ranks`).

    part=1/4          answers the first quarter of the questions into the journal and writes no artefact: for four
                      machines with one disk or one bucket (`runtime.journal`); a run without it then finds all answers
    overwrite=true    asks everything again; the new answers count from then on. What was begun is gone on with
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stage import Build, Stage, check_key, exit_on_error, main, option, state_root

if TYPE_CHECKING:
    from molmo_model.artifacts import Manifest
    from molmo_model.config import Engine, EvalConfig, Params, TaskConfig
    from molmo_model.data.example import Example
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval.answering import Answering, Question
    from molmo_model.eval.journal import Identity, Journal
    from molmo_model.eval.ranks import Job, Ranks
    from molmo_model.eval.tasks import Item
    from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig

Cell = Mapping[str, str]
"""A checkpoint's name and a task's."""
RANK_MODULE = "pipelines.predict_rank"
AGAIN = "asked_again.json"
"""In the state of a build that overwrites: the turn that each question's answer must have."""


def journals() -> Path:
    """The store of answers that all builds of this stage share: not the state of one of them."""
    return state_root() / "predict" / "journal"


def journal_folder(checkpoint: "Manifest") -> Path:
    """Where the answers of a checkpoint's weights are journalled."""
    from molmo_model.eval.journal import FOLDER_CHARACTERS, weights_digest

    return journals() / weights_digest(checkpoint)[:FOLDER_CHARACTERS]


def engine_of(evaluation: "EvalConfig", task: "TaskConfig", folder: Path) -> "Engine":
    """What `eval.engine` stands for: a function of the checkpoint, the decoding and the settings, not of the machine.

    Args:
        folder: the checkpoint's.
    """
    from molmo_model.config import Engine, TaskKind
    from molmo_model.errors import ConfigError
    from molmo_model.eval.engines import resolved

    if task.kind is TaskKind.loss:
        if evaluation.engine is Engine.openai:
            raise ConfigError("a server measures no loss; evaluate tasks of kind loss with eval.engine auto")
        return Engine.generate
    return resolved(evaluation, task, folder)


def engine_code(engine: "Engine") -> str:
    """Digest of the sources with which an engine answers.

    Raises:
        ConfigError: there is no such engine.
    """
    from molmo_model.config import lookup
    from molmo_model.eval.engines import MODULES
    from molmo_model.source_digest import source_digest

    return source_digest(lookup(MODULES, engine.value, "engine of eval.engine"))


def load_engine(engine: "Engine", folder: Path, params: "Params") -> "Answering":
    """An engine with the model of a checkpoint.

    Raises:
        ConfigError: settings that this machine or this engine cannot do.
        CheckpointError: no checkpoint that can be loaded.
    """
    from molmo_model.config import Engine

    if engine is Engine.openai:
        return _served(folder, params)
    from molmo_model.eval.inference import Predictor
    from molmo_model.eval.slot_inference import SlotPredictor

    ours = SlotPredictor if engine is Engine.slots else Predictor
    predictor = ours.load(folder, params.eval.precision, quantization=params.eval.quantization)
    predictor.batch_size = params.runtime.eval_batch_size
    return predictor


def _served(folder: Path, params: "Params") -> "Answering":
    """The engine `openai`, whose server has the model of a checkpoint."""
    from molmo_model.artifacts import read_manifest
    from molmo_model.errors import ConfigError
    from molmo_model.eval.chat_messages import fingerprint
    from molmo_model.eval.served import Served, key_from

    url, model = params.runtime.engine_url, params.eval.served_model
    if url is None or model is None:
        raise ConfigError("eval.engine openai needs runtime.engine_url, such as http://127.0.0.1:8000/v1")
    return Served(
        url,
        model,
        _preprocessor_config(folder).prompts,
        key=key_from(params.runtime.engine_key),
        requests=params.runtime.engine_requests,
        fingerprint=fingerprint(read_manifest(folder, "molmo/checkpoint")),
        precision=params.eval.precision.value,
    )


def decoding_identity(task: "TaskConfig", evaluation: "EvalConfig") -> dict[str, Any]:
    """All settings of a task and of the evaluation that can change an answer, for the journal's key."""
    from molmo_model.config import Engine, to_dict

    served = {"served_model": evaluation.served_model} if evaluation.engine is Engine.openai else {}
    return {
        **to_dict(task.decoding),
        "kind": task.kind.value,
        "max_new_tokens": task.max_new_tokens,
        "max_crops": task.max_crops,
        "max_frames": task.max_frames,
        "keep_image_tokens": task.keep_image_tokens,
        "quantization": evaluation.quantization.value,
        **served,
    }


@dataclass(frozen=True)
class Plan:
    """The questions of a cell and the keys of their answers."""

    items: "list[Item]"
    prompts: list[list[str]]
    """Per item the texts of its turns in front of the answer."""
    keys: list[str]
    identity: "Identity"
    engine: "Engine"


def plan(params: "Params", cell: Cell, folder: Path, reader: "ShardReader") -> Plan:
    """What a cell asks, from the checkpoint's manifest and the shards; no model is looked at.

    Args:
        folder: the checkpoint's.
        reader: of the task's dataset.
    """
    from molmo_model.artifacts import read_manifest
    from molmo_model.eval import tasks
    from molmo_model.eval.journal import identity_of

    name = cell["task"]
    task, evaluation = params.tasks[name], params.eval
    asked = tasks.items(task, name, reader)
    engine = engine_of(evaluation, task, folder)
    identity = identity_of(
        read_manifest(folder, "molmo/checkpoint"),
        engine_code(engine),
        decoding_identity(task, evaluation) | _frame_scorer(folder),
        evaluation.precision.value,
        engine.value,
    )
    prompts = _prompts(folder, asked)
    keys = [identity.key(_files(item), _turns(task, item, prompt)) for item, prompt in zip(asked, prompts, strict=True)]
    return Plan(asked, prompts, keys, identity, engine)


def build(stage: Build) -> dict[str, Any]:
    """Fills the artefact with `predictions.jsonl` and the training references."""
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.errors import EvaluationError
    from molmo_model.eval import predictions, tasks

    task = stage.params.tasks[stage.key["task"]]
    reader = ShardReader(stage.inputs["shards"])
    planned = plan(stage.params, stage.key, stage.inputs["checkpoint"], reader)
    again = stage.work / AGAIN if stage.overwrite else None
    answers = fill(stage.params, stage.key, stage.inputs["checkpoint"], reader, planned, again=again)
    if lacking := [item.id for item, key in zip(planned.items, planned.keys, strict=True) if key not in answers]:
        raise EvaluationError(
            f"engine {planned.engine.value} gave no answer to {len(lacking)} of {len(planned.items)} questions, "
            f"the first is {lacking[0]}; run it again, the others are kept"
        )
    rows = [
        _row(item, prompt, answers[key], task.dataset)
        for item, prompt, key in zip(planned.items, planned.prompts, planned.keys, strict=True)
    ]
    check_table(rows, "predictions")
    predictions.write_jsonl(stage.out / predictions.FILE, rows)
    predictions.write_jsonl(stage.out / predictions.TRAINING_FILE, tasks.training_references(task, reader))
    cut = sum(row["finish_reason"] == "length" for row in rows)
    return {"items": len(rows), "examples": len({row["example_id"] for row in rows}), "cut_off": cut}


def fill(
    params: "Params",
    cell: Cell,
    folder: Path,
    reader: "ShardReader",
    planned: Plan,
    part: tuple[int, int] | None = None,
    again: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Asks what the journal lacks; the answers by key.

    Args:
        part: ask only this share of the questions, counted from 1, of so many.
        again: ask even what the journal has; the file remembers how far that is.
    """
    from molmo_model.artifacts import read_manifest, verify_file
    from molmo_model.eval.journal import Journal
    from molmo_model.eval.ranks import shares

    checkpoint = read_manifest(folder, "molmo/checkpoint")
    writer = cell["task"] + (f".part-{part[0]}-of-{part[1]}" if part else "")
    chosen = range(len(planned.keys)) if part is None else shares(_costs(planned), part[1])[part[0] - 1]
    with Journal(journal_folder(checkpoint), writer) as journal, _shared(params, journal) as fetch:

        def missing() -> list[int]:
            return [index for index in chosen if journal.turn(planned.keys[index]) < turns.get(planned.keys[index], 0)]

        turns: dict[str, int] = {}
        if again is not None or missing():
            fetch()
        turns = {} if again is None else _turns_again(again, planned.keys, journal)
        for problem in journal.problems:
            print(f"predict: journal: {problem}")
        if left := missing():
            _check_fit(params.tasks[cell["task"]], cell["task"], reader)
            for file, entry in checkpoint.files.items():
                if "/" not in file:
                    verify_file(folder / file, entry)
            _ask(params, cell, folder, reader, planned, left, turns, journal)
        found = ((key, journal.get(key)) for key in planned.keys)
        return {key: answer for key, answer in found if answer is not None}


def _check_fit(task: "TaskConfig", name: str, reader: "ShardReader") -> None:
    """Refuses a task whose metrics cannot score it, before hours of answers.

    Imported by name, so that this stage's code does not depend on the metrics': an edited metric touches no answer.

    Raises:
        ConfigError, EvaluationError: what does not fit, with the item.
    """
    from importlib import import_module

    import_module("molmo_model.eval.fitting").check_task(task, name, reader)


def _turns_again(path: Path, keys: Sequence[str], journal: "Journal") -> dict[str, int]:
    """The turn that each answer must have when all is asked again: the next one, as of when that was begun."""
    import json

    from molmo_model.artifacts import write_text_atomic

    if path.exists():
        turns: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        return turns
    turns = {key: journal.turn(key) + 1 for key in keys}
    write_text_atomic(path, json.dumps(turns))
    return turns


@contextmanager
def _shared(params: "Params", journal: "Journal") -> "Iterator[Any]":
    """Gives the function that brings what others have published; what is answered within is published too."""
    if params.runtime.journal is None:
        yield lambda: None
        return
    from molmo_model.eval.shared_journal import publishing
    from molmo_model.storage import scheme_of

    scheme_of(params.runtime.journal)  # a place that cannot be is refused; one that fails is told, and lived without
    with publishing(params.runtime.journal, journal, lambda text: print(f"predict: journal: {text}")) as fetch:
        yield fetch


def _prompts(folder: Path, asked: "Sequence[Item]") -> list[list[str]]:
    """Per item the texts of its turns, before the answer, as the checkpoint's preprocessor writes them."""
    from molmo_model.preprocessing import prompts

    form = _preprocessor_config(folder).prompts
    return [prompts.asked(item.asked, form) for item in asked]


def _turns(task: "TaskConfig", item: "Item", prompt: Sequence[str]) -> list[str]:
    """The texts that an answer depends on: the prompt's; where its loss is measured, the reference answer too."""
    from molmo_model.config import TaskKind
    from molmo_model.preprocessing import prompts

    if task.kind is TaskKind.answer:
        return list(prompt)
    said = item.asked.messages[-1]
    return [*prompt, said.explanation or "", prompts.answer(item.asked.style, said)]


def _files(item: "Item") -> list[list[Any]]:
    """What of pictures and films an answer depends on: the bytes, the part that is meant, and the sizes and times that
    the shards give of them, from which crops and frames are chosen."""
    from dataclasses import asdict

    from molmo_model.artifacts import digest_of

    images = [[image.width, image.height, image.format] for image in item.example.images]
    films = [[film.width, film.height, film.format, digest_of(asdict(film.timeline))] for film in item.example.videos]
    return [[sha256, *facts] for sha256, facts in zip(item.images, [*images, *films], strict=True)]


def _preprocessor_config(folder: Path) -> "PreprocessorConfig":
    """How a checkpoint turns an example into its inputs."""
    import json

    from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig

    path = folder / CONFIG_FILE
    return PreprocessorConfig.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def _frame_scorer(folder: Path) -> dict[str, str]:
    """The files of the model that chooses the frames of films, which a checkpoint names and does not hold. One of the
    hub counts by its name, which is in the preprocessor's file."""
    from molmo_model.artifacts import path_digest

    source = Path(_preprocessor_config(folder).video.select_frames_by_query or "")
    if source == Path() or not source.is_dir():
        return {}
    return {"frame_scorer": path_digest(source)}


def _costs(planned: Plan) -> list[tuple[str, float]]:
    """Per question, what it is about (questions about one picture stay together) and roughly what it costs."""
    from molmo_model.eval.ranks import rough_cost

    return [
        (" ".join(item.images) or item.id, rough_cost(item.example, sum(map(len, prompt))))
        for item, prompt in zip(planned.items, planned.prompts, strict=True)
    ]


def _ask(
    params: "Params",
    cell: Cell,
    folder: Path,
    reader: "ShardReader",
    planned: Plan,
    left: Sequence[int],
    turns: Mapping[str, int],
    journal: "Journal",
) -> None:
    """Computes the missing answers, here or in ranks, and journals them as they come."""
    from tqdm import tqdm

    from molmo_model.artifacts import read_manifest
    from molmo_model.eval.ranks import Job, Wanted, shares

    ranks, gpus = _ranks(params, planned.engine, len(left))
    wanted = [
        Wanted(planned.items[index].row, planned.items[index].conversation, key, turns.get(key, 0))
        for index, key in ((index, planned.keys[index]) for index in left)
    ]
    job = Job(
        params=params,
        cell=dict(cell),
        checkpoint=folder,
        digest=read_manifest(folder).digest,
        shards=reader.place,
        engine=planned.engine,
        identity=planned.identity,
        ranks=ranks,
        wanted=wanted,
    )
    with tqdm(total=len(left), desc=" ".join(cell.values()), unit="answer", mininterval=0.5) as bar:
        if ranks == 1:
            ask(job, journal, reader, [planned.items[index].example for index in left], bar.update)
            return
        costs = _costs(planned)
        parts = [
            job.of([wanted[place] for place in share], journal.path.parent, f"{journal.path.stem}.rank-{number}")
            for number, share in enumerate(shares([costs[index] for index in left], ranks))
        ]

        def poll() -> None:
            journal.refresh()
            bar.update(sum(journal.turn(one.key) >= one.turn for one in wanted) - bar.n)

        _processes(ranks, gpus).run(parts, poll)
        poll()


def ask(
    job: "Job", journal: "Journal", reader: "ShardReader", light: "Sequence[Example]", done: Callable[[int], object]
) -> None:
    """Asks the questions of a job and writes each answer into the journal as it comes.

    Args:
        light: their examples without the bytes of pictures and films.
        done: called with the number of new answers.
    """
    from dataclasses import asdict

    from molmo_model.config import TaskKind
    from molmo_model.eval.answering import Asking, Question

    if not job.wanted:
        return
    task = job.params.tasks[job.cell["task"]]
    engine = _engine(job)
    asking = Asking(
        task.max_new_tokens,
        task.decoding,
        task.keep_image_tokens,
        measure=task.kind is TaskKind.loss,
        max_crops=task.max_crops,
        max_frames=task.max_frames,
    )
    questions = [Question(example, wanted.conversation) for example, wanted in zip(light, job.wanted, strict=True)]
    turns = {one.key: one.turn for one in job.wanted}
    identity = job.identity.digest
    journal.introduce(identity, asdict(job.identity))

    def read(index: int) -> "Question":
        return Question(reader.read(job.wanted[index].row), job.wanted[index].conversation)

    for index, answer in engine.answers(questions, read, asking):
        said = {name: value for name, value in asdict(answer).items() if value is not None}
        made = {**engine.made, "engine": job.engine.value, "ranks": job.ranks, **job.cell}
        journal.append([(job.wanted[index].key, said)], made, identity, turns)
        done(1)


_KEPT: "dict[str, Answering]" = {}
"""The engine that answered last, for the next task of its checkpoint."""


def _engine(job: "Job") -> "Answering":
    from molmo_model.artifacts import digest_of
    from molmo_model.config import to_dict

    settings = to_dict(job.params)
    key = digest_of([str(job.checkpoint), job.digest, job.engine.value, settings["eval"], settings["runtime"]])
    if key not in _KEPT:
        _KEPT.clear()  # first, so that two models never lie in memory at once
        _KEPT[key] = load_engine(job.engine, job.checkpoint, job.params)
    return _KEPT[key]


def _ranks(params: "Params", engine: "Engine", questions: int) -> tuple[int, int]:
    """How many processes answer, and the GPUs of this machine. A server needs none but this one."""
    from molmo_model.config import Engine

    if engine is Engine.openai or params.runtime.eval_ranks == 1:
        return 1, 0
    import torch

    gpus = torch.cuda.device_count()
    return min(params.runtime.eval_ranks or max(gpus, 1), questions), gpus


_POOL: "dict[tuple[int, int], Ranks]" = {}
"""The ranks that answered last: they keep their model for the next task."""


def _processes(ranks: int, gpus: int) -> "Ranks":
    from molmo_model.eval.ranks import Ranks

    if (ranks, gpus) not in _POOL:
        for other in _POOL.values():
            other.close()
        _POOL.clear()
        command = [sys.executable, "-m", RANK_MODULE]
        _POOL[ranks, gpus] = Ranks(command, ranks, gpus, state_root() / "predict" / "ranks")
    return _POOL[ranks, gpus]


def _row(item: "Item", prompt: Sequence[str], answer: dict[str, Any], dataset: str) -> dict[str, Any]:
    """One row of `predictions.jsonl`."""
    from molmo_model.eval.tasks import references

    return {
        "id": item.id,
        "example_id": item.example.id,
        "conversation": item.conversation,
        "style": item.asked.style,
        "prompt": "".join(prompt),
        "prediction": answer["text"],
        "references": references(item),
        "finish_reason": answer["finish_reason"],
        "tokens": answer["tokens"],
        "prompt_tokens": answer["prompt_tokens"],
        **({"measured": answer["measured"]} if "measured" in answer else {}),
        "image": {"dataset": dataset, "row": item.row, "sha256": list(item.images)},
    }


def _inputs(params: Any, key: Any) -> dict[str, str]:
    return {
        "checkpoint": f"artifacts/checkpoints/{key['checkpoint']}",
        "shards": f"artifacts/shards/{params.tasks[key['task']].dataset}",
    }


ASKED_BY = (
    *("dataset", "styles", "split", "kind", "max_examples", "max_new_tokens", "decoding"),
    *("keep_image_tokens", "max_crops", "max_frames"),
)
"""Of a task, what decides its questions and their answers; metrics, slices, groups and gates are scoring's."""

STAGE = Stage(
    name="predict",
    schema="molmo/predictions",
    version=1,
    keys=("checkpoint", "task"),
    out="artifacts/predictions/{checkpoint}/{task}",
    params=(
        *("eval.precision", "eval.quantization", "eval.engine", "eval.served_model"),
        *(f"tasks.{{task}}.{name}" for name in ASKED_BY),
    ),
    build=build,
    partitions=lambda params: [
        {"checkpoint": checkpoint, "task": task} for checkpoint, task in product(params.eval.checkpoints, params.tasks)
    ],
    inputs=_inputs,
)


def fill_part(argv: Sequence[str]) -> None:
    """`part=1/4`: the journal gets a share of each cell's answers; no artefact is written.

    Raises:
        ConfigError: no such part, or together with `overwrite`, whose questions no machine alone knows.
    """
    from molmo_model.config import load_params
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.errors import ConfigError

    options = dict(option(word) for word in argv if option(word)[0] in (*STAGE.keys, "params", "part"))
    if any(option(word)[0] in ("overwrite", "--overwrite") for word in argv):
        raise ConfigError("part=... fills gaps of the journal; overwrite=true asks again: give one of them")
    part = read_part(options.pop("part"))
    overrides = [word for word in argv if option(word)[0] not in (*STAGE.keys, "params", "part")]
    params = load_params(options.pop("params", "params.yaml"), overrides)
    cells = [cell for cell in STAGE.partitions(params) if all(cell[name] == options[name] for name in options)]
    for cell in cells or [check_key(STAGE, params, options)]:
        places = _inputs(params, cell)
        folder, reader = Path(places["checkpoint"]), ShardReader(places["shards"])
        planned = plan(params, cell, folder, reader)
        found = fill(params, cell, folder, reader, planned, part)
        print(f"predict {' '.join(cell.values())}: part {part[0]}/{part[1]}; {len(found)} of {len(planned.keys)} known")


def read_part(text: str) -> tuple[int, int]:
    """`2/4` as numbers.

    Raises:
        ConfigError: it is no such fraction.
    """
    from molmo_model.errors import ConfigError

    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"part={text} is no part; write part=1/4 to part=4/4 on four machines")
    return int(number), int(count)


if __name__ == "__main__":
    if any(option(word)[0] == "part" for word in sys.argv[1:]):
        with exit_on_error(STAGE.name):
            fill_part(sys.argv[1:])
    else:
        main(STAGE)
