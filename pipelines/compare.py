"""Compares two checkpoints question by question, from their scorecards: which is better, by how much, how surely.

usage: python -m pipelines.compare a=<run>/step-<six digits> b=<run>/step-<six digits> [tasks=first,second]
       [number=<name>] [examples=3] [out=compare.json]

For each task that both were scored in (or the tasks named): both means, their difference b - a with its interval, the
p-value of the paired test clustered by image, the same after Holm's correction for the number of tasks, and how many
questions each wins. Then the averages of the groups of tasks, and examples of wins and losses with both answers.
`number` compares another number of the metric than the primary one. `out` gets all of it as JSON, with more examples;
a name that ends in .csv gets the table. Reads `artifacts/scorecards` and `artifacts/predictions`.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.artifacts import read_manifest, write_text_atomic
from molmo_model.config import lookup
from molmo_model.errors import ArtifactError, ConfigError
from molmo_model.eval import predictions
from molmo_model.eval.comparison import average, average_difference, column, compare, holm
from pipelines.stage import arguments, exit_on_error, option

if TYPE_CHECKING:
    from molmo_model.eval.comparison import Column, Comparison
    from molmo_model.eval.scoring import Paired

OPTIONS = ("a", "b", "tasks", "number", "examples", "out")
LONGEST_TEXT = 160
"""Characters of a prompt or an answer on the terminal."""
LABEL = 18
"""Characters in front of an answer on the terminal."""


def predicted(checkpoint: str, task: str, digest: str) -> list[dict[str, Any]]:
    """The rows that a checkpoint's scores in a task were made from.

    Raises:
        ArtifactError: there are none, or they are not those of the digest.
    """
    folder = Path("artifacts/predictions") / checkpoint / task
    manifest = read_manifest(folder, predictions.SCHEMA)
    if manifest.digest != digest:
        raise ArtifactError(
            f"{folder} has the digest {manifest.digest[:16]}, but the scores were made from {digest[:16]}; "
            f"run python -m pipelines.score checkpoint={checkpoint} task={task}"
        )
    return predictions.read_predictions(folder / predictions.FILE)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = arguments(argv, __doc__)
    if not words:
        return
    with exit_on_error("compare"):
        options = dict(map(option, words))
        for name in options:
            lookup(dict.fromkeys(OPTIONS), name, "option of compare")
        for name in ("a", "b"):
            if not options.get(name):
                raise ConfigError(f"{name}=<run>/step-<six digits> is missing: two checkpoints are compared")
        document = compared(options["a"], options["b"], _names(options.get("tasks", "")), options.get("number"))
        print(table(document))
        print(shown(document, _count(options.get("examples", "3"))))
        if out := options.get("out"):
            write_text_atomic(Path(out), _csv(document) if out.endswith(".csv") else _json(document))
            print(f"compare: written to {out}")


def compared(a: str, b: str, tasks: Sequence[str] = (), number: str | None = None) -> dict[str, Any]:
    """Everything that is known of two checkpoints, as plain JSON.

    Args:
        tasks: by name; none means all in which both have the number.
        number: of the metric of each task; None is the primary one.

    Raises:
        MolmoError: there are no such scorecards or tasks, or what they were asked differs.
    """
    cards = [_scorecard(name) for name in (a, b)]
    for name in tasks:
        for checkpoint, card in zip((a, b), cards, strict=True):
            lookup(card["tasks"], name, f"task in the scorecard of {checkpoint}")
    chosen = list(tasks) or [
        name for name in cards[0]["tasks"] if all(_has(card["tasks"].get(name), number) for card in cards)
    ]
    if not chosen:
        what = f" with a number {number!r}" if number else ""
        raise ConfigError(f"{a} and {b} were scored in no common task{what}; run scorecard for both")
    confidence = cards[0]["tasks"][chosen[0]]["confidence"]
    rows: list[dict[str, Any]] = []
    pairs: dict[str, tuple[Column, Column]] = {}
    for task in chosen:
        documents = [card["tasks"][task] for card in cards]
        said = [predicted(name, task, one["predictions"]) for name, one in zip((a, b), documents, strict=True)]
        scores = [predictions.read_jsonl(_folder(name) / "scores" / f"{task}.jsonl") for name in (a, b)]
        first, second = (
            column(document, answers, scored, number)
            for document, answers, scored in zip(documents, said, scores, strict=True)
        )
        pairs[task] = first, second
        rows.append(_row(compare(first, second, confidence), documents, said, scores))
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["holm_p_value"] = p_value
    return {
        "a": a,
        "b": b,
        "confidence": confidence,
        "tasks": rows,
        "groups": _groups(pairs, {task: cards[0]["tasks"][task].get("groups", []) for task in chosen}, confidence),
        "left_out": sorted({*cards[0]["tasks"], *cards[1]["tasks"]} - {*chosen}),
    }


def _has(metrics: Mapping[str, Any] | None, number: str | None) -> bool:
    """Whether a task has the number: nobody may have judged it, or its right answers are not public."""
    return metrics is not None and (number or metrics["primary"]) in metrics["metrics"]


def _row(
    found: "Comparison", documents: Sequence[Mapping[str, Any]], said: Sequence[Any], scores: Sequence[Any]
) -> dict[str, Any]:
    """A task's comparison with its examples."""
    by_id = [{row["id"]: row for row in rows} for rows in said]
    scored = [{row["id"]: row["scores"].get(found.number) for row in rows} for rows in scores]

    def example(name: str) -> dict[str, Any]:
        first, second = (rows[name] for rows in by_id)
        answers = {"a": first["prediction"], "b": second["prediction"], "reference": first["references"].get("answer")}
        return {
            "id": name,
            "prompt": first["prompt"],
            **answers,
            "score_a": scored[0][name],
            "score_b": scored[1][name],
        }

    return {
        "task": found.task,
        "number": found.number,
        "lower_is_better": found.lower_is_better,
        "percent": documents[0]["outputs"][found.number]["upper"] == 1.0,
        "mean_a": documents[0]["metrics"][found.number]["mean"],
        "mean_b": documents[1]["metrics"][found.number]["mean"],
        **_numbers(found.paired),
        "won": [example(name) for name in found.wins],
        "lost": [example(name) for name in found.losses],
    }


def _numbers(paired: "Paired") -> dict[str, Any]:
    return {**asdict(paired), "ties": paired.ties}


def _groups(
    pairs: "Mapping[str, tuple[Column, Column]]", groups: Mapping[str, Sequence[str]], confidence: float
) -> list[dict[str, Any]]:
    """Averages of every group with at least two of the tasks whose numbers are shares where more is better."""
    rows = []
    for name in dict.fromkeys(group for named in groups.values() for group in named):
        tasks = [task for task in pairs if name in groups[task]]
        fit = [task for task in tasks if pairs[task][0].upper == 1.0 and not pairs[task][0].lower_is_better]
        if len(fit) < 2:
            continue
        first, second = ([pairs[task][side] for task in fit] for side in (0, 1))
        rows.append(
            {
                "group": name,
                "tasks": fit,
                "left_out": [task for task in tasks if task not in fit],
                "mean_a": average(first, confidence).mean,
                "mean_b": average(second, confidence).mean,
                **_numbers(average_difference([pairs[task] for task in fit], confidence)),
            }
        )
    return rows


def table(document: Mapping[str, Any]) -> str:
    """The comparison as text."""
    a, b, percent = document["a"], document["b"], 100 * document["confidence"]
    head = ["task", "number", "a", "b", f"b - a [{percent:g}%]", "p", "p (Holm)", "wins", "losses", "ties"]
    lines = [
        [row["task"], row["number"] + (" (lower is better)" if row["lower_is_better"] else ""), *_cells(row)]
        for row in document["tasks"]
    ]
    lines += [[f"group {row['group']}", f"mean of {len(row['tasks'])}", *_cells(row)] for row in document["groups"]]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = [f"a = {a}", f"b = {b}", ""]
    text += [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *lines]
    ]
    if document["left_out"]:
        text += ["", f"not compared: {', '.join(document['left_out'])}"]
    return "\n".join(text)


def _cells(row: Mapping[str, Any]) -> list[str]:
    write = _writer(row.get("percent", True))
    difference = f"{write(row['difference'], '+')} [{write(row['low'], '+')}, {write(row['high'], '+')}]"
    p_values = [f"{row[name]:.2g}" if name in row else "" for name in ("p_value", "holm_p_value")]
    counts = [str(row[name]) for name in ("wins", "losses", "ties")]
    return [write(row["mean_a"], ""), write(row["mean_b"], ""), difference, *p_values, *counts]


def _writer(percent: bool) -> Callable[[float, str], str]:
    """How numbers of a task are written: shares in percent."""
    return lambda value, sign: format(100 * value if percent else value, f"{sign}.{1 if percent else 4}f")


def shown(document: Mapping[str, Any], examples: int) -> str:
    """A few wins and losses of every task, with both answers."""
    text = []
    for row in document["tasks"]:
        for which, word in (("won", "better"), ("lost", "worse")):
            for one in row[which][:examples]:
                text += ["", f"{row['task']}: b is {word} on {one['id']}", f"  asked: {_short(one['prompt'])}"]
                text += [f"  {name} ({one[f'score_{name}']:g})".ljust(LABEL) + _short(one[name]) for name in ("a", "b")]
                text.append("  reference".ljust(LABEL) + _short(one["reference"]))
    return "\n".join(text)


def _short(text: Any) -> str:
    """One line that no control sequence of a model's answer escapes from."""
    line = "" if text is None else json.dumps(text, ensure_ascii=False)
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= LONGEST_TEXT else f"{line[:LONGEST_TEXT]}..."


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _csv(document: Mapping[str, Any]) -> str:
    import io

    text = io.StringIO()
    names = [name for name, value in document["tasks"][0].items() if not isinstance(value, list)]
    writer = csv.DictWriter(text, ["a", "b", *names], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"a": document["a"], "b": document["b"], **row} for row in document["tasks"])
    return text.getvalue()


def _folder(checkpoint: str) -> Path:
    return Path("artifacts/scorecards") / checkpoint


def _scorecard(checkpoint: str) -> dict[str, Any]:
    path = _folder(checkpoint) / "scorecard.json"
    if not path.is_file():
        raise ArtifactError(f"{path} is not there; run python -m pipelines.scorecard checkpoint={checkpoint}")
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"examples={text} is no number")
    return int(text)


if __name__ == "__main__":
    main()
