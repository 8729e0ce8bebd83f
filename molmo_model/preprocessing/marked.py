"""Texts with special tokens in them that only the prompt format can put there."""


class Marked(str):
    """A text in which the prompt format has put special tokens of its own.

    To everything but a vocabulary it is the text as a person reads it. A vocabulary gives its markers their ids and
    spells all the rest out, so that nothing in the data, however written, becomes a marker. Joining or slicing gives
    plain text, without markers.
    """

    parts: tuple[str, ...]
    """Text and marker in turn, text first; they join to the whole."""

    def __new__(cls, *parts: str) -> "Marked":
        marked = super().__new__(cls, "".join(parts))
        marked.parts = parts
        return marked

    def __getnewargs__(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.parts
