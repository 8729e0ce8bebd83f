"""Conversations without pictures: Tulu 3's mixture for fine-tuning on instructions.

Columns, as the card of `allenai/tulu-3-sft-mixture` describes them: id, messages [{role, content}], source. Roles are
`user` and `assistant` in turn, perhaps after one of `system`. The mixture is published under ODC-BY 1.0; its parts
have licences of their own, some of them non-commercial: `skip_sources` leaves parts out.
"""

from dataclasses import dataclass, field
from typing import Any

from molmo_model.data.datasets.published import ROW_KEY, Files, Published, RowError, family
from molmo_model.data.datasets.row_fields import check_choice, records, text, text_of
from molmo_model.data.example import ROLES, Conversation, Example, Message

SYSTEM_TURNS = ("prepend", "skip", "refuse")


@dataclass
class TuluOptions:
    """What is made of the parts and of system turns, which a conversation has no place for."""

    system: str = "prepend"
    """A conversation's system turn is put in front of the first question as `System: ...` and kept in the metadata
    (`prepend`, as Molmo2 does), or its conversation is left out (`skip`) or told as a bad row (`refuse`)."""
    skip_sources: list[str] = field(default_factory=list)
    """Values of `source` whose conversations are left out."""

    def __post_init__(self) -> None:
        check_choice("system", self.system, SYSTEM_TURNS)


def convert_tulu(fields: dict[str, Any], files: Files, options: TuluOptions) -> list[Example]:
    """One conversation; none where the options leave it out."""
    source = fields.get("source")
    if source in options.skip_sources:
        return []
    turns = records(fields, "messages", ("role", "content"))
    system, first = None, 0
    if turns and turns[0]["role"] == "system":
        if options.system == "refuse":
            raise RowError("messages[0].role", "is 'system'; the option `system` says what to do with such turns")
        if options.system == "skip":
            return []
        system, first = text_of(turns[0]["content"], "messages[0].content"), 1
    messages = []
    for i, turn in enumerate(turns[first:]):
        expected = ROLES[i % 2]
        if turn["role"] != expected:
            raise RowError(f"messages[{first + i}].role", f"is {turn['role']!r} where {expected!r} must stand")
        said = text_of(turn["content"], f"messages[{first + i}].content")
        messages.append(Message(expected, f"System: {system}\n{said}" if system and i == 0 else said))
    if len(messages) < 2 or len(messages) % 2:
        raise RowError("messages", f"has {len(messages)} turns of user and assistant; it must end with an answer")
    known = {} if system is None else {"system": system}
    talk = Conversation("text_sft", tuple(messages), metadata=known)
    name = text(fields, "id") if "id" in fields else str(fields[ROW_KEY])
    return [Example(name, (), (talk,), {} if source is None else {"source": source})]


TULU = family(
    Published(
        hub="allenai/tulu-3-sft-mixture",
        revision="b14afda60f1bbebe55d5d2fa1e4df5042f97f8be",
        licence="ODC-BY-1.0",
        card="https://huggingface.co/datasets/allenai/tulu-3-sft-mixture",
        splits={"train": "train", "eval": None},
    ),
    convert_tulu,
    options=TuluOptions,
)
