"""The evaluation sets of the field, a row each: what `tasks.<name>.benchmark` stands for.

A row says which family of datasets holds the questions and how they are asked and scored, as the papers and their code
do; what a task of `params.yaml` gives itself stands over it. `python -m pipelines.tasks` lists the rows and writes the
sections of `params.yaml` for a group of them. Plain values: `molmo_model.config` lays them under a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set."""

    title: str
    family: str
    """The family of datasets, of `molmo_model.data.datasets`, that reads it."""
    metric: str
    source: str
    """Where its questions, its scoring and its settings come from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the dataset, such as which published split is asked."""
    styles: tuple[str, ...] = ()
    """Prompt styles of its conversations; empty asks all."""
    also: tuple[str, ...] = ()
    max_new_tokens: int = 12
    groups: tuple[str, ...] = ()
    task: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the task (`max_crops`, `slices`, `kind`, `decoding`)."""
    submission: str | None = None
    """Name of the test server's file format, for sets whose labels are not public; see `eval.submissions`."""

    def task_settings(self) -> dict[str, Any]:
        """What a task of this benchmark has where it says nothing itself; `dataset` is its own."""
        return {
            "metric": self.metric,
            "styles": list(self.styles),
            "also": list(self.also),
            "max_new_tokens": self.max_new_tokens,
            "groups": list(self.groups),
            **self.task,
        }


BENCHMARKS: dict[str, Benchmark] = {
    "chart_qa": Benchmark(
        "ChartQA",
        "chart_qa",
        "relaxed_accuracy",
        "Masry et al. 2022, arXiv:2203.10244; 12 new tokens as in allenai/molmo",
        styles=("chart_qa",),
        groups=("paper", "high_res"),
    ),
}
