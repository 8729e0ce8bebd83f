"""Writes the file of a test server from answers to a test set whose labels are not public.

usage: python -m pipelines.submit checkpoint=CHECKPOINT task=TASK [out=FILE] [incomplete=true] [params=params.yaml]

checkpoint  <run>/step-<six digits>, as in eval.checkpoints; its answers must lie in artifacts/predictions
task        a task of a benchmark with a file for a test server, such as vqa_v2_test (`python -m pipelines.tasks
            group=server`)
out         default: artifacts/submissions/<checkpoint>/<task>.json
incomplete  write the file though answers are missing; the server will count or refuse them

The answers in the file are read from predictions as the set's metric reads them. Not a stage: writes no artefact.
Exit codes: 0 written, 2 refused with a message.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.stage import arguments, exit_on_error, option

if TYPE_CHECKING:
    from molmo_model.benchmarks import Benchmark
    from molmo_model.config import Params
    from molmo_model.eval.submissions import Submission

OPTIONS = ("checkpoint", "task", "out", "incomplete", "params")


def submit(params: "Params", checkpoint: str, task: str, incomplete: bool = False) -> "Submission":
    """The file of one cell's answers.

    Raises:
        ConfigError: no such task, or one without a test server.
        ArtifactError: the answers are missing, or not those of the params.
        EvaluationError: ids or answers are missing or stand twice.
    """
    from molmo_model.artifacts import verify
    from molmo_model.config import lookup
    from molmo_model.errors import EvaluationError
    from molmo_model.eval import predictions, submissions

    settings = lookup(params.tasks, task, "task")
    row = _row(params, task)
    folder = Path("artifacts/predictions") / checkpoint / task
    manifest = verify(folder, predictions.SCHEMA)
    for name in ("dataset", "max_examples"):
        made = manifest.params.get(f"tasks.{task}.{name}")
        if made != getattr(settings, name):
            raise EvaluationError(
                f"{folder} was made with {name} {made!r}, the params say {getattr(settings, name)!r}; predict again"
            )
    wanted = None if incomplete else submissions.QUESTIONS.get(str(settings.benchmark))
    if settings.max_examples is not None and not incomplete:
        raise EvaluationError(
            f"tasks.{task}.max_examples is {settings.max_examples}: the file would be incomplete; take it out and "
            "predict again, or write it with incomplete=true"
        )
    form = lookup(submissions.FORMATS, str(row.submission), "file format")
    rows = predictions.read_predictions(folder / predictions.FILE)
    return submissions.submission(rows, form, wanted, settings.benchmark in submissions.MAY_BE_FEWER)


def _row(params: "Params", task: str) -> "Benchmark":
    """The benchmark of a task, which must have a test server and be read from its own set."""
    from molmo_model.benchmarks import BENCHMARKS
    from molmo_model.errors import ConfigError

    settings = params.tasks[task]
    row = BENCHMARKS.get(settings.benchmark or "")
    if row is None or row.submission is None:
        known = ", ".join(name for name, one in BENCHMARKS.items() if one.submission)
        raise ConfigError(
            f"tasks.{task} is of benchmark {settings.benchmark!r}, which has no test server; {known} have"
        )
    dataset = params.datasets[settings.dataset]
    wrong = {name: value for name, value in row.options.items() if dataset.options.get(name) != value}
    if dataset.family != row.family or wrong:
        raise ConfigError(
            f"tasks.{task} is of benchmark {settings.benchmark!r}, family {row.family!r} with options "
            f"{dict(row.options)}, but its dataset {settings.dataset!r} is of family {dataset.family!r} with options "
            f"{dict(dataset.options)}: these are answers to another set"
        )
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m pipelines.submit`."""
    from molmo_model.artifacts import write_text_atomic
    from molmo_model.config import load_params, lookup
    from molmo_model.errors import ConfigError

    words = arguments(argv, __doc__)
    if not words:
        return
    options = dict[str, str]()
    for word in words:
        name, value = option(word)
        lookup(dict.fromkeys(OPTIONS), name, "option of pipelines.submit")
        if not value or name in options:
            raise ConfigError(f"{word!r}: every option is given once, and with a value")
        options[name] = value
    if missing := [name for name in ("checkpoint", "task") if name not in options]:
        raise ConfigError(f"{' and '.join(missing)} must be given, such as {missing[0]}=...")
    checkpoint, task = options["checkpoint"], options["task"]
    params = load_params(options.get("params", "params.yaml"))
    made = submit(params, checkpoint, task, options.get("incomplete", "false") == "true")
    out = Path(options.get("out", f"artifacts/submissions/{checkpoint}/{task}.json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, made.text)
    print(f"{out}: {made.answers} answers" + (f", {made.empty} of them empty" if made.empty else ""))


if __name__ == "__main__":
    with exit_on_error("submit"):
        main()
