"""Slices: the items of a task by what they are about, so that a number shows where it comes from.

`SLICINGS` is the table: each says of an item which value it has, None where it does not apply.
Fields of the examples' own metadata are added by `tasks.<t>.slices`. Pure Python over the rows; no second look at the
data.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from molmo_model.errors import EvaluationError

Row = Mapping[str, Any]

MOST_VALUES = 20
"""Values that a slicing shows, those with the most items; the others are together `other`."""
OTHER = "other"
SIDES = (256, 512, 1024, 2048)
"""Edges of image sizes: the longer side in pixels, each edge included."""
PICTURES = (1, 2, 4, 8)
WORDS = (1, 3, 10, 30)
"""Edges of the lengths of reference answers, in words, each edge included."""
FOREIGN = 0.2
"""A prompt is in another script than Latin if at least so many of its letters are: templates around it are Latin."""


class Facts(NamedTuple):
    """What slicings look at."""

    row: Row
    metadata: Mapping[str, Any]
    """Of the conversation, and of the example where the conversation says nothing."""
    answer: str | None
    """The accepted answer, the most frequent of several."""


@dataclass(frozen=True)
class Slicing:
    """One way to divide items."""

    definition: str
    value: Callable[[Facts], str | None]
    order: tuple[str, ...] = ()
    """Values in the order in which they are shown; others follow, those with the most items first."""


@dataclass(frozen=True)
class Slice:
    """The items that share one value."""

    by: str
    value: str
    items: list[int]
    """Their numbers, in the order of the predictions."""


def slices(rows: Sequence[Row], fields: Sequence[str] = (), task: str = "<name>") -> Iterator[Slice]:
    """Every slice of every slicing that has more than one value among the rows.

    Args:
        rows: of `predictions.jsonl`.
        fields: of the conversations' or the examples' metadata: `tasks.<t>.slices`.

    Raises:
        EvaluationError: a field that no item has, or that has the name of a slicing.
    """
    facts = [_facts(row) for row in rows]
    for name, slicing in SLICINGS.items():
        yield from _of(name, [slicing.value(one) for one in facts], slicing.order)
    for name in fields:
        check_field(name, task)
        values = [_field(one, name) for one in facts]
        if all(value is None for value in values):
            known = sorted({field for one in facts for field in one.metadata})
            raise EvaluationError(
                f"tasks.{task}.slices: no item's metadata has {name!r}; they have {', '.join(known) or 'none'}"
            )
        yield from _of(name, values, ())


def check_field(name: str, task: str) -> None:
    """Refuses a field with the name of a slicing that every task has.

    Raises:
        EvaluationError: it has one.
    """
    if name in SLICINGS:
        raise EvaluationError(f"tasks.{task}.slices: {name!r} is sliced by anyway; leave it out")


def _of(name: str, values: Sequence[str | None], order: Sequence[str]) -> Iterator[Slice]:
    counts = Counter(value for value in values if value is not None)
    if len(counts) < 2:
        return
    shown = sorted(counts, key=lambda value: (-counts[value], value))
    if len(shown) > MOST_VALUES:
        shown = [value for value in shown if value != OTHER][: MOST_VALUES - 1]
    shown.sort(key=lambda value: order.index(value) if value in order else len(order))  # stable: by number after that
    members: dict[str, list[int]] = {value: [] for value in shown}
    for number, value in enumerate(values):
        if value is not None:
            members.setdefault(value if value in members else OTHER, []).append(number)
    yield from (Slice(name, value, numbers) for value, numbers in members.items())


def _facts(row: Row) -> Facts:
    references = row["references"]
    metadata, answer = references.get("metadata") or {}, references.get("answer")
    answers = metadata.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], str):
        answer = max(answers, key=answers.count)  # of those that tie the first; no Counter, which costs more
    if example := references.get("example_metadata"):
        metadata = {**example, **metadata}
    return Facts(row, metadata, answer if isinstance(answer, str) else None)


def _field(one: Facts, name: str) -> str | None:
    """A field of the metadata as text; None where there is none."""
    value = one.metadata.get(name)
    if value is None:
        return None
    if isinstance(value, str):
        return value or None
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _answer_type(one: Facts) -> str | None:
    if published := _field(one, "answer_type") or _field(one, "question_type"):
        return published
    if one.row["references"].get("points") is not None:
        return "points"
    return None if one.answer is None else _kind(one.answer.strip().lower())


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    if answer.isalpha():  # most are, and a failed conversion costs more than all the rest
        return OTHER
    try:
        float(answer.rstrip(".%").lstrip("$").replace(",", ""))
    except ValueError:
        return OTHER
    return "number"


def _image_size(one: Facts) -> str | None:
    references = one.row["references"]
    width, height = references.get("width"), references.get("height")
    return None if not width or not height else _bucket(max(width, height), SIDES, " px")


def _pictures(one: Facts) -> str | None:
    return _bucket(len(one.row["image"]["sha256"]), (0, *PICTURES))


def _answer_length(one: Facts) -> str | None:
    return None if one.answer is None else _bucket(len(one.answer.split()), WORDS)


@cache
def _bucket(number: int, edges: tuple[int, ...], unit: str = "") -> str:
    """`up to 256 px`, `257-512 px`, `over 2048 px`; a bucket of one number is that number."""
    low = 0
    for edge in edges:
        if number <= edge:
            return _range(low, edge, unit)
        low = edge + 1
    return f"over {edges[-1]}{unit}"


def _range(low: int, high: int, unit: str) -> str:
    if low == high:
        return f"{low}{unit}"
    return f"{low}-{high}{unit}" if low else f"up to {high}{unit}"


def _buckets(edges: tuple[int, ...], unit: str = "") -> tuple[str, ...]:
    return tuple(_bucket(number, edges, unit) for number in (*edges, edges[-1] + 1))


def _language(one: Facts) -> str | None:
    return _field(one, "language") or script(one.row["references"].get("question") or one.row["prompt"])


def script(text: str) -> str | None:
    """The script that most letters of a text belong to, Latin only if fewer than `FOREIGN` of them are of others.

    By the first word of each letter's Unicode name: `latin`, `cyrillic`, `arabic`, `devanagari`...; `CJK` is `han`, and
    together with any hiragana or katakana it is `kana`. None without letters.
    """
    if text.isascii():  # nearly all are, and each character costs a look-up
        return "latin" if any(map(str.isalpha, text)) else None
    counts = Counter(unicodedata.name(letter, "UNKNOWN").split()[0].lower() for letter in text if letter.isalpha())
    if not counts:
        return None
    latin, letters = counts.pop("latin", 0), counts.total()
    if not counts or letters < FOREIGN * (letters + latin):
        return "latin"
    kana = counts.pop("hiragana", 0) + counts.pop("katakana", 0) + counts.pop("katakana-hiragana", 0)
    if kana:
        counts["kana"] = kana + counts.pop("cjk", 0)
    most = min(counts, key=lambda name: (-counts[name], name))
    return "han" if most == "cjk" else most


SLICINGS: dict[str, Slicing] = {
    "dataset": Slicing("the dataset of the example", lambda one: one.row["image"]["dataset"]),
    "style": Slicing("the prompt style of the conversation", lambda one: one.row["style"]),
    "answer_type": Slicing(
        "as published (`answer_type`, `question_type` of the metadata); else whether the reference answer is points, "
        "yes or no, a number, or other",
        _answer_type,
    ),
    "image_size": Slicing("the longer side of the first picture, in pixels", _image_size, _buckets(SIDES, " px")),
    "pictures": Slicing("how many pictures and films the question is about", _pictures, _buckets((0, *PICTURES))),
    "language": Slicing(
        "as published (`language` of the metadata); else the script of the question, or of the prompt where a template "
        "asks: the most frequent one, Latin if "
        "fewer than a fifth of the letters are of others",
        _language,
    ),
    "answer_length": Slicing("words of the reference answer", _answer_length, _buckets(WORDS)),
    "cut_off": Slicing(
        "whether the answer ended or ran into the limit of tokens",
        lambda one: "cut off" if one.row["finish_reason"] == "length" else "ended",
        ("ended", "cut off"),
    ),
}
"""The slicings that every task has, where they have more than one value."""
