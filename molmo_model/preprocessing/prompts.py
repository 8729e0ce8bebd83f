"""What the user asks and what the model answers, as text: one implementation for training, evaluation and generation.

A message with text is used as it is. A user message without text is drawn from the templates of its conversation's
style; an assistant message with points is written by `points.py`. Training draws with the example's own generator;
without a generator the first template is used, which is what evaluation does.
"""

from enum import StrEnum

import numpy as np

from molmo_model.data.example import Conversation, Message
from molmo_model.errors import DataError
from molmo_model.model_config import CHATML_END, CHATML_START, MessageFormat, PointFormat
from molmo_model.preprocessing.marked import Marked
from molmo_model.preprocessing.points import count_to_text, points_to_text

_CAPTION = (
    "Describe this image.",
    "What is in this image?",
    "Write a caption of this image.",
    "Say everything that you can see.",
)
_POINT = (
    "Point to {label}.",
    "Point at {label}.",
    "Where is {label}? Point to it.",
    "Show me {label}.",
)
_COUNT = (
    "How many {label} are there?",
    "Count {label}.",
    "What is the number of {label}?",
    "How many {label} do you see?",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "scene_caption": ("Read the scene.", "What does the scene show?", "Describe the scene.", "Read all cells."),
    "scene_count": _COUNT,
    "scene_point": _POINT,
    "chart_caption": ("Read the chart.", "What does the chart show?", "Describe the chart.", "Read all values."),
    "caption": _CAPTION,
    "point": _POINT,
    "point_count": _COUNT,
}
"""The prompts of each style, the one for evaluation first. `{label}` stands for the message's label, in lower case.

A style that is not listed, such as `scene_qa`, `chart_qa`, `qa` and `chat`, brings the text of every question along.
"""

COUNTED_STYLES = frozenset({"scene_count", "point_count"})
"""Styles whose points are answered as `Counting the <points ...> shows a total of N.`"""


class SystemPrompt(StrEnum):
    """What stands before the first question of a conversation."""

    none = "none"
    style = "style"
    """The style's name, as in `scene_count: How many ...`."""


def templates(style: str, message: Message) -> tuple[str, ...]:
    """Every text that a user message of this style may get; one that brings its text along has one.

    Raises:
        DataError: no text and no template, or a template that needs a label that is missing.
    """
    if message.text is not None:
        return (message.text,)
    if style not in TEMPLATES:
        known = ", ".join(sorted(TEMPLATES))
        raise DataError(f"a user message of style {style!r} has no text, and only these have templates: {known}")
    if message.label is None and any("{label}" in template for template in TEMPLATES[style]):
        raise DataError(f"a user message of style {style!r} has neither text nor the label that its prompt asks for")
    label = (message.label or "").lower()
    return tuple(template.replace("{label}", label) for template in TEMPLATES[style])


def answer(style: str, message: Message, point_format: PointFormat = PointFormat.molmo_v1) -> str:
    """The text of an assistant message.

    Raises:
        DataError: neither text nor points, or points outside the picture.
    """
    if message.points is None:
        if message.text is None:
            raise DataError(f"an assistant message of style {style!r} has neither text nor points")
        return message.text
    write = count_to_text if style in COUNTED_STYLES else points_to_text
    return write(message.points, (message.label or "").lower(), point_format)


def choices(
    conversation: Conversation,
    system_prompt: SystemPrompt,
    message_format: MessageFormat,
    point_format: PointFormat = PointFormat.molmo_v1,
) -> list[tuple[str, ...]]:
    """For every message, user and assistant in turn, all texts it may get, exactly as they are tokenized.

    Raises:
        DataError: naming the style, for a message that cannot be written.
    """
    style = conversation.style
    texts: list[tuple[str, ...]] = []
    for turn, message in enumerate(conversation.messages):
        if message.role == "assistant":
            said = answer(style, message, point_format)
            texts.append((said if message_format is MessageFormat.chatml else " " + said,))
        else:
            drawn = templates(style, message)
            texts.append(tuple(_frame(text, style, turn == 0, system_prompt, message_format) for text in drawn))
    return texts


def draw(texts: list[tuple[str, ...]], rng: np.random.Generator | None) -> list[str]:
    """One text for every message: the first without `rng`; otherwise drawn, one draw for each that has a choice."""
    return [some[0] if rng is None or len(some) == 1 else some[int(rng.integers(len(some)))] for some in texts]


def _frame(text: str, style: str, first: bool, system_prompt: SystemPrompt, message_format: MessageFormat) -> str:
    """A question with what the formats put around it."""
    if first and system_prompt is SystemPrompt.style:
        text = f"{style}: {text}"
    if message_format is MessageFormat.chatml:
        begin = "user\n" + text
        return Marked("" if first else "\n", CHATML_START, begin, CHATML_END, "\n", CHATML_START, "assistant\n")
    if message_format is MessageFormat.role:
        text = f"User: {text} Assistant:"
    return text if first else " " + text


def end_of_answer(message_format: MessageFormat) -> str | None:
    """The special token that ends answers; None is the tokenizer's end of text."""
    return CHATML_END if message_format is MessageFormat.chatml else None


def image_prefix(number: int) -> str:
    """The text before image `number` (from 1) of an example with several."""
    return f"Image {number}"
