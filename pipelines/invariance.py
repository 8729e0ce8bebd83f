"""Shows what batching, order, engine and precision do to a checkpoint's answers.

usage: python -m pipelines.invariance checkpoint=<run>/step-<six digits> task=<name> [items=64] [sizes=1,3,8,32]
       [precisions=bf16,bf16_weights] [out=invariance.json] [params=params.yaml] [name=value ...]

The first questions of the task are answered one by one in fp32; then in batches of every size, in other orders and by
both engines, and in the other precisions. A table says how many answers differ and in how many of them the two best
tokens were nearly equal where they part (`near ties`): there the last bits of a float decide. In fp32 nothing else may
differ: exit code 1 if it does. For other precisions flips are counted, of texts and of scores. `out` gets all as JSON.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stage import arguments, checkpoint_folder, exit_on_error, option

if TYPE_CHECKING:
    from molmo_model.config import EvalPrecision, Params, TaskConfig
    from molmo_model.eval.answering import Asking, Question
    from molmo_model.eval.inference import Predictor
    from molmo_model.nn.generation import Said
    from molmo_model.preprocessing.preprocessor import Preprocessor

OPTIONS = {
    "checkpoint": "",
    "task": "",
    "items": "64",
    "sizes": "1,3,8,32",
    "precisions": "bf16,bf16_weights",
    "out": "",
    "params": "params.yaml",
}
SEED = 1
"""Of the orders that are tried."""


@dataclass(frozen=True)
class Way:
    """One way to answer the same questions."""

    engine: str
    precision: str
    size: int
    """Rows of a batch, or slots."""
    order: str
    """`given` or `shuffled`"""


@dataclass(frozen=True)
class Asked:
    """The questions, and what is needed to compare answers to them."""

    ids: Sequence[str]
    questions: "Sequence[Question]"
    references: Sequence[dict[str, Any]]
    asking: "Asking"
    task: "TaskConfig"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = arguments(argv, __doc__)
    if not words:
        return
    with exit_on_error("invariance"):
        from molmo_model.artifacts import write_text_atomic

        document = compared(*_settings(words))
        print(table(document))
        if out := dict(map(option, words)).get("out"):
            write_text_atomic(Path(out), json.dumps(document, indent=2, ensure_ascii=False) + "\n")
            print(f"invariance: written to {out}")
    if document["broken"]:
        print(f"invariance: {document['broken']} answers differ in fp32 and are no near ties", file=sys.stderr)
        sys.exit(1)


def _settings(words: Sequence[str]) -> "tuple[Params, Path, str, int, list[int], list[EvalPrecision]]":
    """The command's options.

    Raises:
        ConfigError: one is missing or wrong.
    """
    from molmo_model.config import EvalPrecision, load_params, lookup
    from molmo_model.errors import ConfigError

    given = OPTIONS | {name: value for name, value in map(option, words) if name in OPTIONS}
    params = load_params(given["params"], [word for word in words if option(word)[0] not in OPTIONS])
    for name in ("checkpoint", "task"):
        if not given[name]:
            raise ConfigError(f"{name}=... is missing: a checkpoint answers the questions of a task")
    sizes = given["sizes"].split(",")
    if not all(number.isdecimal() and int(number) for number in [given["items"], *sizes]):
        raise ConfigError(f"items={given['items']} sizes={given['sizes']}: write whole numbers from 1")
    lookup(params.tasks, given["task"], "task")
    known = {item.value: item for item in EvalPrecision if item is not EvalPrecision.fp32}
    precisions = [lookup(known, name, "precision") for name in given["precisions"].split(",") if name]
    folder = checkpoint_folder(given["checkpoint"])
    return params, folder, given["task"], int(given["items"]), [int(size) for size in sizes], precisions


def compared(
    params: "Params", folder: Path, name: str, count: int, sizes: Sequence[int], precisions: "Sequence[EvalPrecision]"
) -> dict[str, Any]:
    """All answers, compared with those one by one in fp32, as plain JSON.

    Raises:
        ConfigError: the task is not answered greedily.
    """
    from molmo_model.config import EvalPrecision
    from molmo_model.eval.inference import Predictor

    asked = _asked(params, name, count)
    slots = _with_slots(folder, asked.task)
    expected: list[Said] = []
    runs: list[dict[str, Any]] = []
    for precision in (EvalPrecision.fp32, *precisions):
        predictor = Predictor.load(folder, precision)
        shown = predictor.limited(asked.questions, asked.asking)
        for way in _ways(precision.value, sizes, slots):
            found = _answers(way, shown, asked)
            expected = expected or found
            runs.append(asdict(way) | _differences(expected, found, asked, shown.preprocessor))
    return {
        "checkpoint": str(folder),
        "task": name,
        "items": len(asked.ids),
        "device": predictor.model.device.type,
        "runs": runs,
        "broken": sum(run["differing"] - run["near_ties"] for run in runs if run["precision"] == "fp32"),
    }


def _asked(params: "Params", name: str, count: int) -> Asked:
    """The first questions of a task, with their pictures."""
    from dataclasses import replace

    from molmo_model.config import TaskKind
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.errors import ConfigError
    from molmo_model.eval import tasks
    from molmo_model.eval.answering import Asking, Question

    task = params.tasks[name]
    decoding = task.decoding
    if task.kind is not TaskKind.answer or decoding.num_beams != 1 or decoding.do_sample or task.keep_image_tokens != 1:
        raise ConfigError(
            f"tasks.{name} measures, samples, has beams or prunes image tokens: only greedy answers have margins by "
            "which a near tie is known; take another task, or override its decoding"
        )
    reader = ShardReader(f"artifacts/shards/{task.dataset}")
    items = tasks.items(replace(task, max_examples=None), name, reader)[:count]
    return Asked(
        ids=[item.id for item in items],
        questions=[Question(reader.read(item.row), item.conversation) for item in items],
        references=[tasks.references(item) for item in items],
        asking=Asking(task.max_new_tokens, max_crops=task.max_crops, max_frames=task.max_frames),
        task=task,
    )


def _with_slots(folder: Path, task: "TaskConfig") -> bool:
    """Whether the slots can answer; else only `generate` is looked at."""
    from molmo_model.config import Engine, EvalConfig
    from molmo_model.eval.engines import resolved

    return resolved(EvalConfig(engine=Engine.auto), task, folder) is Engine.slots


def _ways(precision: str, sizes: Sequence[int], slots: bool) -> Iterator[Way]:
    """One by one first. In fp32 every size, in other precisions the largest."""
    yield Way("generate", precision, 1, "given")
    tried = [size for size in sizes if size != 1] if precision == "fp32" else [max(sizes)]
    for size in tried:
        yield Way("generate", precision, size, "shuffled")
    for size in sizes if precision == "fp32" else tried:
        if slots:
            yield Way("slots", precision, size, "shuffled")


def _answers(way: Way, predictor: "Predictor", asked: Asked) -> "list[Said]":
    """The answers in the order of the questions."""
    from molmo_model.eval.slot_inference import SlotPredictor

    order = list(range(len(asked.questions)))
    if way.order == "shuffled":
        random.Random(SEED + way.size).shuffle(order)
    found: dict[int, Said] = {}
    if way.engine == "slots":
        ours = SlotPredictor(predictor.model, predictor.preprocessor, predictor.precision)
        ours.batch_size = way.size
        light = [asked.questions[number] for number in order]
        for place, said, _ in ours.said(light, lambda place: light[place], asked.asking, margins=True):
            found[order[place]] = said
    else:
        for start in range(0, len(order), way.size):
            numbers = order[start : start + way.size]
            found |= zip(numbers, _batch(predictor, asked, numbers), strict=True)
    return [found[number] for number in range(len(order))]


def _batch(predictor: "Predictor", asked: Asked, numbers: Sequence[int]) -> "list[Said]":
    """One batch through transformers' `generate`."""
    from molmo_model.nn.generation import greedy
    from molmo_model.preprocessing.collator import collate_prompts

    preprocessor = predictor.preprocessor
    questions = [asked.questions[number] for number in numbers]
    prompts = [preprocessor.encode_prompt(one.example, one.conversation, length=one.length) for one in questions]
    batch = collate_prompts(prompts, preprocessor.config, preprocessor.pad_id)
    with predictor.autocast():
        return greedy(predictor.model, batch, asked.asking.max_new_tokens, [preprocessor.eos_id])


def _differences(
    expected: "Sequence[Said]", found: "Sequence[Said]", asked: Asked, preprocessor: "Preprocessor"
) -> dict[str, Any]:
    """How many answers differ, where, and by how little."""
    from molmo_model.nn.generation import differences

    apart = differences(expected, found)
    pairs = zip(expected, found, strict=True)
    texts = [(preprocessor.decode(one.tokens), preprocessor.decode(other.tokens)) for one, other in pairs]
    return {
        "differing": len(apart),
        "near_ties": sum(one.near_tie for one in apart),
        "text_flips": sum(one != other for one, other in texts),
        "score_flips": _score_flips(asked, texts),
        "differences": [
            {
                "id": asked.ids[one.row],
                "place": one.place,
                "margin": one.margin,
                "near_tie": one.near_tie,
                "texts": list(texts[one.row]),
            }
            for one in apart
        ],
    }


def _score_flips(asked: Asked, texts: Sequence[tuple[str, str]]) -> int | None:
    """Items whose score is another one; None for a metric that scores all items together."""
    from molmo_model.config import lookup
    from molmo_model.eval.metrics import METRICS

    metric = lookup(METRICS, asked.task.metric, "metric")
    if metric.score_all is not None:
        return None
    return sum(
        metric.score(one, references).values != metric.score(other, references).values
        for (one, other), references in zip(texts, asked.references, strict=True)
        if one != other
    )


def table(document: dict[str, Any]) -> str:
    """For people."""
    head = ("engine", "precision", "size", "order", "differing", "near ties", "text flips", "score flips")
    rows = [head]
    for run in document["runs"]:
        flips = "-" if run["score_flips"] is None else str(run["score_flips"])
        numbers = [str(run[name]) for name in ("differing", "near_ties", "text_flips")]
        rows.append((run["engine"], run["precision"], str(run["size"]), run["order"], *numbers, flips))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = f"{document['items']} answers of {document['checkpoint']} in {document['task']} on {document['device']}"
    return "\n".join([f"{title}, against one by one in fp32", *lines, *_listed(document)])


def _listed(document: dict[str, Any]) -> Iterator[str]:
    """What differs in fp32, answer by answer."""
    for run in document["runs"]:
        for one in run["differences"] if run["precision"] == "fp32" else ():
            kind = "near tie" if one["near_tie"] else "DIFFERENT"
            where = f"{run['engine']} {run['size']}: {one['id']} token {one['place']}, margin {one['margin']:.2g}"
            yield f"{kind}: {where}: {' / '.join(map(repr, one['texts']))}"


if __name__ == "__main__":
    main()
