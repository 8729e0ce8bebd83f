"""The texts of a user's rows: what none may hold, and what a row says of its last question and answer beside them.

options        choices of the last question; the answer is the letter of one, or one of them
alternatives   other answers to it that are as good, or other wordings
explanation    the reasoning in front of the answer
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.example import MAX_OPTIONS, UNLABELLED_STYLES, Message, equal_options, plain_problem

PARTS = ("image", "video")
"""What messages have places for, in the order of `PLACEHOLDERS`."""
PLACEHOLDERS = ("<image>", "<video>")
"""Where LLaVA's text has them."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Characters that no text has: what is left over of a terminal, or of bytes that were no text."""
ANSWER_FIELDS = ("options", "alternatives", "explanation")


def row_text(value: Any, where: str) -> str:
    """A text of a row, without white space around it.

    Raises:
        RowError: it is none, empty, or holds a place for a picture or what no text holds.
    """
    if not isinstance(value, str) or not value.strip():
        raise RowError(where, "is empty" if value in (None, "") or isinstance(value, str) else "is no text")
    for kind, placeholder in zip(PARTS, PLACEHOLDERS, strict=True):
        if placeholder in value:
            raise RowError(where, f'has {placeholder} as text; write {{"type": "{kind}"}} as a part instead')
    if problem := plain_problem(value, where):
        raise RowError(*problem)
    if found := CONTROL.search(value):
        raise RowError(where, f"holds the control character U+{ord(found[0]):04X}")
    return value.strip()


def last_turns(fields: Mapping[str, Any], question: Message, answer: Message, style: str) -> list[Message]:
    """The last question and its answer with what the row says of them.

    Raises:
        RowError: naming the field.
    """
    given = [name for name in ANSWER_FIELDS if name in fields]
    if given and answer.points is not None:
        raise RowError(given[0], "stands beside `points`; it belongs to an answer of text")
    options = _texts(fields, "options")
    others = _texts(fields, "alternatives")
    said = [answer.text or "", *others]
    if "options" in fields:
        _check_options(options)
        names = ["options", *(f"alternatives[{i}]" for i in range(len(others)))]
        said = [_choice(text, options, style, name) for text, name in zip(said, names, strict=True)]
    explanation = row_text(fields["explanation"], "explanation") if "explanation" in fields else None
    return [
        replace(question, options=tuple(options)),
        replace(answer, text=said[0] or None, alternatives=tuple(said[1:]), explanation=explanation),
    ]


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise RowError(name, f"is a {type(value).__name__}; it must be a list of texts")
    return [row_text(text, f"{name}[{i}]") for i, text in enumerate(value)]


def _check_options(options: Sequence[str]) -> None:
    if not 2 <= len(options) <= MAX_OPTIONS:
        raise RowError("options", f"are {len(options)}; a question offers 2 to {MAX_OPTIONS}")
    if equal := equal_options(options):
        raise RowError(f"options[{equal[1]}]", f"is {options[equal[1]]!r}, as options[{equal[0]}] is")


def _choice(said: str, options: Sequence[str], style: str, where: str) -> str:
    """The letter of the choice that an answer names or is; in styles without letters, the choice.

    Raises:
        RowError: it is none of them, or the letter of one and the text of another.
    """
    letters = [chr(ord("A") + i) for i in range(len(options))]
    named = {letters.index(said)} if said in letters and style not in UNLABELLED_STYLES else set()
    found = named | ({options.index(said)} if said in options else set())
    what = f"have the answer {said!r}, which" if where == "options" else f"is {said!r}, which"
    if len(found) > 1:
        raise RowError(where, f"{what} is the letter of one of the options and the text of another; say which is meant")
    if not found:
        letter = "" if style in UNLABELLED_STYLES else f", nor a letter from A to {letters[-1]}"
        raise RowError(where, f"{what} is none of the options{letter}")
    (place,) = found
    return options[place] if style in UNLABELLED_STYLES else letters[place]
