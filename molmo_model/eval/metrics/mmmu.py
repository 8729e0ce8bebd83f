"""MMMU: the parser and the comparison of its official evaluation.

Follows the behaviour of `eval_utils.py` of MMMU-Benchmark/MMMU (Yue et al. 2023, arXiv:2311.16502) in its last form, in
which letters are also read from `A)`, `A.` and `A:`, quirks included. An answer to a question with choices that names
none is given a letter by chance there; here it is unparsed and scores 0. Of a choice without text, of which there are a
few, the letter counts and the text is not looked for.
"""

import re
from collections.abc import Iterable, Sequence
from string import ascii_uppercase as LETTERS

from molmo_model.eval.metrics.answers import answers_of, most_frequent
from molmo_model.eval.metrics.choices import lettered_choices_of, read_choice
from molmo_model.eval.metrics.letters import parse_letter
from molmo_model.eval.metrics.metric import Metric, Output, References, Score

DISCIPLINES: dict[str, tuple[str, ...]] = {
    "art_and_design": ("Art", "Art_Theory", "Design", "Music"),
    "business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "health_and_medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"),
        "Public_Health",
    ),
    "humanities_and_social_science": ("History", "Literature", "Sociology", "Psychology"),
    "tech_and_engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
        *("Materials", "Mechanical_Engineering"),
    ),
}
"""The 30 subjects by discipline."""
_DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}

Value = str | float
"""What an open answer is compared as: a number of two decimals, or lower-case text."""


def mmmu(prediction: str, references: References) -> Score:
    """Right or wrong as the official evaluation says, by kind of question and by discipline."""
    metadata = references.get("metadata", {})
    if "options" in metadata:
        choices = lettered_choices_of(references)
        place = parse_letter(prediction.strip(), choices.options)
        right, parsed = place == choices.right, place is not None
        read = None if place is None else LETTERS[place]
        plain = {"multiple_choice": float(right), "accuracy": float(read_choice(prediction, choices) == choices.right)}
    else:
        values = parse_open(prediction)
        right, parsed, read = open_equal(answers_of(references), values), bool(prediction.strip()), None
        plain = {"open": float(right), "accuracy": float(right)}
    discipline = _DISCIPLINE_OF.get(str(metadata.get("subject")))
    parts = {f"discipline_{discipline}": float(right)} if discipline else {}
    return Score({"mmmu": float(right)} | plain | parts, parsed, read=read)


# --- open questions

_SENTENCE = re.compile(r"\.\s(?=[A-Z])|\n")
"""The text is in lower case when it is split, so only lines divide it; kept."""
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MARKS = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas, with a power of ten, and plain. A number is tried from its first digit on only, which finds the same and
keeps a row of thousands of digits from taking seconds."""


def parse_open(response: str) -> set[Value]:
    """What an open answer may mean: its conclusions, and the numbers in them."""
    texts = _conclusions(response.strip().strip(".").lower())
    numbers = [number for text in texts for pattern in _NUMBERS for number in pattern.findall(text)]
    return {value for text in (*texts, *numbers) for value in normal(text)}


def _conclusions(response: str) -> list[str]:
    """What stands after the last word such as `is` or `answer` of every line, the shortest of each; the whole where
    there is none."""
    lines = _SENTENCE.split(response)
    found = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        tails = [line.rsplit(key, 1)[1].strip() for key in keys if key in line]
        shortest = _shortest(tails)
        if shortest and shortest not in _MARKS:
            found.append(shortest)
    return found or [response]


def _shortest(tails: Sequence[str]) -> str:
    """The first of the shortest; an empty one is replaced by whatever comes next, as published."""
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def normal(text: str) -> list[Value]:
    """A number rounded to two decimals, else the text in lower case; a single letter with a space before or behind it,
    so that it is not found in words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def open_equal(answers: Sequence[str], values: Iterable[Value]) -> bool:
    """Whether any value is an accepted number, or text that holds an accepted text."""
    wanted = [value for answer in answers for value in normal(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in wanted for value in values)


METRICS: dict[str, Metric] = {
    "mmmu": Metric(
        mmmu,
        "mmmu",
        most_frequent,
        "the most frequent right letter, or answer, of training",
        "MMMU (Yue et al. 2023, arXiv:2311.16502), the official eval_utils.py, on the whole answer; one without a "
        "letter is given one by chance there and scores 0 here. `accuracy` differs from `mmmu` for choices only: it is "
        "this project's reading.",
        unparsed="No letter or choice is found in it, or it is empty: 0.",
        outputs={
            "mmmu": Output("1 if right as the official evaluation reads the answer"),
            "accuracy": Output("choices: 1 if the answer names the right choice and no other; else as `mmmu`"),
            "multiple_choice": Output("`mmmu` of questions with choices"),
            "open": Output("`mmmu` of open questions: equal numbers of two decimals, or a text that holds the answer"),
            "discipline_*": Output("`mmmu` of the questions of a discipline"),
        },
    ),
}
