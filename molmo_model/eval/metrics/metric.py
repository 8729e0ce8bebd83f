"""What a metric is: its score of one answer, the numbers that are made of the scores, and how each is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

from molmo_model.errors import EvaluationError

References = Mapping[str, Any]
"""Of one item, as `eval.tasks.references` writes them: `question` (None where a template asks), `answer`, `points`,
`label`, `width`, `height`, the conversation's `metadata`, the example's `example_metadata`; for measured tasks also
`measured`."""


class Score(NamedTuple):
    """One item's scores by name. A tuple, because tens of thousands are made in a second."""

    values: dict[str, float]
    """A name that does not apply to the item (`relaxed_human` of a generated question) is left out: each number is a
    mean over the items that have it."""
    parsed: bool = True
    """False: the answer was not of the form that the metric asks for. It scores what the definition says, mostly 0."""
    weight: float = 1.0
    """Of the item in every mean: 1, or the tokens that a loss is averaged over."""
    read: str | None = None
    """What was read from the answer, for people: the option that was extracted, the number."""


@dataclass(frozen=True)
class Output:
    """One number of a metric."""

    definition: str
    """One sentence: what an item scores."""
    lower_is_better: bool = False
    upper: float | None = 1.0
    """Largest value of an item's score; the smallest is 0. 1 is shown in percent; None is unbounded."""
    neutral: bool = False
    """True: it only describes the answers (how many words); more is neither better nor worse."""


class Judge(Protocol):
    """A language model that is asked about answers; see `eval.judges`."""

    name: str
    asked: int
    """Prompts so far."""
    missing: int
    """Of them those without an answer."""

    def ask(self, prompts: Sequence[str]) -> list[str | None]:
        """Its answers, in order; None where there is none (offline and not in the cache)."""
        ...


@dataclass(frozen=True)
class Metric:
    """One way to score a task."""

    score: Callable[[str, References], Score]
    """Of one prediction."""
    primary: str
    """The number that leaderboards show."""
    constant: Callable[[Sequence[References]], str]
    """From training references, the one answer that a model without eyes would always give."""
    constant_rule: str
    """How `constant` chooses, for people."""
    citation: str
    """Where the definition comes from, and what is different here."""
    outputs: Mapping[str, Output]
    """Every number by name; a name may be a pattern (`correct_*`)."""
    macro: Mapping[str, str] = field(default_factory=dict)
    """Numbers that are the unweighted mean of the means of all numbers that match a pattern."""
    exponentials: Mapping[str, str] = field(default_factory=dict)
    """Numbers that are e to the power of another's mean (perplexity of loss)."""
    functions: Mapping[str, Callable[[Mapping[str, float]], float]] = field(default_factory=dict)
    """Numbers that are a smooth function of the means of others, by name: BLEU of a corpus, of the means of counts."""
    score_all: Callable[[Sequence[tuple[str, References]], Judge], list[Score]] | None = None
    """Scores all items of a task together, in place of `score`: what depends on the corpus (CIDEr) or asks a judge."""
    judged: bool = False
    """True: `score_all` asks the judge."""
    measured: bool = False
    """True: scores what the model computed on the reference answer (`tasks.<t>.kind: loss`), no text is generated."""
    unparsed: str = ""
    """What an answer scores that is not of the form asked for (`Score.parsed` false), for people; empty: all are."""

    def output(self, name: str) -> Output:
        """What a number is, by its name or by the pattern that it matches.

        Raises:
            EvaluationError: the metric has no such number.
        """
        if name in self.outputs:
            return self.outputs[name]
        for pattern, output in self.outputs.items():
            if fnmatchcase(name, pattern):
                return output
        raise EvaluationError(f"{name!r} is no number of this metric; it has {', '.join(self.outputs)}")
