"""How many tokens a text has, without making them.

What an example may cost is asked of all its possible texts, tens of them a question, and nearly all of their words are
old ones. So the words are counted, once each: byte-level BPE, which all released families have, first cuts a text into
words by a regular expression, and then no token crosses a cut. The expression is the tokenizer's own, in Python's
notation; the words' tokens are counted by the tokenizer's own model. Whatever this cannot be sure to repeat, another
kind of tokenizer or letters beyond Latin 1, is left to the tokenizer.
"""

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How a `ByteLevel` pre-tokenizer cuts that has no expression of its own (GPT-2)."""
CLASSES = {r"\p{L}": "A-Za-zªµºÀ-ÖØ-öø-ÿ", r"\p{N}": "0-9²³¹¼½¾"}
"""The letters and numbers of Latin 1."""
KNOWN = re.compile(r"[\x00-\x7f\u00a1-\u00ff•‘’“”–—…]*")
"""Texts whose letters, numbers and white space Python and every tokenizer tell apart alike: Latin 1 without its blanks,
and the punctuation of typographers. Composed letters only, so that normal form C changes nothing."""
WORDS = 2**17
"""Words that are remembered."""

_PIECE = re.compile(r"\\p\{[LN]\}|\\[sSrnt]|\\[^\w\s]|\[\^?|[^\\]", re.DOTALL)


class TokenCounts:
    """Counts the tokens of texts in which no special token is to be found.

    Args:
        backend: of a tokenizer; special tokens in a text are spelled out (`encode_special_tokens`).
    """

    def __init__(self, backend: "Tokenizer") -> None:
        raw = json.loads(backend.to_str())
        self._backend = backend
        self._words = _words(raw)
        self._added = tuple(one["content"] for one in raw["added_tokens"] if not one["special"])
        self._first = frozenset(content[0] for content in self._added)
        self._tokens = lru_cache(WORDS)(self._word)

    def count(self, text: str) -> int | None:
        """As many tokens as the tokenizer makes of a text; None where only the tokenizer can tell."""
        if self._words is None or not (text.isascii() or KNOWN.fullmatch(text)):
            return None
        if any(first in text for first in self._first) and any(content in text for content in self._added):
            return None  # these are cut out first
        words = self._words.findall(text)
        return sum(map(self._tokens, words)) if "".join(words) == text else None

    def _word(self, word: str) -> int:
        return len(self._backend.model.tokenize("".join(_LETTERS[byte] for byte in word.encode())))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = lru_cache(WORDS)(self._word)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it can be seen, else one from
    U+0100 on (openai/gpt-2 `src/encoder.py`, `bytes_to_unicode`)."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(0x100)]


_LETTERS = _byte_letters()


def _words(raw: dict[str, Any]) -> "re.Pattern[str] | None":
    """What finds the words that a tokenizer cuts a text into; None for a tokenizer of another kind.

    Args:
        raw: its `tokenizer.json`.
    """
    model, normalizer, cutter = raw["model"], raw["normalizer"], raw["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model["dropout"] or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last["use_regex"]:
        return translated(GPT2_WORDS)
    if len(steps) != 2 or last["use_regex"] or steps[0]["type"] != "Split":
        return None
    split = steps[0]
    if "Regex" not in split["pattern"] or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return translated(split["pattern"]["Regex"])


def translated(pattern: str) -> "re.Pattern[str] | None":
    """An expression of Oniguruma, which tokenizers use, in Python's notation, for `KNOWN` texts; None where it has
    anything that the two may read differently."""
    pieces = _PIECE.findall(pattern)
    if "".join(pieces) != pattern or any(odd in pattern for odd in ("&&", "[]", "[^]")):
        return None
    inside, said = False, []
    for piece in pieces:
        if piece in ("[", "[^", "]"):
            if inside is (piece != "]"):
                return None
            inside = piece != "]"
        elif piece in "^$" and not inside:
            return None
        said.append((CLASSES[piece] if inside else f"[{CLASSES[piece]}]") if piece in CLASSES else piece)
    if "}+" in "".join(said):
        return None
    try:
        found = re.compile("".join(said), re.ASCII)
    except re.error:
        return None
    return None if found.groups or found.match("") else found
