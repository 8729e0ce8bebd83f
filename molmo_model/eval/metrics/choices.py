"""Multiple choice: which of the offered choices an answer names, and the metrics of sets of pictures with choices.

Several readings of one answer stand side by side, because published codes read answers differently. `accuracy` means
the same in every metric of choices (`read_choice`): a reading that takes `B`, `(B)`, `B. a cat` and `a cat` for one,
and leaves unread what names no choice or several. The others are those of published codes, each under its own name;
those for letters are in `letters`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from string import ascii_uppercase as LETTERS
from typing import Any

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import vqa
from molmo_model.eval.metrics.answers import answers_of, edit_distance, most_frequent, short_answer
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

MOST_FREQUENT_CHOICE = "the most frequent right letter, or choice, of training"

ACCURACY = Output(
    "1 if the answer names the right choice and no other: its letter, its text, or both; a choice offered twice is one"
)
UNPARSED = "It names no choice, or several: `accuracy` is 0; the other readings find what they find."
MOLMO = Output(
    "1 if the choice nearest to the answer is right: equal, holding the answer, or at the least edit distance"
)
MOLMO2 = Output(
    "as `molmo`, and before the edit distance one that the answer begins with, or that begins with the answer"
)


@dataclass(frozen=True)
class Choices:
    """What a question offers."""

    options: tuple[str, ...]
    right: int
    """Number of the right one, from 0."""
    lettered: bool
    """Whether the choices are called A, B, ...; otherwise each is called by its text."""

    @property
    def names(self) -> Sequence[str]:
        return LETTERS[: len(self.options)] if self.lettered else self.options

    def place(self, letter: str) -> int | None:
        """The number of the choice with a capital letter; None where there is none."""
        place = ord(letter) - ord("A") if len(letter) == 1 else -1
        return place if 0 <= place < len(self.options) else None


Extraction = Callable[[str, Choices], int | None]
"""The number of the choice that an answer names; None where it names none."""


def choices_of(references: References) -> Choices:
    """What a question with choices offers, from its metadata.

    Raises:
        EvaluationError: the metadata have no choices, or the reference answer is neither letter nor text of the right
            one.
    """
    metadata: Mapping[str, Any] = references.get("metadata", {})
    options, right, answer = metadata.get("options"), metadata.get("answer_index"), references.get("answer")
    if not options or not isinstance(right, int) or not 0 <= right < len(options):
        raise EvaluationError(
            f"references have {len(options or ())} options and the answer_index {right!r}; a metric of choices needs "
            "`options` and the number of the right one in the metadata; choose another metric"
        )
    if len(options) > len(LETTERS):
        raise EvaluationError(f"references have {len(options)} options; there are letters for {len(LETTERS)}")
    lettered = answer == LETTERS[right]
    if not lettered and answer != options[right]:
        raise EvaluationError(
            f"the reference answer is {answer!r}; by the metadata it is {LETTERS[right]!r}, or {options[right]!r}"
        )
    return Choices(tuple(options), right, lettered)


def lettered_choices_of(references: References) -> Choices:
    """As `choices_of`, for readings that know letters alone.

    Raises:
        EvaluationError: the choices are called by their texts, which such a reading would never find right.
    """
    choices = choices_of(references)
    if not choices.lettered:
        raise EvaluationError(
            f"the reference answer is the text {references.get('answer')!r}, and this metric reads letters; use "
            "multiple_choice"
        )
    return choices


# --- readings

_MARKED = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]+|\s+-)(?:\s+(.*))?\Z", re.DOTALL)
"""A letter with a mark, and what follows it: `B.`, `(B) a cat`, `B: a cat`, `B - a cat`."""
_CONCLUDED = re.compile(
    r"\b(?i:answer|option|choice)\b(?i:\s+letter)?(?i:\s+is)?\W*(?:\(([A-Z])\)|\b([A-Z])(?=[.):]\s|\W*\Z))"
    r"(?!\W*(?:or|and|/)\W*[A-Z]\b)"
)
"""`the answer is (B)`, `the correct option is B.`; not `the answer is (A) or (B)`."""
_ANSWER_IS = re.compile(r"\b(?:answer|option|choice)(?:\s+is\b|\s*:)[\s:]*", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-Z])\)")
_WORD = re.compile(r"[-+]?\d+(?:[.,]\d+)*%?|\w+")
_UNCLEAR = -1


def read_choice(prediction: str, choices: Choices) -> int | None:
    """The one choice that an answer names, or None.

    In this order. Of the short answer, then of the last line: a letter alone; the text of a choice; a letter with a
    mark, which is unclear before another choice; a letter and the text that belongs to it. Of the whole:
    the last letter that is called the answer (`the answer is B`), or the only one in brackets; the choice whose text is
    all that is called the answer (`the answer is 2.`); the only choice whose text stands in the answer, as whole words,
    or the only one in whose text the answer stands.
    """
    said = short_answer(prediction)
    lines = (said, " ".join(prediction.strip().rpartition("\n")[2].split())) if "\n" in prediction else (said,)
    for line in lines:
        if (place := _said(line, choices)) is not None:
            return None if place == _UNCLEAR else place
    if choices.lettered and (letters := _concluded(prediction)):
        return choices.place(letters[-1])
    if (place := _concluded_text(prediction, choices.options)) is not None:
        return place
    return _mentioned(prediction if len(lines) > 1 else said, choices.options)


def _concluded(text: str) -> list[str]:
    """The letters of what is called the answer, else the only letter in brackets."""
    concluded = ["".join(letters) for letters in _CONCLUDED.findall(text)]
    bracketed = set(_BRACKETED.findall(text))
    return concluded or (list(bracketed) if len(bracketed) == 1 else [])


def _concluded_text(text: str, options: Sequence[str]) -> int | None:
    """The choice whose text is what follows the last `answer is`; a number is too short to be looked for elsewhere."""
    *before, tail = _ANSWER_IS.split(text)
    tail = tail.strip().rstrip(".!").lower()
    texts = [option.strip().lower() for option in options]
    return texts.index(tail) if before and tail and tail in texts else None


def _said(line: str, choices: Choices) -> int | None:
    """The choice that a line is, or `_UNCLEAR` if it names one that is not offered, or two."""
    if not line:
        return None
    if choices.lettered and len(line) == 1 and line.isascii() and line.isalpha():
        return _offered(line, choices)
    lower = line.lower()
    for place, option in enumerate(choices.options):
        if lower == option.strip().lower():
            return place
    return _lettered(line, choices) if choices.lettered else None


def _offered(letter: str, choices: Choices) -> int:
    place = choices.place(letter.upper())
    return _UNCLEAR if place is None else place


def _lettered(line: str, choices: Choices) -> int | None:
    if marked := _MARKED.match(line):
        place, rest = _offered(marked[1], choices), (marked[2] or "").strip().lower()
        texts = [option.strip().lower() for option in choices.options]
        another = rest in texts and place >= 0 and texts[place] != rest
        return _UNCLEAR if another or len(set(_BRACKETED.findall(line))) > 1 else place
    for place, option in enumerate(choices.options):
        if line[:1].upper() == LETTERS[place] and line[1:2].isspace() and line[2:].lower() == option.strip().lower():
            return place
    return None


def _mentioned(said: str, options: Sequence[str]) -> int | None:
    """The choice whose words are those of the answer, else the only one that stands in it, else the only one that it
    stands in."""
    words = _words(said)
    if not words.strip() or words.strip() in vqa.ARTICLES:
        return None
    places = {option: place for place, option in reversed(list(enumerate(map(_words, options))))}
    if words in places:
        return places[words]
    held = [option for option in places if len(option) > 3 and option in words]  # a letter is in any sentence
    if held:
        longest = [option for option in held if not any(option != other and option in other for other in held)]
        return places[longest[0]] if len(longest) == 1 else None
    holding = [option for option in places if words in option]
    return places[holding[0]] if len(holding) == 1 else None


def _words(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.lower()))} "


def nearest(prediction: str, choices: Choices, prefixes: bool = False) -> int | None:
    """The choice that Molmo's evaluation takes: equal, else the only one that holds the answer, else the first at the
    least edit distance. Letters are compared where choices have letters. An empty answer names none.

    Args:
        prefixes: as Molmo2's, which first looks for the only choice that the answer begins with, then for the only one
            that begins with the answer.
    """
    said = short_answer(prediction).lower()
    return _nearest(said, tuple(choices.names), prefixes) if said else None


@lru_cache(4096)
def _nearest(said: str, names: tuple[str, ...], prefixes: bool) -> int:
    """Remembered, because many questions of a set call their choices A to D and are answered alike."""
    lower = [name.strip().lower() for name in names]
    if said in lower:
        return lower.index(said)
    stages = [[said in name for name in lower]]
    if prefixes:
        stages = [[said.startswith(name) for name in lower], [name.startswith(said) for name in lower], *stages]
    for fits in stages:
        if sum(fits) == 1:
            return fits.index(True)
    distances = [edit_distance(name, said) for name in lower]
    return distances.index(min(distances))


def llava(prediction: str, choices: Choices) -> int | None:
    """The letter alone, or a capital letter and a period at the beginning: LLaVA's evaluation of ScienceQA."""
    said = prediction.strip()
    if len(said) == 1 or (said[:1].isupper() and said[1:2] == "."):
        return choices.place(said[0].upper())
    return None


molmo2 = partial(nearest, prefixes=True)


# --- metrics


def choice_score(
    prediction: str, choices: Choices, extractions: Mapping[str, Extraction], parsed_by: str = "accuracy"
) -> Score:
    """1 or 0 for every reading of an answer.

    Args:
        parsed_by: the reading that decides whether the answer was of the form asked for.
    """
    taken = read_choice(prediction, choices)
    read = {"accuracy": taken} | {name: extract(prediction, choices) for name, extract in extractions.items()}
    values = {name: float(place == choices.right) for name, place in read.items()}
    values["accuracy"] = float(taken is not None and _same(choices, taken))
    place = read[parsed_by]
    return Score(values, place is not None, read=None if place is None else _named(choices, place))


def _same(choices: Choices, place: int) -> bool:
    """Whether a choice is the right one, or says the same."""
    said, right = choices.options[place], choices.options[choices.right]
    return place == choices.right or said.strip().lower() == right.strip().lower()


def _named(choices: Choices, place: int) -> str:
    return f"{LETTERS[place]}. {choices.options[place]}" if choices.lettered else choices.options[place]


def multiple_choice(prediction: str, references: References) -> Score:
    """The plain reading, and Molmo's and Molmo2's."""
    return choice_score(prediction, choices_of(references), {"molmo": nearest, "molmo2": molmo2})


def science_qa(prediction: str, references: References) -> Score:
    """As `multiple_choice`, and LLaVA's reading, which lmms-eval uses for this set."""
    return choice_score(prediction, choices_of(references), {"molmo": nearest, "molmo2": molmo2, "llava": llava})


def ai2d(prediction: str, references: References) -> Score:
    """As `multiple_choice`, for opaque and for transparent boxes apart; questions without boxes are in both.

    Rows that do not say whether there are letters on the picture (the hub's copy) are taken to have them.
    """
    score = multiple_choice(prediction, references)
    metadata = references.get("metadata", {})
    boxed, transparent = metadata.get("abc_label", True), metadata.get("has_transparent_box", False)
    kinds = [kind for kind, is_it in (("opaque", not transparent), ("transparent", transparent)) if is_it or not boxed]
    parts = {f"{name}_{kind}": score.values[name] for name in ("accuracy", "molmo2") for kind in kinds}
    return Score(score.values | parts, score.parsed, read=score.read)


_OFFERED = re.compile(r"^\s*\(?([A-Z])[.):]\s+(.+?)\s*$", re.MULTILINE)
"""A choice within a question's text."""


def real_world_qa(prediction: str, references: References) -> Score:
    """Choices, which stand in the question's text, as `multiple_choice`; short answers are equal after the VQA
    evaluation's normalisation."""
    metadata = references.get("metadata", {})
    if metadata.get("question_type") != "multiple_choice":
        said = vqa.normalize(short_answer(prediction))
        right = float(any(said == vqa.normalize(answer) for answer in answers_of(references)))
        return Score({"accuracy": right, "molmo2": right})
    choices = _choices_in_text(str(metadata.get("prompt", "")), answers_of(references)[0])
    return choice_score(prediction, choices, {"molmo2": molmo2})


def _choices_in_text(prompt: str, answer: str) -> Choices:
    found = _OFFERED.findall(prompt)
    if len(found) < 2 or "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        found = [(letter, letter) for letter in "ABCD"]
    right = answer.strip().upper().rstrip(".")
    if right not in [letter for letter, _ in found]:
        raise EvaluationError(f"the reference answer is {answer!r}, none of the letters that the question offers")
    return Choices(tuple(option for _, option in found), LETTERS.index(right), lettered=True)


_READ = "`accuracy` is this project's reading, which guesses nothing"
_NEAREST = (
    "`molmo` is `select_mc_option` of allenai/molmo and `molmo2` that of allenai/molmo2, which take the nearest choice "
    "whatever was said; an empty answer names none here (there the first), and choices may be equal (there an error)"
)

METRICS: dict[str, Metric] = {
    "multiple_choice": Metric(
        multiple_choice,
        "accuracy",
        most_frequent,
        MOST_FREQUENT_CHOICE,
        f"A-OKVQA (Schwenk et al. 2022, arXiv:2206.01718) and other sets with choices. {_READ}; {_NEAREST}.",
        unparsed=UNPARSED,
        outputs={"accuracy": ACCURACY, "molmo": MOLMO, "molmo2": MOLMO2},
    ),
    "science_qa": Metric(
        science_qa,
        "accuracy",
        most_frequent,
        MOST_FREQUENT_CHOICE,
        f"ScienceQA (Lu et al. 2022, arXiv:2209.09513). {_READ}; {_NEAREST}; `llava` is the parsing of LLaVA's "
        "evaluation, as in lmms-eval.",
        unparsed=UNPARSED,
        outputs={
            "accuracy": ACCURACY,
            "molmo": MOLMO,
            "molmo2": MOLMO2,
            "llava": Output("1 if the answer is the right letter, or begins with it and a period"),
        },
    ),
    "ai2d": Metric(
        ai2d,
        "accuracy",
        most_frequent,
        MOST_FREQUENT_CHOICE,
        f"AI2D (Kembhavi et al. 2016, arXiv:1603.07396), for the two ways to draw its letters as in allenai/molmo2 "
        f"(`mc_ai2d_opaque`, `mc_ai2d_transparent`). {_READ}; {_NEAREST}.",
        unparsed=UNPARSED,
        outputs={
            "accuracy": ACCURACY,
            "molmo": MOLMO,
            "molmo2": MOLMO2,
            "*_opaque": Output("the same where letters cover the labels, or the picture has none"),
            "*_transparent": Output("the same where letters stand beside the labels, or the picture has none"),
        },
    ),
    "real_world_qa": Metric(
        real_world_qa,
        "accuracy",
        most_frequent,
        MOST_FREQUENT_CHOICE,
        f"RealWorldQA (xAI 2024) as in allenai/molmo2, `real_world_qa_score`. {_READ} and takes the text of a choice "
        "for its letter; `molmo2` takes the nearest of the letters whatever was said, here of those that the question "
        "offers, there of A to D.",
        unparsed=UNPARSED,
        outputs={
            "accuracy": Output("choices: 1 if the answer names the right one; else 1 if equal as VQA answers are"),
            "molmo2": Output("choices: 1 if the nearest letter is right; else 1 if equal as VQA answers are"),
        },
    ),
}
