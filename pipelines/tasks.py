"""Lists the evaluation sets of the field, writes tasks of them for `params.yaml`, and checks the tasks that are there.

usage: python -m pipelines.tasks [group=GROUP] [NAME ...] [out=FILE] [crops=36|own]
       python -m pipelines.tasks check [params=params.yaml] [task=NAME]
       python -m pipelines.tasks page [check=true]

(nothing)  lists the sets: name, title, family of datasets, metric, new tokens, groups
group      writes the sections `datasets:` and `tasks:` of a group's sets, NAME those of single sets, as an overlay that
           `python -m pipelines.recipe FILE` merges into params.yaml; several groups as group=paper,video
out        the file; without it the overlay is printed
crops      most crops of a picture for sets of the group high_res, as Molmo's published numbers have it; own: the
           checkpoint's
check      asks of every task of the params whether its dataset's shards have such conversations, whether the metrics
           fit their references and whether its slices exist: before hours of answers
page       writes docs/tasks.md; with check=true fails where it is not what the table says

Not a stage: writes no artefact. Exit codes: 0 done, 1 the page is out of date, 2 refused with a message.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stage import exit_on_error, option

if TYPE_CHECKING:
    from molmo_model.benchmarks import Benchmark
    from molmo_model.config import Params

PAGE = Path("docs/tasks.md")
TRAINING_EXAMPLES = 500
"""Of each dataset that is only evaluated: what the most frequent training answer is taken from."""
OPTIONS = ("group", "out", "crops", "params", "task", "check")
INTRODUCTION = """\
# Evaluation sets

Written from the table in `molmo_model/benchmarks.py` by `python -m pipelines.tasks page`; edit the table, not this
page.

A task that names a row asks and scores as the row says, and what it says itself stands over it:

```yaml
datasets:
  doc_qa: {family: doc_qa}
tasks:
  documents: {benchmark: doc_qa, dataset: doc_qa, max_examples: 500}
```

`python -m pipelines.tasks group=paper out=paper.yaml` writes such sections for a group, and
`python -m pipelines.recipe paper.yaml` merges them into `params.yaml`. Sets that no program may fetch say what to do
when their shards are made ([datasets](datasets.md)). What the metrics are: [metrics](metrics.md).

| group | what it is |
| --- | --- |
"""
HEAD = ("row", "set", "family and options", "metric", "new tokens", "groups", "sliced by", "source")


def parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words and options of a command line.

    Raises:
        ConfigError: an unknown option, or one given twice.
    """
    from molmo_model.config import lookup
    from molmo_model.errors import ConfigError

    words, options = [], dict[str, str]()
    for argument in argv:
        name, value = option(argument)
        if "=" not in argument:
            words.append(argument)
            continue
        lookup(dict.fromkeys(OPTIONS), name, "option of pipelines.tasks")
        if name in options or not value:
            raise ConfigError(f"{argument!r}: every option is given once, and with a value")
        options[name] = value
    return words, options


def chosen(names: Iterable[str], groups: Iterable[str]) -> "dict[str, Benchmark]":
    """The rows of the given names and groups, in the order of the table.

    Raises:
        ConfigError: there is no such row or group; names one that is alike.
    """
    from molmo_model.benchmarks import BENCHMARKS, GROUPS
    from molmo_model.config import lookup

    for name in names:
        lookup(BENCHMARKS, name, "evaluation set")
    for group in groups:
        lookup(GROUPS, group, "group of evaluation sets")
    return {name: row for name, row in BENCHMARKS.items() if name in set(names) or set(row.groups) & set(groups)}


def overlay(rows: "Mapping[str, Benchmark]", crops: int | None) -> dict[str, Any]:
    """The sections `datasets` and `tasks` for rows; rows with the same family and options share a dataset.

    Args:
        crops: `max_crops` of rows of the group `high_res`; None leaves it to the checkpoint.
    """
    datasets, tasks = dict[str, Any](), dict[str, Any]()
    for name, row in rows.items():
        dataset = _dataset(row)
        options = {"options": dict(row.options)} if row.options else {}
        datasets[dataset] = {"family": row.family, **options, "train_examples": TRAINING_EXAMPLES}
        high = {"max_crops": crops} if crops is not None and "high_res" in row.groups else {}
        tasks[name] = {"benchmark": name, "dataset": dataset, **high}
    return {"datasets": datasets, "tasks": tasks}


def _dataset(row: "Benchmark") -> str:
    """The first row of the table that asks the same questions names them; not as one that a run trains on."""
    from molmo_model.benchmarks import BENCHMARKS

    same = (name for name, one in BENCHMARKS.items() if (one.family, one.options) == (row.family, row.options))
    return f"{next(same)}_eval"


def written(rows: "Mapping[str, Benchmark]", crops: int | None) -> str:
    """The overlay as YAML, with what it is."""
    import yaml

    text = yaml.safe_dump(overlay(rows, crops), sort_keys=False, default_flow_style=None, width=120)
    titles = "".join(f"#   {name}: {row.title}\n" for name, row in rows.items())
    return f"# Evaluation sets, for `python -m pipelines.recipe`; docs/tasks.md has their settings.\n{titles}{text}"


def listing(rows: "Mapping[str, Benchmark]") -> str:
    """A line for each row."""
    lines = [("name", "set", "family", "metric", "new tokens", "groups")]
    lines += [
        (name, row.title, row.family, row.metric, str(row.max_new_tokens), ", ".join(row.groups))
        for name, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def page() -> str:
    """`docs/tasks.md`."""
    from molmo_model.benchmarks import BENCHMARKS, GROUPS

    groups = "".join(
        f"| `{name}` | {about}: {', '.join(row for row, one in BENCHMARKS.items() if name in one.groups)} |\n"
        for name, about in GROUPS.items()
    )
    head = f"\n| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}\n"
    return INTRODUCTION + groups + head + "".join(_line(name, row) for name, row in BENCHMARKS.items())


def _line(name: str, row: "Benchmark") -> str:
    options = ", ".join(f"{key}: {value}" for key, value in row.options.items())
    metrics = ", ".join(f"[{one}](metrics.md#{one})" for one in (row.metric, *row.also))
    tokens = "none" if row.task.get("kind") == "loss" else str(row.max_new_tokens)
    cells = (
        f"`{name}`",
        row.title,
        f"`{row.family}`" + (f" {options}" if options else ""),
        metrics + (f"; file for the test server: {row.submission}" if row.submission else ""),
        tokens,
        ", ".join(row.groups) or "-",
        ", ".join(row.task.get("slices", ())) or "-",
        row.source,
    )
    return f"| {' | '.join(cells)} |\n"


def check(params: "Params", names: Sequence[str] = (), shards: str | Path = "artifacts/shards") -> list[str]:
    """One line for every task whose shards are there: how many of its first questions its metrics can score.

    Args:
        names: tasks; none are all.
        shards: folder of the datasets' shards.

    Raises:
        ConfigError: a name that no task, metric or slice has, or metrics of another kind than the task.
        EvaluationError: no such conversations, or references that a metric cannot read; names task, metric and item.
    """
    from molmo_model.config import lookup
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval.fitting import check_task

    lines = []
    for name in names or params.tasks:
        task = lookup(params.tasks, name, "task")
        folder = Path(shards) / task.dataset
        if not (folder / "manifest.json").is_file():
            lines.append(f"{name}: not checked, there are no shards in {folder}; run the shards stage")
            continue
        asked = check_task(task, name, ShardReader(folder))
        lines.append(f"{name}: {', '.join([task.metric, *task.also])} can score the {asked} questions looked at")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m pipelines.tasks`."""
    words, options = parse(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print((__doc__ or "").strip())
        return 0
    if words[:1] == ["page"]:
        return _page(options)
    if words[:1] == ["check"]:
        from molmo_model.config import load_params

        print(
            "\n".join(check(load_params(options.get("params", "params.yaml")), [*filter(None, [options.get("task")])]))
        )
        return 0
    groups = options["group"].split(",") if "group" in options else []
    if not words and not groups:
        print(_all())
        return 0
    text = written(chosen(words, groups), _crops(options.get("crops")))
    if "out" not in options:
        print(text, end="")
        return 0
    Path(options["out"]).write_text(text, encoding="utf-8")
    print(f"{options['out']}: merge it with `python -m pipelines.recipe {options['out']}`")
    return 0


def _all() -> str:
    from molmo_model.benchmarks import BENCHMARKS

    return listing(BENCHMARKS)


def _crops(value: str | None) -> int | None:
    from molmo_model.benchmarks import HIGH_RES_CROPS
    from molmo_model.errors import ConfigError

    if value is None or value == "own":
        return HIGH_RES_CROPS if value is None else None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"crops is {value!r}; it must be a whole number of at least 1, or own")
    return int(value)


def _page(options: Mapping[str, str]) -> int:
    before, after = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "", page()
    if after == before:
        return 0
    if options.get("check", "false") == "true":
        print(f"{PAGE} is out of date; write it with `python -m pipelines.tasks page`", file=sys.stderr)
        return 1
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    with exit_on_error("tasks"):
        sys.exit(main())
