"""Lists that judges write: numbered statements, and one verdict for each of them."""

import re
from collections.abc import Mapping, Sequence

_NUMBERED = re.compile(r"^\s*(\d+)\s*[.):]\s*(.+?)\s*$", re.MULTILINE)


def numbered(statements: Sequence[str]) -> str:
    """One line each, from 1."""
    return "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(statements, start=1))


def statements_of(text: str) -> list[str]:
    """The statements of a numbered list; of a text without numbers its lines."""
    found = [statement for _, statement in _NUMBERED.findall(text)]
    return found or [line.strip() for line in text.splitlines() if line.strip()]


def verdicts(text: str, count: int, words: Mapping[str, bool]) -> list[bool | None]:
    """The verdict on each of `count` statements, by its number; None where there is none that can be read.

    Args:
        words: what a verdict begins with, in lower case, and what it means; of several the longest counts.
    """
    found: list[bool | None] = [None] * count
    for number, verdict in _NUMBERED.findall(text):
        place = int(number) - 1
        if 0 <= place < count and found[place] is None:
            found[place] = _verdict(verdict.lower().strip(" *_\"'."), words)
    return found


def _verdict(text: str, words: Mapping[str, bool]) -> bool | None:
    for word in sorted(words, key=len, reverse=True):
        if re.match(rf"{re.escape(word)}\b", text):
            return words[word]
    return None
