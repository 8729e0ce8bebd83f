"""Asset checks: what must hold before anything stands on an artefact.

Blocking ones gate bad data and bad numbers; the statistics of Great Expectations only warn. Row and column contracts
are those of `molmo_model.data.schemas`, which the stages hold too when they write: a check here says that the artefact
that lies there still keeps them. `RULES` is the table; a job of assets runs a rule as a step, the job `everything` runs
it on each artefact that it makes.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dagster as dg

from molmo_assets.flow import Artefact, artefact
from molmo_assets.metadata import loss_curve
from molmo_assets.partitions import params_file, partitions_of
from molmo_model.config import Params, load_params
from molmo_model.errors import MolmoError

# Checks of one partition are a preview in Dagster 1.13; a check of a whole asset would let one bad cell speak for all.
warnings.filterwarnings("ignore", message="Specifying a partitions_def on an AssetCheckSpec")

SHOWN = 20
"""Ids or failures that a result lists."""


@dataclass(frozen=True)
class Findings:
    """What a rule found: nothing, when all is well."""

    found: list[str]
    numbers: dict[str, float]


@dataclass(frozen=True)
class Rule:
    """One check of one asset."""

    asset: str
    name: str
    find: Callable[[Artefact, Params], Findings]
    blocking: bool = True

    def holds(self, item: Artefact, params: Params) -> dg.AssetCheckResult:
        """The result for one artefact; one that cannot be read fails the check, it does not crash it."""
        try:
            findings = self.find(item, params)
        except (MolmoError, OSError, ValueError, KeyError) as error:
            findings = Findings([f"{type(error).__name__}: {error}"], {})
        found = findings.found
        listed = found[:SHOWN] + ([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])
        return dg.AssetCheckResult(
            passed=not found,
            severity=dg.AssetCheckSeverity.ERROR if self.blocking else dg.AssetCheckSeverity.WARN,
            description="; ".join(listed) or None,
            metadata={**findings.numbers, "findings": len(found)},
        )


def failures(item: Artefact, params: Params) -> list[str]:
    """What the blocking rules of an artefact find, for steps that are no asset's and have no checks of their own."""
    results = {rule.name: rule.holds(item, params) for rule in RULES if rule.asset == item.asset and rule.blocking}
    return [f"{item.name}: {name}: {result.description}" for name, result in results.items() if not result.passed]


def closed_gates(item: Artefact, params: Params) -> list[str]:
    """Which blocking gates keep a scorecard from being gathered: a run of Dagster's sees only its own checks."""
    if item.asset != "scorecard":
        return []
    rule = next(rule for rule in RULES if rule.find is find_gate)
    cells = [artefact(rule.asset, f"{item.key['checkpoint']}|{task}", params) for task in params.tasks]
    results = {cell.name: rule.holds(cell, params) for cell in cells}
    return [f"{name}: {result.description}" for name, result in results.items() if not result.passed]


def check_of(rule: Rule) -> dg.AssetChecksDefinition:
    """The rule as a check of Dagster's, of one partition at a time."""

    @dg.asset_check(
        asset=rule.asset,
        name=rule.name,
        blocking=rule.blocking,
        description=rule.find.__doc__,
        partitions_def=partitions_of(rule.asset),
    )
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        params = load_params(params_file())
        return rule.holds(artefact(rule.asset, context.partition_key, params), params)

    return check


def find_schema_of_shards(item: Artefact, params: Params) -> Findings:
    """Columns and rows of the index keep their contract."""
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.data.shards import INDEX

    index = ShardReader(item.path).index
    check_table(index, "index", str(item.path / INDEX))
    return Findings([], {"rows": len(index)})


def find_coverage_of_shards(item: Artefact, params: Params) -> Findings:
    """Every example has one row, every row lies in a shard that is there, and no two share an id."""
    from molmo_model.data.shard_reader import ShardReader

    index = ShardReader(item.path).index
    ids = index["id"].to_pylist()
    present = {path.name for path in item.path.iterdir()}
    findings = [f"id {name} has {count} rows" for name, count in Counter(ids).items() if count > 1]
    findings += [f"shard {name} is missing" for name in sorted({*index["shard"].to_pylist()} - present)]
    findings += [] if ids else ["the index has no rows"]
    return Findings(findings, {"rows": len(ids)})


def find_files(item: Artefact, params: Params) -> Findings:
    """Every picture decodes and has the size that the shards say, but for the share that the dataset tolerates."""
    from molmo_model.data.image_hashes import FILE
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import read_columns

    document = _validation(item)
    faults = document.get("faults", [])
    found = [f"{fault['id']} {fault['field']} {fault['reason']}" for fault in faults]
    examples = sum(document.get("statistics", {}).get("examples", {}).values())
    tolerance = params.datasets[item.key["dataset"]].tolerance
    numbers = {"faults": float(len(faults))}
    if (item.path / FILE).exists():
        hashes = read_columns(item.path / FILE)
        check_table(hashes, "image_hashes", str(item.path / FILE))
        numbers["pictures"] = float(len(hashes))
    return Findings(found if len({fault["id"] for fault in faults}) > examples * tolerance else [], numbers)


def find_near_duplicates(item: Artefact, params: Params) -> Findings:
    """No picture of evaluation is shown in training, neither the same file nor one that looks like it; warns."""
    document = _validation(item)
    leaks, pairs = document["leaks"], document["near_duplicates"]
    findings = [f"train {leak['train']} shows the very picture of eval {leak['eval']}" for leak in leaks["listed"]]
    findings += [
        f"train {pair['train']} looks like eval {pair['eval']}: {pair['distance']} of 64 bits and "
        f"{pair['difference']} grey levels apart"
        for pair in pairs["listed"]
    ]
    return Findings(findings, {"leaks": leaks["found"], "near_duplicates": pairs["found"]})


def find_schema_of_mixture(item: Artefact, params: Params) -> Findings:
    """Costs, schedule and packs keep their contracts."""
    from molmo_model.data.mixture import map_table
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import read_columns

    tables = {"costs": map_table(item.path / "costs.arrow")}
    tables |= {name: read_columns(item.path / f"{name}.parquet") for name in ("schedule", "packs")}
    for name, table in tables.items():
        check_table(table, name, f"{name} of {item.path}")
    return Findings([], {name: float(len(table)) for name, table in tables.items()})


def find_near_duplicates_of_run(item: Artefact, params: Params) -> Findings:
    """No picture that the run draws looks like one of evaluation's, of its own datasets or any task's; warns."""
    from molmo_model.data.mixture import Mixture
    from molmo_model.data.shard_reader import ShardReader
    from pipelines.mixture import inputs, near_duplicates

    folders = inputs(params, item.key)
    readers = {
        name.removeprefix("shards/"): ShardReader(path) for name, path in folders.items() if name.startswith("shards/")
    }
    pairs, unknown = near_duplicates(Mixture.load(item.path), readers)
    findings = [f"{name}: not validated, so not looked at" for name in unknown] + [str(pair) for pair in pairs]
    return Findings(findings, {"near_duplicates": len(pairs)})


def find_expectations(item: Artefact, params: Params) -> Findings:
    """The dataset's statistics are as expected (Great Expectations); warns."""
    document = _validation(item)
    failed = [row for row in document["results"] if not row["success"]]
    findings = [f"{row['expectation']} of {row['column']}: {row['observed']}; {row['why']}" for row in failed]
    return Findings(findings, {"expectations": len(document["results"])})


def find_finite_loss(item: Artefact, params: Params) -> Findings:
    """Every step has a finite loss, and no step is missing."""
    curve = loss_curve(item.path)
    steps = params.runs[item.key["run"]].train.steps
    findings = [f"the loss of step {step} is {loss}" for step, loss in curve if not math.isfinite(loss)]
    missing = sorted(set(range(1, steps + 1)) - {step for step, _ in curve})
    findings += [f"step {step} is not in loss.csv" for step in missing]
    return Findings(findings, {"steps": len(curve), **({"last_loss": curve[-1][1]} if curve and not findings else {})})


def find_schema_of_predictions(item: Artefact, params: Params) -> Findings:
    """Columns and rows of the predictions keep their contract."""
    from molmo_model.data.schemas import check_table
    from molmo_model.eval.predictions import FILE, read_predictions

    rows = read_predictions(item.path / FILE)
    check_table(rows, "predictions", str(item.path / FILE))
    return Findings([], {"rows": len(rows)})


def find_coverage_of_predictions(item: Artefact, params: Params) -> Findings:
    """One prediction for each question of the task: none missing, none twice, none besides."""
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval.predictions import FILE, read_jsonl
    from molmo_model.eval.tasks import items

    task = params.tasks[item.key["task"]]
    asked = Counter(question.id for question in items(task, item.key["task"], ShardReader(_shards_of(item, params))))
    answered = Counter(row["id"] for row in read_jsonl(item.path / FILE))
    findings = [f"{name} was not answered" for name in asked - answered]
    findings += [f"{name} was answered {answered[name]} times, asked {asked[name]}" for name in answered - asked]
    return Findings(findings, {"asked": asked.total(), "answered": answered.total()})


def find_coverage_of_metrics(item: Artefact, params: Params) -> Findings:
    """Every prediction has a score, no metric counts more than there are, and every number is finite."""
    from molmo_model.eval.predictions import FILE, SCORES_FILE, read_jsonl

    answered = artefact("predictions", item.partition, params)
    rows, scores = read_jsonl(answered.path / FILE), read_jsonl(item.path / SCORES_FILE)
    document = json.loads((item.path / "metrics.json").read_text(encoding="utf-8"))
    missing = sorted({row["id"] for row in rows} ^ {score["id"] for score in scores})
    findings = [f"{name} has a prediction or a score, not both" for name in missing]
    for name, value in document["metrics"].items():
        if not 0 < value["n"] <= len(rows):
            findings.append(f"{name} counts {value['n']} of {len(rows)} predictions")
        findings += [f"{name}.{part} is {value[part]}" for part in ("mean", "stderr") if not math.isfinite(value[part])]
    if document["predictions"] != answered.manifest().digest:
        findings.append("the predictions have changed since they were scored")
    return Findings(findings, {"rows": len(rows), "scores": len(scores)})


def find_schema_of_metrics(item: Artefact, params: Params) -> Findings:
    """Scores and metrics keep their contracts."""
    from molmo_model.data.schemas import check_table
    from molmo_model.eval.predictions import SCORES_FILE, read_jsonl

    scores = read_jsonl(item.path / SCORES_FILE)
    check_table(scores, "scores", str(item.path / SCORES_FILE))
    document = json.loads((item.path / "metrics.json").read_text(encoding="utf-8"))
    rows = [{"metric": name, **value} for name, value in document["metrics"].items()]
    check_table(rows, "metrics", str(item.path / "metrics.json"))
    return Findings([], {"scores": len(scores), "metrics": len(rows)})


def find_gate(item: Artefact, params: Params) -> Findings:
    """The task's gate holds: its primary number is good enough, and not significantly worse than another's."""
    return _gate(item, params, blocking=True)


def find_gate_warning(item: Artefact, params: Params) -> Findings:
    """The same of a gate that `tasks.<t>.gate.blocking: false` lets pass; warns."""
    return _gate(item, params, blocking=False)


def _gate(item: Artefact, params: Params, blocking: bool) -> Findings:
    from pipelines.gate import findings

    if params.tasks[item.key["task"]].gate.blocking != blocking:
        return Findings([], {})
    return Findings(findings(params, item.key["checkpoint"], item.key["task"]), {})


def _validation(item: Artefact) -> dict[str, Any]:
    """`validation.json`."""
    document: dict[str, Any] = json.loads((item.path / "validation.json").read_text(encoding="utf-8"))
    return document


def _shards_of(item: Artefact, params: Params) -> str:
    """The shards that the questions of a task come from."""
    return artefact("shards", params.tasks[item.key["task"]].dataset, params).path.as_posix()


RULES = [
    Rule("shards", "schema", find_schema_of_shards),
    Rule("shards", "coverage", find_coverage_of_shards),
    Rule("validation", "files", find_files),
    Rule("validation", "expectations", find_expectations, blocking=False),
    Rule("validation", "near_duplicates", find_near_duplicates, blocking=False),
    Rule("mixture", "schema", find_schema_of_mixture),
    Rule("mixture", "near_duplicates", find_near_duplicates_of_run, blocking=False),
    Rule("training_run", "finite_loss", find_finite_loss),
    Rule("predictions", "schema", find_schema_of_predictions),
    Rule("predictions", "coverage", find_coverage_of_predictions),
    Rule("metrics", "schema", find_schema_of_metrics),
    Rule("metrics", "coverage", find_coverage_of_metrics),
    Rule("metrics", "gate", find_gate),
    Rule("metrics", "gate_warning", find_gate_warning, blocking=False),
]
CHECKS = [check_of(rule) for rule in RULES]
