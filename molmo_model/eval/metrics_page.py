"""`docs/metrics.md`, made from the table of metrics.

python -m molmo_model.eval.metrics_page          writes the page
python -m molmo_model.eval.metrics_page --check  fails if the page is not what the table says
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from molmo_model.benchmarks import BENCHMARKS
from molmo_model.eval.metrics import METRICS, Metric, Output

PAGE = Path("docs/metrics.md")

INTRODUCTION = """\
# Metrics

Written from the table in `molmo_model/eval/metrics` by `python -m molmo_model.eval.metrics_page`; edit the table, not
this page.

A task of `params.yaml` names its metric in `metric`, and further ones in `also`; leaderboards show the first one's
*primary* number. Everything here is a function of `predictions.jsonl`: change a metric, and `dvc repro` scores again
without asking the model anything.

How to read a number:

- It is a **mean over items** with an interval, clustered by picture. A number that does not apply to an item (the
  second hand of a clock without one) is a mean over those it applies to; `n` says how many.
- **Percent** is a share from 0 to 1, shown times 100.
- An answer that **cannot be read**, because it is not of the form asked for, is never guessed and never left out
  silently: it scores what its metric says below, and `unparsed` counts it.
- Beside every number stands that of the **constant answer**: what a model without eyes would score by always saying the
  same, chosen from training answers. A number is worth what it has above that.
- A number **by a judge** comes from a language model (`eval.judge`, `eval.judge_model`, `runtime.judge_url`). What it
  said is kept and never asked again; without it the item is left out, and `judged` counts what is missing. The judge
  `offline`, which is the default, asks nobody.
- Where published codes disagree, their numbers stand side by side under **names of their own**. Every source says what
  is different here.
"""


def page() -> str:
    """The whole document."""
    parts = [INTRODUCTION, _overview()]
    for module in dict.fromkeys(metric.score.__module__ for metric in METRICS.values()):
        title, about = _group(module)
        parts.append(f"## {title}\n\n{about}")
        parts += [_section(name, one) for name, one in METRICS.items() if one.score.__module__ == module]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _overview() -> str:
    rows = [
        (
            f"[`{name}`](#metric-{name})",
            f"`{metric.primary}`",
            _cell(metric.output(metric.primary).definition),
            _needs(metric),
        )
        for name, metric in METRICS.items()
    ]
    return _table(("metric", "primary number", "an item scores", "scored"), rows)


def _group(module: str) -> tuple[str, str]:
    """Title and text of a module's metrics: its docstring's first paragraph, whose beginning is the title."""
    about = _paragraphs(sys.modules[module].__doc__)[0]
    title = re.split(r"[:.,]", about)[0]
    return title, about


def _section(name: str, metric: Metric) -> str:
    lines = [
        f"### Metric `{name}`",
        _said(metric.score if metric.score_all is None else metric.score_all),
        _table(
            ("number", "an item scores", "unit", "better"),
            [_row(number, output, number == metric.primary) for number, output in metric.outputs.items()],
        ),
        *_made(metric),
        f"**Cannot be read.** {metric.unparsed or _always_read(metric)}",
        f"**Constant answer.** {_sentence(metric.constant_rule)}",
        f"**Source.** {_ended(metric.citation)}",
    ]
    if sets := [row.title for row in BENCHMARKS.values() if name in (row.metric, *row.also)]:
        lines.append(f"**Evaluation sets.** {_sentence('; '.join(sets))}")
    return "\n\n".join(lines)


def _said(function: Callable[..., Any]) -> str:
    """A function's docstring up to its list of arguments or errors."""
    kept = []
    for paragraph in _paragraphs(function.__doc__):
        if paragraph.startswith(("Args:", "Raises:", "Returns:")):
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def _row(number: str, output: Output, primary: bool) -> tuple[str, ...]:
    name = f"**`{number}`**" if primary else f"`{number}`"
    return name, _cell(output.definition), unit(output), better(output)


def unit(output: Output) -> str:
    """How large a number can be, for people."""
    if output.upper is None:
        return "0 and more"
    return "percent" if output.upper == 1.0 else f"0 to {output.upper:g}"


def _always_read(metric: Metric) -> str:
    return "Nothing: no text is read." if metric.measured else "Nothing: every answer is compared as it stands."


def better(output: Output) -> str:
    """Which way a number should go."""
    if output.neutral:
        return "neither"
    return "lower" if output.lower_is_better else "higher"


def _made(metric: Metric) -> list[str]:
    """How numbers that are no plain means come about."""
    found = [f"`{name}` is the unweighted mean of all `{pattern}`." for name, pattern in metric.macro.items()]
    if metric.functions:
        found.append(f"{', '.join(f'`{name}`' for name in metric.functions)}: computed from the means of the others.")
    found += [f"`{name}` is e to the power of `{of}`." for name, of in metric.exponentials.items()]
    return [" ".join(found)] if found else []


def _needs(metric: Metric) -> str:
    if metric.judged:
        return "by a judge"
    if metric.measured:
        return "from measured tokens"
    return "one by one" if metric.score_all is None else "all together"


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text or "").strip())]


def _sentence(text: str) -> str:
    return text[:1].upper() + _ended(text[1:])


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the repository")
    options = parser.parse_args(arguments)
    path = options.root / PAGE
    before, after = path.read_text(encoding="utf-8") if path.is_file() else "", page()
    if after == before:
        return 0
    print(f"{'out of date' if options.check else 'rewritten'}: {PAGE}", file=sys.stderr)
    if not options.check:
        path.write_text(after, encoding="utf-8")
    return int(options.check)


if __name__ == "__main__":
    sys.exit(main())
