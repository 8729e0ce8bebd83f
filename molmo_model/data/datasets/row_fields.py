"""What the `convert` functions of the published families share: fields of a row, checked, and the usual conversations.

A field that is not as the dataset's card says it is a `RowError` with its name; nothing is guessed.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.datasets.published_rows import SUBSET_KEY
from molmo_model.data.example import MAX_OPTIONS, PRIVATE, Conversation, Message, Point, is_number, plain_problem
from molmo_model.errors import ConfigError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EDGE = 10.0
"""Percent by which an annotator's point may lie outside of the picture, and is then moved onto its edge. Points further
out are no slip of the hand: they are in another unit."""


def text(fields: Mapping[str, Any], name: str) -> str:
    """A text that is not empty, without white space around it.

    Raises:
        RowError: it is missing, empty or no text.
    """
    return text_of(fields.get(name), name)


def text_of(value: Any, name: str) -> str:
    """As `text`, of a value; `name` is what to call it."""
    if value is None:
        raise RowError(name, "is missing")
    if not isinstance(value, str):
        raise RowError(name, f"is a {type(value).__name__}; it must be text")
    if not value.strip():
        raise RowError(name, "is empty")
    if problem := plain_problem(value, name):
        raise RowError(*problem)
    return value.strip()


def texts(fields: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts, each of them not empty.

    Raises:
        RowError: it is missing or no list, or one of its entries is no text or empty.
    """
    return [text_of(value, f"{name}[{i}]") for i, value in enumerate(_list(fields, name))]


def whole(fields: Mapping[str, Any], name: str) -> int:
    """A whole number, written as a number or, as some sets do, as text.

    Raises:
        RowError: it is missing or none.
    """
    value = fields.get(name)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        return int(value)
    if value is None or isinstance(value, bool) or not isinstance(value, int):
        raise RowError(name, "is missing" if value is None else f"is {value!r}; it must be a whole number")
    return value


def records(fields: Mapping[str, Any], name: str, parts: Sequence[str]) -> list[dict[str, Any]]:
    """A list of records, which `datasets` writes as a list of mappings or as a mapping of equally long lists.

    Raises:
        RowError: it is missing, none of both, or a part is missing.
    """
    value = fields.get(name)
    if isinstance(value, Mapping):
        lists = [value.get(part) for part in parts]
        if not all(isinstance(one, list) for one in lists):
            raise RowError(name, f"must have the lists {', '.join(parts)}")
        lengths = {part: len(one or ()) for part, one in zip(parts, lists, strict=True)}
        if len(set(lengths.values())) > 1:
            raise RowError(name, f"has lists of different lengths: {lengths}")
        return [dict(zip(parts, values, strict=True)) for values in zip(*(one or () for one in lists), strict=True)]
    found = _list(fields, name)
    for i, record in enumerate(found):
        if not isinstance(record, Mapping) or any(part not in record for part in parts):
            raise RowError(f"{name}[{i}]", f"must have {', '.join(parts)}")
    return [dict(record) for record in found]


def subset_of(fields: Mapping[str, Any], chosen: Sequence[str]) -> str:
    """The subset that a row is from. Files that `path` names one by one do not say it; then the option `subsets` must
    name exactly one.

    Raises:
        RowError: neither says it.
    """
    if SUBSET_KEY in fields:
        return str(fields[SUBSET_KEY])
    if len(chosen) != 1:
        raise RowError("row", "is of an unknown subset, as `path` names files; give the option `subsets` its one name")
    return chosen[0]


def percent_points(
    found: Sequence[Mapping[str, Any]], name: str, size: tuple[float, float] = (100.0, 100.0)
) -> tuple[Point, ...]:
    """Points `{x, y}` in percent; one that lies a little outside of the picture is moved onto its edge.

    Args:
        found: x and y, in `size`'s unit.
        name: the field, for errors.
        size: width and height of the picture in the points' unit: 100 x 100 for percent, else pixels.

    Raises:
        RowError: a coordinate is no number, or lies more than `EDGE` percent outside of the picture.
    """
    points = []
    for i, point in enumerate(found):
        pair = (point.get("x"), point.get("y"))
        if not all(is_number(value) for value in pair):
            raise RowError(f"{name}[{i}]", f"is {pair}; it must be two finite numbers")
        x, y = (100.0 * float(value) / side for value, side in zip(pair, size, strict=True))  # type: ignore[arg-type]
        if not (-EDGE <= x <= 100 + EDGE and -EDGE <= y <= 100 + EDGE):
            raise RowError(f"{name}[{i}]", f"is {pair}, outside of the picture of {size[0]:g} x {size[1]:g}")
        points.append((min(max(x, 0.0), 100.0), min(max(y, 0.0), 100.0)))
    return tuple(points)


def hashed(value: str) -> str:
    """A short name of a text, such as a URL, that fits into an id."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def ask(style: str, question: str | None, answer: str, metadata: Mapping[str, Any] | None = None) -> Conversation:
    """A question and its answer; question None is drawn from the style's templates."""
    return Conversation(style, (Message("user", question), Message("assistant", answer)), metadata=dict(metadata or {}))


def unlabelled(
    style: str, question: str, metadata: Mapping[str, Any], options: Sequence[str] = (), field: str = "options"
) -> Conversation:
    """A question of a test set whose answers are not public: it can be asked, and answers sent to the test server.

    Raises:
        RowError: one choice alone, or more than there are letters.
    """
    if len(options) == 1 or len(options) > MAX_OPTIONS:
        raise RowError(field, f"has {len(options)} choices; a question offers 2 to {MAX_OPTIONS}")
    facts = {"options": list(options)} if options else {}
    messages = (Message("user", question, options=tuple(options)), Message("assistant", LETTERS[0] if options else "?"))
    return Conversation(style, messages, metadata=facts | dict(metadata) | {PRIVATE: True})


def choose(
    style: str,
    question: str,
    options: Sequence[str],
    index: int,
    metadata: Mapping[str, Any] | None = None,
    field: str = "options",
) -> Conversation:
    """A question with choices; the answer is the letter of the right one. What scoring needs is in the metadata:
    `options`, `answer_index` from 0, `answer`, the right choice's text.

    Raises:
        RowError: fewer than two choices, more than there are letters, or an index that is none of them.
    """
    if not 2 <= len(options) <= MAX_OPTIONS:
        raise RowError(field, f"has {len(options)} choices; a question offers 2 to {MAX_OPTIONS}")
    if not 0 <= index < len(options):
        raise RowError(field, f"has {len(options)} choices, but the answer is number {index} from 0")
    facts = {"options": list(options), "answer_index": index, "answer": options[index]}
    messages = (Message("user", question, options=tuple(options)), Message("assistant", LETTERS[index]))
    return Conversation(style, messages, metadata=facts | dict(metadata or {}))


def facts_of(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the fields that the row has, for the metadata. Not-a-number is how pandas writes what is missing."""
    return {name: fields[name] for name in names if name in fields and fields[name] == fields[name]}


def index_of(answer: str, choices: list[str], field: str = "answer") -> int:
    """Which of the choices an answer is.

    Raises:
        RowError: none of them.
    """
    if answer not in choices:
        raise RowError(field, f"is {answer!r}, which is none of the choices {choices}")
    return choices.index(answer)


def unlettered(fields: dict[str, Any], name: str) -> list[str]:
    """Choices without the letters that some sets write in front of them.

    Raises:
        RowError: some have their letter and some have not.
    """
    choices = texts(fields, name)
    marks = [re.match(rf"{letter}[.:)]\s*", choice) for letter, choice in zip(LETTERS, choices, strict=False)]
    if not any(marks):
        return choices
    if not all(marks) or len(marks) != len(choices):
        raise RowError(name, f"has letters in front of some choices only: {choices}")
    return [text_of(choice[mark.end() :], name) for choice, mark in zip(choices, marks, strict=True) if mark]


def letter_index(fields: dict[str, Any], name: str, choices: list[str]) -> int:
    """Number, from 0, of the choice whose letter a field names.

    Raises:
        RowError: it names none of them.
    """
    answer = text(fields, name)
    if answer not in LETTERS[: len(choices)] or len(answer) != 1:
        raise RowError(name, f"is {answer!r}, none of the letters of {len(choices)} choices")
    return LETTERS.index(answer)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises `ConfigError` where an option of a family is none of those there are."""
    if value not in known:
        raise ConfigError(f"dataset option {name} is {value!r}; known: {', '.join(known)}")


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise RowError(name, "is missing" if value is None else f"is a {type(value).__name__}; it must be a list")
    return value
