"""Films with questions for training: LLaVA-Video-178K.

The hub has the questions, and the films as archives, so a copy must be made by hand; the answer says how. In it, as
the card and Molmo2's reference reader (`olmo/data/academic_video_datasets.py`) describe it, each part is a folder with
`*_mc_*.json` (choices), `*_oe_*.json` (open questions) and `*_cap_*.json` (captions), lists of

    {"id", "data_source": "<part>", "video": "<path below the part>", "conversations": [{"from", "value"}, ...]}

where `human` and `gpt` take turns and the first question begins with `<image>`. Every pair of turns is asked alone, and
all of one film become one example: a message tree. Choices and the instruction to answer with a letter stand in the
text of the question; the answer is as published, such as `B. A dog.`
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo_model.data.datasets.published import Files, Published, RowError, each, family
from molmo_model.data.datasets.row_fields import ask, check_choice, hashed, records, text, text_of
from molmo_model.data.example import Conversation, Example

LENGTHS = ("0_30_s", "30_60_s", "1_2_m", "2_3_m")
SUBSETS = tuple(
    f"{length}_{name}"
    for length in LENGTHS
    for name in ("academic_v0_1", "youtube_v0_1", "activitynetqa", "nextqa", "perceptiontest")
)
"""Values of `data_source`: length of the films, and where they are from. Those of perceptiontest end at a minute."""
IMAGE_MARKS = ("<image>", "<video>")
SPEAKERS = ("human", "gpt")


@dataclass
class LlavaVideoOptions:
    """Which parts are read."""

    subsets: list[str] = field(default_factory=list)
    """Values of `data_source`, such as `0_30_s_academic_v0_1`; empty is every part that the copy has."""

    def __post_init__(self) -> None:
        for name in self.subsets:
            check_choice("subsets", name, SUBSETS)


def same_film(fields: dict[str, Any]) -> tuple[str, str]:
    """The key of rows about one film."""
    return text(fields, "data_source"), text(fields, "video")


def convert_llava_video(rows: Sequence[dict[str, Any]], files: Files, options: LlavaVideoOptions, style: str) -> Any:
    """One film with all that is asked about it; none where its part is not wanted."""
    part, name = same_film(rows[0])
    if options.subsets and part not in options.subsets:
        return []
    talks = [talk for made in each(rows, lambda fields: _pairs(fields, style)) for talk in made]
    film = files.video(f"{part}/{name}", "video")
    facts = {"data_source": part, "video": name}
    return Example(f"{part}-{hashed(name)}", (), tuple(talks), facts, videos=(film,))


def _pairs(fields: dict[str, Any], style: str) -> list[Conversation]:
    """Questions and answers of one row, each pair alone."""
    turns = records(fields, "conversations", ("from", "value"))
    if not turns or len(turns) % 2:
        raise RowError("conversations", f"has {len(turns)} turns; it must be pairs of question and answer")
    said = []
    for i, turn in enumerate(turns):
        if turn["from"] != SPEAKERS[i % 2]:
            raise RowError(f"conversations[{i}].from", f"is {turn['from']!r} where {SPEAKERS[i % 2]!r} must stand")
        value = text_of(turn["value"], f"conversations[{i}].value")
        for mark in IMAGE_MARKS if i == 0 else ():
            value = value.removeprefix(mark).lstrip()
        said.append(text_of(value, f"conversations[{i}].value"))
    facts = {"id": str(fields["id"])} if "id" in fields else {}
    return [ask(style, *pair, facts) for pair in zip(said[0::2], said[1::2], strict=True)]


def _llava_video(split: str, style: str) -> Any:
    """The family of one kind of question."""
    published = Published(
        hub="lmms-lab/LLaVA-Video-178K",
        revision="main",
        licence="see the card: its films have the licences of their sources",
        card="https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K",
        splits={"train": split, "eval": None},
        by_hand=(
            "copy the parts that you want (`hf download lmms-lab/LLaVA-Video-178K --repo-type dataset --include "
            "'0_30_s_academic_v0_1/*' --local-dir FOLDER`) and unpack their `*.tar.gz` where they lie, so that a film "
            "is `FOLDER/<data_source>/<video>`."
        ),
        files={"multi_choice": "*_mc_*.json", "open_ended": "*_oe_*.json", "caption": "*_cap_*.json"},
    )

    def convert(rows: Sequence[dict[str, Any]], files: Files, options: LlavaVideoOptions) -> Any:
        return convert_llava_video(rows, files, options, style)

    return family(published, convert, options=LlavaVideoOptions, group=same_film)


LLAVA_VIDEO_MC = _llava_video("multi_choice", "video_multiple_choice")
LLAVA_VIDEO_OE = _llava_video("open_ended", "video_short_answer")
LLAVA_VIDEO_CAP = _llava_video("caption", "video_long_caption")
