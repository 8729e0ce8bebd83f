"""PixMo, what people said about pictures: captions, transcripts, questions and answers.

The rows name pictures by URL, so the list of what could be downloaded decides which there are (`pipelines.download`). A
copy of a set that brings the pictures along in a column `image` is read as it is. Rows of one picture become one
example, a message tree. None has a split of its own: pictures are held out by a hash of their bytes.

Columns as the dataset cards describe them and as Molmo2's reference readers use them (`olmo/data/pixmo_datasets.py`):

| set | columns |
|---|---|
| `allenai/pixmo-cap` | image_url, caption, transcripts [text] |
| `allenai/pixmo-ask-model-anything` | image_url, image_sha256, question, answer |
| `allenai/pixmo-cap-qa` | image_url, question (the turns so far, marked `[USER]` and `[ASSISTANT]`), answer |

Questions that ask for a number keep their text here; that they want no points is said where prompts are written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.data.datasets.published import Files, Published, RowError, each, family
from molmo_model.data.datasets.row_fields import ask, check_choice, hashed, text, text_of, texts
from molmo_model.data.example import Conversation, Example, Image, Message

LICENCE = "ODC-BY-1.0"
SPLITS = {"train": "train", "eval": None}
"""All is one split on the hub; evaluation is held out of it."""
CAPTION_MODES = ("captions", "transcript", "transcript_and_caption", "transcripts")


def picture_urls(fields: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The URL that a row names, and the SHA-256 of the picture that was annotated where the set has it."""
    url = fields.get("image_url")
    return [(url, fields.get("image_sha256"))] if isinstance(url, str) else []


def same_picture(fields: dict[str, Any]) -> str:
    """The key of rows about one picture."""
    return text(fields, "image_url")


def picture_of(rows: Sequence[dict[str, Any]], files: Files) -> tuple[Image, str, dict[str, Any]]:
    """The picture of a group of rows, its id and what the example knows of it."""
    url = text(rows[0], "image_url")
    field = "image" if "image" in rows[0] else "image_url"
    return files.image(rows[0][field], field), hashed(url), {"image_url": url}


# --- captions


@dataclass
class CaptionOptions:
    """What becomes of a caption and of the transcripts of speech that it was made from."""

    mode: str = "transcript_and_caption"
    """`captions` (style `long_caption`), `transcript` (style `transcript`: one conversation, training draws one of the
    transcripts), `transcript_and_caption` (both) or `transcripts` (a conversation for each of them)."""
    transcripts_as_facts: bool = False
    """Captions have the transcripts in their metadata: what a judge compares dense captions with."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, CAPTION_MODES)


def convert_captions(rows: Sequence[dict[str, Any]], files: Files, options: CaptionOptions) -> Example:
    """One picture with its captions and transcripts."""
    talks = [talk for made in each(rows, lambda fields: _caption_talks(fields, options)) for talk in made]
    picture, name, metadata = picture_of(rows, files)
    return Example(name, (picture,), tuple(talks), metadata)


def _caption_talks(fields: dict[str, Any], options: CaptionOptions) -> list[Conversation]:
    talks, mode = [], options.mode
    if mode in ("captions", "transcript_and_caption"):
        facts = {"transcripts": texts(fields, "transcripts")} if options.transcripts_as_facts else {}
        talks.append(ask("long_caption", None, text(fields, "caption"), facts))
    if mode == "captions":
        return talks
    spoken = texts(fields, "transcripts")
    if not spoken:
        raise RowError("transcripts", "is an empty list")
    if mode == "transcripts":
        return [ask("transcript", None, one) for one in spoken]
    answer = Message("assistant", spoken[0], alternatives=tuple(spoken[1:]))
    return [*talks, Conversation("transcript", (Message("user"), answer))]


PIXMO_CAP = family(
    Published(
        hub="allenai/pixmo-cap",
        revision="28c9d380a093b58357dde4f5d1314a7f30af9c9d",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-cap",
        splits=SPLITS,
        urls=picture_urls,
    ),
    convert_captions,
    options=CaptionOptions,
    group=same_picture,
)


# --- questions of people, with long answers


def convert_user_questions(rows: Sequence[dict[str, Any]], files: Files, options: Any) -> Example:
    """One picture with what people asked about it."""
    talks = each(rows, lambda fields: ask("user_qa", text(fields, "question"), text(fields, "answer")))
    picture, name, metadata = picture_of(rows, files)
    return Example(name, (picture,), tuple(talks), metadata)


PIXMO_ASK_MODEL_ANYTHING = family(
    Published(
        hub="allenai/pixmo-ask-model-anything",
        revision="bb892d14900ebc46ac4b22582eb1fa6377b73c33",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-ask-model-anything",
        splits=SPLITS,
        urls=picture_urls,
    ),
    convert_user_questions,
    group=same_picture,
)


# --- dialogues that a language model wrote from captions

TURN = re.compile(r"\s*\[(USER|ASSISTANT)\]\s*")


def convert_dialogues(rows: Sequence[dict[str, Any]], files: Files, options: Any) -> Example:
    """One picture with the dialogues about it, each of one turn or several."""
    talks = each(rows, _dialogue)
    picture, name, metadata = picture_of(rows, files)
    return Example(name, (picture,), tuple(talks), metadata)


def _dialogue(fields: dict[str, Any]) -> Conversation:
    """The turns of `question`, which begin with `[USER]` and end with an open `[ASSISTANT]`, and the answer."""
    before, *parts = TURN.split(text(fields, "question"))
    roles, said = parts[0::2], parts[1::2]
    expected = ["USER" if i % 2 == 0 else "ASSISTANT" for i in range(len(roles))]
    if before or len(roles) < 2 or roles != expected or len(roles) % 2 or said[-1]:
        raise RowError("question", "must be turns that begin with [USER], alternate, and end with an open [ASSISTANT]")
    turns = [text_of(one, f"question turn {i + 1}") for i, one in enumerate(said[:-1])]
    turns.append(text(fields, "answer"))
    messages = (Message("user" if i % 2 == 0 else "assistant", one) for i, one in enumerate(turns))
    return Conversation("synthetic_qa", tuple(messages))


PIXMO_CAP_QA = family(
    Published(
        hub="allenai/pixmo-cap-qa",
        revision="e55311072d5fc494f750662eb519bec040eb5d79",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-cap-qa",
        splits=SPLITS,
        urls=picture_urls,
    ),
    convert_dialogues,
    group=same_picture,
)
