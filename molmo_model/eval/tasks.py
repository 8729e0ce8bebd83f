"""Tasks: which conversations of a dataset are asked, and what the answers are compared with.

A task is an entry of `tasks:` in `params.yaml` (`molmo_model.config.TaskConfig`): dataset, styles, split, metric, most
new tokens. One item is one conversation of an example: everything up to its last answer is the prompt. Items come in
the order of the dataset's index. No torch here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from molmo_model.config import TaskConfig
from molmo_model.data.example import PRIVATE, Conversation, Example, item_id
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import EvaluationError
from molmo_model.preprocessing import prompts

TRAINING_SAMPLE = 500
"""Training references that accompany the predictions, spread evenly over the index: enough to know the majority."""


@dataclass(frozen=True)
class Item:
    """One question to a model."""

    row: int
    """The example's row in the dataset's index."""
    example: Example
    """The example without the bytes of its pictures and films (one placeholder byte each); `ShardReader.read` brings
    them."""
    images: tuple[str, ...]
    """SHA-256 of the pictures' files, or of the films and the parts of them that are meant, in order."""
    conversation: int
    """Number of the conversation within its example."""

    @property
    def id(self) -> str:
        return item_id(self.example, self.conversation)

    @property
    def asked(self) -> Conversation:
        return self.example.conversations[self.conversation]


def items(task: TaskConfig, name: str, reader: ShardReader) -> list[Item]:
    """The items of a task, in the order of the index.

    Raises:
        EvaluationError: the dataset has no such conversations.
    """
    found = list(islice(_of_rows(task, reader, _rows(task, reader, task.split)), task.max_examples))
    if not found:
        styles = ", ".join(task.styles) or "any"
        raise EvaluationError(
            f"tasks.{name}: split {task.split!r} of dataset {task.dataset!r} has no conversation of style {styles}; "
            f"its styles are {', '.join(sorted(_styles(reader, task.split))) or 'none'}"
        )
    return found


def training_references(task: TaskConfig, reader: ShardReader) -> list[dict[str, Any]]:
    """References of about `TRAINING_SAMPLE` training items of the same styles, for the majority answer."""
    rows = _rows(task, reader, "train")
    sample = _of_rows(task, reader, rows[:: max(1, len(rows) // TRAINING_SAMPLE)])
    return [references(item) for item in islice(sample, TRAINING_SAMPLE)]


def references(item: Item) -> dict[str, Any]:
    """What an answer is compared with, as plain JSON: nothing that scoring may want is left out.

    `width` and `height` are those of the first picture or film, in pixels, `sizes` of all where there are several;
    `answer` is None where the right one is not public.
    """
    conversation, example = item.asked, item.example
    answer, private = conversation.messages[-1], bool(conversation.metadata.get(PRIVATE))
    first = example.files[0] if example.files else None
    return {
        "question": conversation.messages[-2].text,
        "answer": None if private else prompts.answer(conversation.style, answer),
        "points": None if answer.points is None else [list(point) for point in answer.points],
        "label": answer.label,
        "width": None if first is None else first.width,
        "height": None if first is None else first.height,
        **({"sizes": [[one.width, one.height] for one in example.files]} if len(example.files) > 1 else {}),
        "metadata": conversation.metadata,
        "example_metadata": example.metadata,
    }


def light(example: Example) -> Example:
    """An example without the bytes of its pictures and films: as many as one likes fit into memory."""
    return replace(
        example,
        images=tuple(replace(image, data=b"\0") for image in example.images),
        videos=tuple(replace(video, data=b"\0") for video in example.videos),
    )


def _of_rows(task: TaskConfig, reader: ShardReader, rows: list[int]) -> Iterator[Item]:
    for row in rows:
        example = reader.read(row)  # all bytes are verified here, though the pictures are let go
        images = (*(image.sha256 for image in example.images), *(video.identity for video in example.videos))
        without_bytes = light(example)
        for number, conversation in enumerate(example.conversations):
            if not task.styles or conversation.style in task.styles:
                yield Item(row, without_bytes, images, number)


def _rows(task: TaskConfig, reader: ShardReader, split: str) -> list[int]:
    styles = reader.index["styles"].to_pylist()
    return [row for row in reader.rows(split) if not task.styles or set(styles[row]) & set(task.styles)]


def _styles(reader: ShardReader, split: str) -> set[str]:
    styles = reader.index["styles"].to_pylist()
    return {style for row in reader.rows(split) for style in styles[row]}
