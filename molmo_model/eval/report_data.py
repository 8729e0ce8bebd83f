"""What the report's page is made of: numbers, comparisons, lineage and cards, as plain JSON for its script.

The page parses the part about numbers at once and the cards of a task when they are looked at; pictures come once each,
however many tasks and checkpoints show them. Texts and pictures have budgets, so that the page stays small.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from molmo_model.artifacts import canonical_json
from molmo_model.data.example import Example
from molmo_model.eval import cards, standings
from molmo_model.eval.comparison import Column, Comparison, column, holm
from molmo_model.eval.pictures import Album, stills
from molmo_model.eval.standings import Group, Reading

PICTURE_BUDGET = 8_500_000
"""Characters of all pictures of a page together."""
TEXT_BUDGET = 5_500_000
"""Bytes of all cards of a page together, without pictures."""
SHORTEST_TEXT = 40
"""Characters below which no text is shortened further."""
NAMED = 4
"""Wins, and losses, that are named of each pair of checkpoints in each task."""
LONGEST_NAME = 80
"""Characters of a judge's name."""
LONGEST_PARAMS = 20_000
"""Characters that are shown of one param or one run's params."""


@dataclass(frozen=True)
class Lineage:
    """What one number was made from: digests of artefacts and code, and the params by dotted path."""

    predictions: str
    metrics: str
    weights: str
    """Digest of the checkpoint."""
    shards: str
    code: str
    params: dict[str, Any]


@dataclass(frozen=True)
class Training:
    """What the checkpoints of one run were made from."""

    digest: str
    code: str
    inputs: Mapping[str, str]
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint's result in one task."""

    metrics: Mapping[str, Any]
    """`metrics.json`, as the scorecard holds it."""
    lineage: Lineage
    predictions: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    """Rows of `scores.jsonl`, in the order of the predictions."""


@dataclass(frozen=True)
class DataSource:
    """One dataset behind the numbers, and what uses it."""

    dataset: str
    summary: Mapping[str, Any]
    """Of its shards' manifest: licence, source, revision, card, counts; what an older artefact lacks is left out."""
    runs: Sequence[str] = ()
    """Runs that were trained on it."""
    tasks: Sequence[str] = ()
    """Tasks that ask about it."""


@dataclass(frozen=True)
class Inputs:
    """Everything a report is made from."""

    results: Mapping[str, Mapping[str, Evaluated]]
    """By task, then by checkpoint, both in the order shown."""
    losses: Mapping[str, Sequence[tuple[int, float]]]
    """Training loss by run: (step, loss)."""
    example: Callable[[str, int], Example]
    """An example by dataset and row of its index."""
    confidence: float
    examples: int
    """Cards per task."""
    checkpoints: Sequence[str]
    training: Mapping[str, Training] = field(default_factory=dict)
    """The runs shown, for lineage."""
    data: Sequence[DataSource] = ()


@dataclass(frozen=True)
class TaskResult:
    """One task's results with what follows from them."""

    name: str
    results: Mapping[str, Evaluated]
    confidence: float

    @property
    def primary(self) -> str:
        return str(self._last.metrics["primary"])

    @property
    def _last(self) -> Evaluated:
        return list(self.results.values())[-1]

    @cached_property
    def reading(self) -> Reading:
        return Reading.of(self._last.metrics, self.primary)

    @cached_property
    def item_score(self) -> str:
        """The score per item that stands for the primary number: itself, or where it is made of means, the first."""
        named = [name for row in self._last.scores for name in row["scores"]]
        return self.primary if self.primary in named or not named else named[0]

    @cached_property
    def item_reading(self) -> Reading:
        return Reading.of(self._last.metrics, self.item_score)

    @cached_property
    def scores(self) -> list[list[float | None]]:
        """Per checkpoint, per item; None where the number does not apply to the item."""
        name = self.item_score
        return [[row["scores"].get(name) for row in result.scores] for result in self.results.values()]

    @property
    def estimates(self) -> list[Mapping[str, Any]]:
        """The primary number of each checkpoint."""
        return [result.metrics["metrics"][self.primary] for result in self.results.values()]

    @cached_property
    def columns(self) -> list[Column]:
        """The scores per item of each checkpoint, ready to be compared."""
        name = self.item_score
        return [column(one.metrics, one.predictions, one.scores, name) for one in self.results.values()]

    @cached_property
    def pairs(self) -> dict[tuple[int, int], Comparison]:
        return standings.pairs(self.columns, self.confidence, NAMED)

    @cached_property
    def best(self) -> list[bool]:
        """Which checkpoints are the best or level with it."""
        means = [item["mean"] for item in self.estimates]
        p_values = {pair: one.paired.p_value for pair, one in self.pairs.items()}
        return standings.level_with_best(means, p_values, self.reading.lower_is_better, self.confidence)

    @property
    def can_be_averaged(self) -> bool:
        """Its number is a percentage per item where more is better: the scale on which tasks can be averaged."""
        return self.reading.percent and not self.reading.lower_is_better and self.item_score == self.primary

    @property
    def baseline(self) -> float | None:
        """The primary number of the one answer that a model without eyes would always give."""
        numbers = (self._last.metrics.get("baseline") or {}).get("metrics") or {}
        return numbers[self.primary]["mean"] if self.primary in numbers else None


def groups(tasks: Sequence[TaskResult], confidence: float) -> list[Group]:
    """The average of all tasks, then of every group that the tasks name, in the order in which they do."""
    members: dict[str, list[TaskResult]] = {"all tasks": list(tasks)}
    for task in tasks:
        for name in list(task.results.values())[-1].metrics.get("groups") or ():
            members.setdefault(name, []).append(task)
    found = (
        standings.group(name, {one.name: one.columns if one.can_be_averaged else None for one in inside}, confidence)
        for name, inside in members.items()
    )
    return [one for one in found if one is not None]


# --- numbers


def numbers(inputs: Inputs, tasks: Sequence[TaskResult], colours: Mapping[str, int]) -> dict[str, Any]:
    """Everything of the page but its cards."""
    shared: list[Any] = []
    return {
        "params": shared,
        "checkpoints": [
            {"name": name, "run": run, "step": int(step), "colour": colours[run] % 6}
            for name in inputs.checkpoints
            for run, _, step in [name.partition("/step-")]
        ],
        "confidence": inputs.confidence,
        "tasks": [_task(task, shared) for task in tasks],
        "pairs": _pairs(inputs, tasks),
        "runs": {
            run: {
                "digest": training.digest,
                "code": training.code,
                "inputs": dict(training.inputs),
                "params": [(name, _param(value)) for name, value in sorted(training.params.items())],
            }
            for run, training in inputs.training.items()
        },
    }


def _task(task: TaskResult, shared: list[Any]) -> dict[str, Any]:
    last = list(task.results.values())[-1].metrics
    baseline = last.get("baseline") or {"answer": None, "rule": None, "metrics": {}}
    return {
        "name": task.name,
        "metric": last["metric"],
        "primary": task.primary,
        "item": task.item_score,
        "outputs": {
            name: {"definition": reading.definition, "lower": reading.lower_is_better, "percent": reading.percent}
            for name in dict.fromkeys([*last["metrics"], task.item_score])
            for reading in [Reading.of(last, name)]
        },
        "unbounded": task.item_reading.upper is None,
        "upper": task.item_reading.upper,
        "citation": last["citation"],
        "also": list(last.get("also") or ()),
        "groups": list(last.get("groups") or ()),
        "baseline": {
            "answer": None if baseline["answer"] is None else cards.shorten(str(baseline["answer"])),
            "rule": baseline["rule"],
            "metrics": {name: _estimate(value) for name, value in baseline["metrics"].items()},
        },
        "n": last["metrics"][task.primary]["n"],
        "items": len(list(task.results.values())[-1].scores),
        "results": [_result(task, checkpoint, result, shared) for checkpoint, result in task.results.items()],
        "slices": _slices(task),
    }


def _result(task: TaskResult, checkpoint: str, result: Evaluated, shared: list[Any]) -> dict[str, Any]:
    """One checkpoint's numbers in one task, and where they come from."""
    right = [task.item_reading.right(score) for score in task.scores[list(task.results).index(checkpoint)]]
    lineage, judged = result.lineage, result.metrics.get("judged")
    return {
        "metrics": {name: _estimate(value) for name, value in result.metrics["metrics"].items()},
        "unparsed": result.metrics["unparsed"],
        "cut": sum(row["finish_reason"] == "length" for row in result.predictions),
        "wrong": sum(one is False for one in right),
        "judged": judged and {**judged, "judge": cards.shorten(str(judged["judge"]), LONGEST_NAME)},
        "lineage": {
            "predictions": lineage.predictions,
            "metrics": lineage.metrics,
            "weights": lineage.weights,
            "shards": lineage.shards,
            "code": lineage.code,
            "params": _shared(shared, [(name, _param(value)) for name, value in sorted(lineage.params.items())]),
        },
    }


def _shared(values: list[Any], value: Any) -> int:
    """The place of a value in a list that has each once: most checkpoints were asked with the same params."""
    if value not in values:
        values.append(value)
    return values.index(value)


def _estimate(value: Mapping[str, Any]) -> list[float]:
    return [value[name] for name in ("mean", "stderr", "low", "high", "n")]


def _param(value: Any) -> str:
    return cards.shorten(canonical_json(value), LONGEST_PARAMS)


def _slices(task: TaskResult) -> list[dict[str, Any]]:
    """One row per slice: its primary number for every checkpoint, None where it has none."""
    rows: dict[tuple[str, str], list[list[float] | None]] = {}
    for number, result in enumerate(task.results.values()):
        for one in result.metrics.get("slices") or ():
            key = str(one["by"]), str(one["value"])
            if task.primary in one["metrics"]:
                row = rows.setdefault(key, [None] * len(task.results))
                row[number] = [one["metrics"][task.primary][name] for name in ("mean", "low", "high", "n")]
    return [{"by": by, "value": cards.shorten(value), "results": row} for (by, value), row in rows.items()]


def _pairs(inputs: Inputs, tasks: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Every pair of checkpoints: per task the difference of the second from the first, and Holm's p-value over tasks.

    `tasks` of a pair has [difference, low, high, p, Holm's p, wins, losses, n, ids of wins, ids of losses].
    """
    found = []
    for first in range(len(inputs.checkpoints)):
        for second in range(first + 1, len(inputs.checkpoints)):
            row = [task.pairs[first, second] for task in tasks]
            adjusted = holm([one.paired.p_value for one in row])
            found.append({"a": first, "b": second, "tasks": list(map(_compared, row, adjusted))})
    return found


def _compared(one: Comparison, adjusted: float) -> list[Any]:
    pair = one.paired
    shown = (round(value, 6) for value in (pair.difference, pair.low, pair.high))
    chances = (float(f"{value:.3g}") for value in (pair.p_value, adjusted))
    return [*shown, *chances, pair.wins, pair.losses, pair.n, one.wins, one.losses]


# --- cards


def all_cards(inputs: Inputs, tasks: Sequence[TaskResult]) -> tuple[list[list[dict[str, Any]]], list[list[str]]]:
    """The cards of every task, and the pictures that a task is the first to show, as data URIs.

    A picture of a card has the number of that task and its number there, as `at`.
    """
    album, chosen = Album(PICTURE_BUDGET, len(tasks) * inputs.examples), []
    for task in tasks:
        rows = next(iter(task.results.values())).predictions
        shown = []
        for index in choose(task, inputs.examples):
            place = rows[index]["image"]
            found = list(stills(inputs.example(place["dataset"], place["row"])))
            for still in found:
                album.add(still)
            shown.append((index, [still.without_data() for still in found]))
        chosen.append(shown)
    longest = cards.LONGEST_TEXT
    while True:
        made = [
            [
                cards.make(
                    [result.predictions[index] for result in task.results.values()],
                    [result.scores[index] for result in task.results.values()],
                    task.item_score,
                    pictures,
                    longest,
                )
                for index, pictures in shown
            ]
            for task, shown in zip(tasks, chosen, strict=True)
        ]
        size = sum(len(canonical_json(task).encode("utf-8", "replace")) for task in made)
        if size <= TEXT_BUDGET or longest <= SHORTEST_TEXT:
            return made, _placed(made, album)
        longest = max(SHORTEST_TEXT, min(longest // 2, longest * TEXT_BUDGET // size))


def choose(task: TaskResult, wanted: int) -> list[int]:
    """Numbers of the items that become cards: failures of the last checkpoint, unread answers, wins and losses."""
    reading, last = task.item_reading, list(task.results.values())[-1]
    goodness = [_goodness(reading, score) for score in task.scores[-1]]
    unparsed = [index for index, row in enumerate(last.scores) if not row["parsed"]]
    numbers = {row["id"]: index for index, row in enumerate(last.predictions)}
    changed = chain.from_iterable(
        (*one.losses[rank : rank + 1], *one.wins[rank : rank + 1])
        for rank in range(NAMED)
        for one in reversed(task.pairs.values())
    )
    return cards.choose(goodness, wanted, unparsed, [numbers[name] for name in dict.fromkeys(changed)])


def _goodness(reading: Reading, score: float | None) -> float:
    """1 where a score is as good as can be, less otherwise."""
    if score is None or reading.right(score):
        return 1.0
    if reading.upper is None:
        return -score if reading.lower_is_better else score / (1.0 + abs(score))
    share = score / reading.upper
    return 1.0 - share if reading.lower_is_better else share


def _placed(made: Sequence[Sequence[dict[str, Any]]], album: Album) -> list[list[str]]:
    """Gives every picture of the cards its place instead of its key."""
    data, places = album.data(), dict[str, tuple[int, int]]()
    pictures: list[list[str]] = [[] for _ in made]
    for number, task in enumerate(made):
        for picture in (picture for card in task for picture in card["pictures"]):
            key = picture.pop("key")
            if key not in places:
                places[key] = number, len(pictures[number])
                pictures[number].append(data[key])
            picture["at"] = places[key]
    return pictures


def data_source(source: DataSource) -> dict[str, Any]:
    """What the page and `report.json` say of a dataset; None where its shards do not say."""
    counts = source.summary.get("examples") or {}
    facts = ("licence", "source", "revision", "card", "bad_rows", "missing_downloads")
    return {
        "dataset": source.dataset,
        **{name: source.summary.get(name) for name in facts},
        "train": counts.get("train"),
        "eval": counts.get("eval"),
        "runs": list(source.runs),
        "tasks": list(source.tasks),
    }


def facts(group: Group) -> dict[str, Any]:
    """A group's averages for `report.json`."""
    return {
        "group": group.name,
        "tasks": list(group.tasks),
        "left_out": list(group.left_out),
        "averages": [{name: round(value, 6) for name, value in asdict(one).items()} for one in group.averages],
        "best": list(group.best),
    }
