"""Writes a page that shows a dataset as the model gets it: crops, tokens with their loss, points, mixture, histograms.

usage: python -m pipelines.visualize dataset=NAME [run=NAME] [model=NAME] [split=train] [examples=12] [id=ID ...]
                                     [out=FILE] [params=params.yaml] [section.key=value ...]

dataset   a dataset whose shards are there (python -m pipelines.shards dataset=NAME)
run       shows the first examples of the dataset that this run draws, with the prompts, order and changes of their
          place in the run's stream, exactly as training gets them; and the run's mixture and packs. Its mixture must be
          there (python -m pipelines.mixture run=NAME)
model     without a run: the assembled model whose preprocessing is used; the first of the params
split     without a run: train or eval; train, or eval where nothing is for training
examples  how many are drawn on the page
id        an example by its id; several may be given
out       the page; artifacts/looks/NAME.html, or NAME-RUN.html

An example that the model's preprocessing refuses is shown with the reason, and counted.

examples:
  python -m pipelines.visualize dataset=digit_scenes
  python -m pipelines.visualize dataset=charts run=sft examples=30

Not a stage: the page belongs to nothing and may be deleted. Exit codes: 0 written, 2 refused with a message.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.errors import ArtifactError, ConfigError, DataError
from pipelines.stage import arguments, exit_on_error, option

if TYPE_CHECKING:
    from molmo_model.data.plan import Plan
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval.dataset_page import Shown
    from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor

OPTIONS = ("dataset", "run", "model", "split", "examples", "out", "params")
LOOKS = Path("artifacts/looks")
SAMPLE = 2000
"""Examples whose costs make the histograms where no run names them all."""
PACKS = 500
"""Packs of the run whose fill is shown."""
SEARCHED = 200_000
"""Positions of a run's stream that are searched for examples of the dataset."""
SHOWN_PROBLEMS = 100


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    if not (argv := arguments(argv, __doc__)):
        return
    from molmo_model.config import load_params

    with exit_on_error("visualize"):
        options, ids, overrides = parse(argv)
        params = load_params(options.get("params", "params.yaml"), overrides)
        print(f"the page: {write(params, options, ids)}")


def parse(argv: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Options, ids, and overrides of the params.

    Raises:
        ConfigError: an option is missing, empty, repeated or out of range.
    """
    options: dict[str, str] = {}
    ids, overrides = [], []
    for argument in argv:
        name, value = option(argument)
        if name == "id" and value:
            ids.append(value)
        elif name in options:
            raise ConfigError(f"{name}= is given twice")
        elif name in OPTIONS:
            if not value:
                raise ConfigError(f"{name}= is empty")
            options[name] = value
        elif "." in name:
            overrides.append(argument)
        else:
            raise ConfigError(f"{argument!r} is no option; known: {', '.join(f'{o}=' for o in (*OPTIONS, 'id'))}")
    if "dataset" not in options:
        raise ConfigError("dataset= is missing; --help shows the usage")
    examples = options.setdefault("examples", "12")
    if not examples.isdecimal() or int(examples) < 1:
        raise ConfigError(f"examples={examples} must be a whole number of at least 1")
    for given in ("model", "split"):
        if "run" in options and given in options:
            raise ConfigError(f"{given}= stands beside run=, which decides it; leave one out")
    return options, ids, overrides


def write(params: Any, options: dict[str, str], ids: Sequence[str]) -> Path:
    """Writes the page and returns its place.

    Raises:
        MolmoError: a name is unknown, an artefact is missing, or an example cannot be read.
    """
    from molmo_model.config import lookup, model_of
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval.dataset_page import Page, render
    from molmo_model.preprocessing.preprocessor import Preprocessor
    from pipelines.validate import read_problems

    name = options["dataset"]
    lookup(params.datasets, name, "dataset")
    reader = ShardReader(f"artifacts/shards/{name}")
    run = options.get("run")
    if run is None:
        if not params.models:
            raise ConfigError("the params name no model, whose preprocessing decides what the page shows; add one")
        model = options.get("model", next(iter(params.models)))
        lookup(params.models, model, "model")
        start = Path("artifacts/checkpoints") / model / "step-000000"
    else:
        lookup(params.runs, run, "run")
        start = Path("artifacts/checkpoints") / model_of(params, run) / "step-000000"
    preprocessor = Preprocessor.from_pretrained(start)
    plan = None if run is None else _plan(params, run, name)
    packs = 0 if run is None else params.runs[run].train.steps * params.runs[run].train.packs_per_step
    shown = list(itertools.islice(_shown(plan, reader, preprocessor, options, ids), int(options["examples"])))
    charts, refused = _charts(plan, reader, preprocessor, packs)
    listed = Path(reader.path) / "problems.jsonl"
    problems = read_problems(listed.parent) if listed.exists() else []
    page = Page(
        dataset=name,
        facts=_facts(reader, run, start) | refused,
        problems=problems[:SHOWN_PROBLEMS],
        entries=[] if plan is None else _entries(plan),
        charts=charts,
    )
    out = Path(options.get("out", LOOKS / f"{name}{'' if run is None else f'-{run}'}.html"))
    text = render(page, shown, preprocessor)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}") from error
    return out


def _plan(params: Any, run: str, dataset: str) -> "Plan":
    from molmo_model.config import drawn_datasets
    from molmo_model.data.plan import Plan

    drawn = drawn_datasets(params, run)
    if dataset not in drawn:
        raise ConfigError(f"run {run!r} draws nothing of dataset {dataset!r}; it draws from {', '.join(drawn)}")
    shards = {name: f"artifacts/shards/{name}" for name in drawn}
    return Plan.load(f"artifacts/mixture/{run}", shards, params.runs[run].train)


def _shown(
    plan: "Plan | None",
    reader: "ShardReader",
    preprocessor: "Preprocessor",
    options: dict[str, str],
    ids: Sequence[str],
) -> "Iterator[Shown]":
    from molmo_model.eval.cards import spread
    from molmo_model.eval.dataset_page import Shown

    names = reader.index["id"].to_pylist()
    if missing := sorted(set(ids) - set(names)):
        raise DataError(f"dataset {options['dataset']!r} has no example {', '.join(map(repr, missing))}")
    if plan is not None:
        yield from _drawn(plan, preprocessor, options["dataset"], set(ids))
        return
    split = options.get("split") or ("train" if reader.rows("train") else "eval")
    rows = [names.index(one) for one in ids] if ids else spread(reader.rows(split), int(options["examples"]))
    splits = reader.index["split"].to_pylist()
    for row in rows:
        example = reader.read(row)
        encoded = _or_error(preprocessor.encode, example)
        yield Shown(example, encoded, range(len(example.conversations)), f"row {row}, {splits[row]}")


def _drawn(plan: "Plan", preprocessor: "Preprocessor", dataset: str, ids: set[str]) -> "Iterator[Shown]":
    """Examples of the dataset in the order in which the run draws them."""
    from molmo_model.eval.dataset_page import Shown
    from molmo_model.train.batches import Encoder

    encode = Encoder(preprocessor)
    augmentation = preprocessor.config.augmentation
    augmented = bool(augmentation.changes_pixels or augmentation.p_high_res)
    for start in range(0, SEARCHED, 1000):
        for draw in plan.mixture.draws(range(start, start + 1000)):
            if draw.dataset != dataset:
                continue
            example = plan.read(draw)
            if ids and example.id not in ids:
                continue
            where = f"row {draw.row}, position {draw.position} of the run: entry {draw.entry}, epoch {draw.epoch}"
            encoded = _or_error(encode, example, draw, draw.key)
            yield Shown(example, encoded, draw.conversations, where, draw.tokens, augmented)


def _or_error(encode: "Callable[..., Encoded]", *arguments: Any) -> "Encoded | DataError":
    try:
        return encode(*arguments)
    except DataError as error:
        return error


def _facts(reader: "ShardReader", run: str | None, start: Path) -> dict[str, Any]:
    from molmo_model.artifacts import read_manifest
    from molmo_model.data.shards import SCHEMA

    summary = dict(read_manifest(reader.path, SCHEMA).summary)
    facts: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            facts[name.replace("_", " ")] = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
        elif value != "":
            facts[name.replace("_", " ")] = value
    return facts | {"run": run or "none", "preprocessing": str(start)}


def _entries(plan: "Plan") -> list[dict[str, Any]]:
    """The run's entries."""
    mixture = plan.mixture
    packing = mixture.info["packing"]
    if "drawn" not in packing:
        raise ArtifactError(
            "the run's mixture.json does not say what is drawn of each entry; run the mixture stage again"
        )
    return [
        {
            "name": entry.name,
            "dataset": entry.config.dataset,
            "rate": entry.share / mixture.order.schedule.period,
            "examples": len(entry.rows),
            "conversations": len(entry.conversations),
            "drawn": packing["drawn"][entry.name],
            "epochs": round(packing["epochs"][entry.name], 2),
        }
        for entry in mixture.entries
    ]


def _charts(
    plan: "Plan | None", reader: "ShardReader", preprocessor: "Preprocessor", packs: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Histograms of the whole dataset, or of an even sample of it, and of the run's first packs; and, for the facts,
    how many examples the preprocessing refuses, which the histograms leave out, if any."""
    from molmo_model.eval.cards import spread
    from molmo_model.eval.charts import histogram

    errors: list[DataError] = []
    tokens: list[float] = []
    crops: list[float] = []
    answers: list[float] = []
    rows = spread(range(len(reader)), SAMPLE)
    for row in rows:
        example = reader.facts(row)
        sizes = [(image.width, image.height) for image in example.images]
        try:
            cost = preprocessor.cost_parts(sizes, example.conversations, example.id, example.videos)
        except DataError as error:
            errors.append(error)
            continue
        tokens.append(cost.tokens)
        crops.append(cost.crops)
        answers += [len(m.text or "") for c in example.conversations for m in c.messages if m.role == "assistant"]
    of = f"{len(tokens)} of {len(reader)} examples" if len(tokens) < len(reader) else f"{len(tokens)} examples"
    charts = {
        f"Tokens of {of}, all conversations": histogram("tokens", tokens, x_label="tokens, at most"),
        f"Crops of {of}": histogram("crops", crops, x_label="crops"),
        "Letters of an answer": histogram("letters", answers, x_label="letters; 0 where points are the answer"),
    }
    if plan is not None:
        charts |= _pack_charts(plan, packs)
    if not errors:
        return charts, {}
    return charts, {"refused by preprocessing": f"{len(errors)} of {len(rows)} examples, first: {errors[0]}"}


def _pack_charts(plan: "Plan", number_of_packs: int) -> dict[str, str]:
    from molmo_model.eval.charts import histogram

    packs = [plan.pack(number) for number in range(min(PACKS, number_of_packs))]
    capacity = plan.packing.capacity
    fills = {
        "tokens": [sum(draw.tokens for draw in pack) / capacity.tokens for pack in packs],
        "crops": [sum(draw.crops for draw in pack) / max(capacity.crops, 1) for pack in packs],
    }
    return {
        f"Fill of the run's first {len(packs)} packs, {what}": histogram(
            f"fill, {what}", values, x_label=f"share of a pack's {what}, as reserved", percent=True
        )
        for what, values in fills.items()
    }


if __name__ == "__main__":
    main()
