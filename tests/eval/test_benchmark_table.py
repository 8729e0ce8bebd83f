"""Every row of the table of evaluation sets: what it names exists, and a copy of the set in the published layout can be
read, asked and scored, where the reference as the answer has the full score."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
import pytest

from molmo_model.benchmarks import BENCHMARKS, GROUPS, Benchmark
from molmo_model.config import DatasetConfig, params_from_dict
from molmo_model.data.datasets import FAMILIES
from molmo_model.data.datasets.options import parse_options
from molmo_model.data.example import BadRow
from molmo_model.eval import predictions, tasks
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.slices import slices
from molmo_model.preprocessing import prompts
from tests.eval import published_sets


class Agreeing:
    """A judge to whom every caption is perfect."""

    name, asked, missing = "agreeing", 0, 0

    def ask(self, asked: Sequence[str]) -> list[str | None]:
        return [self._answer(prompt) for prompt in asked]

    @staticmethod
    def _answer(prompt: str) -> str:
        if "Yes or No" in prompt:
            return "No"
        for word in ("Stated", "Consistent"):
            if f"the words {word}" in prompt or f"words\n{word}" in prompt:
                return f"1. {word}\n2. {word}"
        return "1. There are cups.\n2. They are two."


def items_of(row: Benchmark, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tasks.Item]:
    """What a task of the row asks of the copy."""
    settings = {"path": str(folder)} | published_sets.write(row.family, folder, monkeypatch)
    config = DatasetConfig(family=row.family, options=dict(row.options), **settings)
    found = list(FAMILIES[row.family].make(config, 0))
    assert not [one for _, one in found if isinstance(one, BadRow)]
    return [
        tasks.Item(place, tasks.light(example), tuple(file.sha256 for file in example.files), number)
        for place, (side, example) in enumerate(found)
        for number, talk in enumerate(example.conversations)
        if side == "eval" and (not row.styles or talk.style in row.styles)
    ]


def row_of(item: tasks.Item, answer: str) -> dict[str, object]:
    return {
        "id": item.id,
        "example_id": item.example.id,
        "conversation": item.conversation,
        "style": item.asked.style,
        "prompt": "".join(prompts.asked(item.asked, prompts.PromptFormat())),
        "prediction": answer,
        "references": tasks.references(item),
        "finish_reason": "stop",
        "tokens": 1,
        "prompt_tokens": 1,
        "image": {"dataset": "d", "row": item.row, "sha256": list(item.images)},
    }


@pytest.mark.parametrize("name", [name for name, row in BENCHMARKS.items() if row.submission is None])
def test_a_row_can_be_read_asked_and_scored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = BENCHMARKS[name]
    items = items_of(row, tmp_path, monkeypatch)
    assert items, "no question of the copy is asked"
    assert not row.styles or {item.asked.style for item in items} == set(row.styles)
    rows = [row_of(item, str(tasks.references(item)["answer"])) for item in items]
    predictions.check(rows, name)
    list(slices(rows, row.task.get("slices", ())))
    for one in (row.metric, *row.also):
        metric = METRICS[one]
        facts = {"measured": {"nll": 0.0, "tokens": 3, "right": 3}} if metric.measured else {}
        said = [(str(one["prediction"]), {**one["references"], **facts}) for one in rows]
        if metric.score_all is not None:
            scores = metric.score_all(said, Agreeing())
        else:
            scores = [metric.score(answer, references) for answer, references in said]
        best = 0.0 if metric.output(metric.primary).lower_is_better else 1.0
        for score, (answer, references) in zip(scores, said, strict=True):
            assert score.values[metric.primary] == best, (answer, references, score)
            assert score.parsed, (answer, score)
        if not (metric.judged or metric.measured):
            assert isinstance(metric.constant([references for _, references in said]), str)


def test_the_table_names_what_there_is() -> None:
    for name, row in BENCHMARKS.items():
        assert row.title and row.source and row.family in FAMILIES, name
        parse_options(FAMILIES[row.family].options, DatasetConfig(family=row.family, options=dict(row.options)))
    assert {group for row in BENCHMARKS.values() for group in row.groups} == set(GROUPS)
    paper = [name for name, row in BENCHMARKS.items() if "paper" in row.groups]
    assert len(paper) == 11


def test_a_task_of_a_row_is_valid_and_its_own_values_stand_over_the_row() -> None:
    datasets = {name: {"family": row.family, "options": dict(row.options)} for name, row in BENCHMARKS.items()}
    tasks_ = {name: {"benchmark": name, "dataset": name} for name in BENCHMARKS}
    own = {f"{name}-own": {**task, "styles": ["x"], "max_new_tokens": 7} for name, task in tasks_.items()}
    params = params_from_dict({"version": 2, "datasets": datasets, "tasks": tasks_ | own}, "here")
    for name, row in BENCHMARKS.items():
        task, mine = params.tasks[name], params.tasks[f"{name}-own"]
        assert (task.metric, task.max_new_tokens) == (row.metric, row.max_new_tokens)
        assert (tuple(task.styles), tuple(task.groups), tuple(task.also)) == (row.styles, row.groups, row.also)
        assert task.kind == row.task.get("kind", "answer") and task.slices == list(row.task.get("slices", []))
        assert (mine.styles, mine.max_new_tokens, mine.metric) == (["x"], 7, row.metric)


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("mmiu", {"output": "G"}, "output"),  # as some published rows have it
        ("mmiu", {"options": "A: cup\nC: dog"}, "options"),
        ("mmiu", {"input_image_path": ["./Low/x/99.png"]}, "input_image_path[0]"),
        ("egoschema", {"answer": "7"}, "option"),
    ],
)
def test_rows_that_are_not_as_published_are_told(
    family: str, changes: dict[str, object], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_sets.write(family, tmp_path, monkeypatch)
    (table,) = [path for path in tmp_path.rglob("*.parquet") if not path.name.startswith("train")]
    published_sets.table(table, [pyarrow.parquet.read_table(table).to_pylist()[0] | changes])
    found = list(FAMILIES[family].make(DatasetConfig(family=family, path=str(tmp_path)), 0))
    assert [one.field for _, one in found if isinstance(one, BadRow)] == [field]
    assert len(found) == 1
