"""What the user asks and what the model answers, as text: one implementation for training, evaluation and generation.

A conversation becomes texts, user and assistant in turn, in four steps:

1. the question: its text, or one of its alternatives, or a wording of its style (`templates`); choices stand behind it;
2. the answer: its text or an alternative, after an explanation where there is one, or points (`points`);
3. the tag of the style before the first question (`system_prompts`);
4. the frame that tells users and assistants apart (`MessageFormat`).

Training draws wherever there is a choice, with the example's own generator; without a generator the first of all is
taken, which is what evaluation does. What precedes the last answer never depends on that answer then, so a prompt is
what training would have fed. `docs/prompts.md` shows the texts of all styles.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from molmo_model.data.example import POINT_MARK, UNLABELLED_STYLES, Conversation, Message
from molmo_model.errors import DataError
from molmo_model.model_config import (
    CHATML_END,
    CHATML_START,
    MessageFormat,
    PointFormat,
    PromptTemplates,
    SystemPrompt,
)
from molmo_model.preprocessing.marked import Marked
from molmo_model.preprocessing.points import count_to_text, points_to_text
from molmo_model.preprocessing.system_prompts import (
    DEFAULT_LENGTH,
    VIDEO_CHOICE_STYLES,
    draw_tag,
    tags,
    train_style,
)
from molmo_model.preprocessing.templates import (
    CHOICE_LAYOUTS,
    CHOICE_TEMPLATES,
    EXPLAINED,
    NO_POINTING,
    NO_POINTING_STYLES,
    QUESTION_TEMPLATES,
    TEMPLATES,
    UNLABELLED_LAYOUTS,
    fill,
    is_counting,
)

COUNTED_STYLES = frozenset({"scene_count", "point_count", "point_then_count"})
"""Styles whose points are answered as `Counting the <points ...> shows a total of N.`"""
COUNT_FIRST_STYLES = frozenset({"count_then_point"})
"""Styles whose points are answered as `There are N <points ...>.`"""
ANSWER = " Answer: "
"""What stands between an explanation and the short answer."""


@dataclass(frozen=True)
class PromptFormat:
    """What of a model's config decides its texts."""

    system_prompt: SystemPrompt = SystemPrompt.none
    message_format: MessageFormat = MessageFormat.none
    point_format: PointFormat = PointFormat.molmo_v1
    templates: PromptTemplates = PromptTemplates.uber_model
    length: int = DEFAULT_LENGTH
    """What evaluation says of the length of captions; 0 says nothing."""


@dataclass(frozen=True)
class _Turn:
    """One way to write a question and its answer: any of the questions goes with any of the answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def write(conversation: Conversation, form: PromptFormat, rng: np.random.Generator | None = None) -> list[str]:
    """The text of every message, user and assistant in turn, exactly as they are tokenized.

    Args:
        rng: draws; None takes the first of everything.

    Raises:
        DataError: naming the style, for a message that cannot be written.
    """
    said = [_draw(ways, rng) for ways in _turns(conversation, form)]
    style = train_style(conversation.style)
    tag = draw_tag(style, form.system_prompt, form.length, len(said[-1][1]), rng)
    return [text for place, (asked, answered) in enumerate(said) for text in _pair(asked, answered, place, tag, form)]


def asked(conversation: Conversation, form: PromptFormat) -> list[str]:
    """What `write` without a generator puts before the last answer, which is not looked at.

    Raises:
        DataError: as `write`.
    """
    said = [_draw(ways, None) for ways in _turns(conversation, form, last=False)]
    tag = draw_tag(train_style(conversation.style), form.system_prompt, form.length, 0, None)
    texts = [text for place, (ask, answered) in enumerate(said) for text in _pair(ask, answered, place, tag, form)]
    return texts[:-1]


def bodies(conversation: Conversation, form: PromptFormat) -> list[str]:
    """The same texts as `asked` before tag and frame: what a chat template is given.

    Raises:
        DataError: as `write`.
    """
    turns = (_draw(ways, None) for ways in _turns(conversation, form, last=False))
    return [text for turn in turns for text in turn][:-1]


def choices(conversation: Conversation, form: PromptFormat) -> list[tuple[str, ...]]:
    """For every message, user and assistant in turn, all texts that `write` may give it, that of evaluation first.

    Raises:
        DataError: as `write`.
    """
    turns = _turns(conversation, form)
    letters = [len(answered) for way in turns[-1] for answered in way.answers]
    every = tags(train_style(conversation.style), form.system_prompt, form.length, letters)
    texts: list[tuple[str, ...]] = []
    for place, ways in enumerate(turns):
        questions = tuple(dict.fromkeys(question for way in ways for question in way.questions))
        framed = (_framed(questions, tag, place == 0, form) for tag in (every if place == 0 else every[:1]))
        texts.append(tuple(dict.fromkeys(text for asked_as in framed for text in asked_as)))
        said = dict.fromkeys(answered for way in ways for answered in way.answers)
        texts.append(tuple(_said(answered, form) for answered in said))
    return texts


def questions(
    style: str, message: Message, templates: PromptTemplates = PromptTemplates.uber_model, points: bool = False
) -> tuple[str, ...]:
    """Every wording of a question without choices, that of evaluation first.

    Args:
        points: the answer has points in it.

    Raises:
        DataError: no text and no wording, or one that needs a label that is missing.
    """
    style = train_style(style)
    if message.text is None:
        return _wordings(style, message, templates)
    texts = (message.text, *message.alternatives)
    if templates is PromptTemplates.none:
        return texts
    frames = QUESTION_TEMPLATES.get(style) or (QUESTION_TEMPLATES[EXPLAINED] if EXPLAINED in style else ())
    if frames:
        return tuple(fill(frame, question=text) for text in texts for frame in frames)
    if style in NO_POINTING_STYLES and not points:
        return tuple(front + text for text in texts for front in (NO_POINTING if is_counting(text) else ("",)))
    return texts


def answer(style: str, message: Message, point_format: PointFormat = PointFormat.molmo_v1) -> str:
    """The text of an assistant message, without what explains it.

    Raises:
        DataError: neither text nor points, or points outside the picture.
    """
    if message.points is None:
        if message.text is None:
            raise DataError(f"an assistant message of style {style!r} has neither text nor points")
        return _with_points(message, point_format)
    label = (message.label or "").lower()
    if style in COUNTED_STYLES or style in COUNT_FIRST_STYLES:
        return count_to_text(message.points, label, point_format, first=style in COUNT_FIRST_STYLES)
    return points_to_text(message.points, label, point_format)


def end_of_answer(message_format: MessageFormat) -> str | None:
    """The special token that ends answers; None is the tokenizer's end of text."""
    return CHATML_END if message_format is MessageFormat.chatml else None


def image_prefix(number: int) -> str:
    """The text before image `number` (from 1) of an example with several."""
    return f"Image {number}"


# --- questions and answers


def _turns(conversation: Conversation, form: PromptFormat, last: bool = True) -> list[list[_Turn]]:
    """For every question with its answer the ways to write them, that of evaluation first.

    Args:
        last: False leaves the last answer out, as `?`.
    """
    messages = conversation.messages
    pairs = list(zip(messages[::2], messages[1::2], strict=True))
    return [
        _ways(conversation.style, ask, said, form, told=last or place < len(pairs) - 1)
        for place, (ask, said) in enumerate(pairs)
    ]


def _ways(style: str, ask: Message, said: Message, form: PromptFormat, told: bool) -> list[_Turn]:
    if ask.options:
        return _choice_ways(train_style(style), ask, said, form, told)
    pointed = said.points is not None or bool(said.inline)
    return [_Turn(questions(style, ask, form.templates, pointed), _answers(style, said, form) if told else ("?",))]


def _answers(style: str, said: Message, form: PromptFormat) -> tuple[str, ...]:
    """Every wording of an answer."""
    texts = (answer(train_style(style), said, form.point_format), *said.alternatives)
    return _explained(said, texts)


def _explained(said: Message, texts: Sequence[str]) -> tuple[str, ...]:
    """The answers behind their explanation, where there is one; `?` where there are none."""
    front = "" if said.explanation is None else said.explanation + ANSWER
    return tuple(front + text for text in texts or ("?",))


def _choice_ways(style: str, ask: Message, said: Message, form: PromptFormat, told: bool) -> list[_Turn]:
    """A question with choices: one way for every layout, or without layouts one in all."""
    asked_as = (ask.text or "", *ask.alternatives)
    names = _option_names(style, ask.options)
    right = [_right_option(style, text or "", ask.options) for text in (said.text, *said.alternatives)] if told else []
    if form.templates is not PromptTemplates.uber_model_v2:
        listed = [f"{text}\n{_listed(style, ask.options)}" for text in asked_as]
        questions_ = tuple(f"{text}\n" for text in listed)
        if form.templates is PromptTemplates.uber_model and style in VIDEO_CHOICE_STYLES:
            body = _listed(style, ask.options)
            questions_ = tuple(
                fill(frame, question=text, options=body) for text in asked_as for frame in CHOICE_TEMPLATES
            )
        return [_Turn(questions_, _explained(said, [names[place] for place in right]))]
    layouts = UNLABELLED_LAYOUTS if style in UNLABELLED_STYLES else CHOICE_LAYOUTS
    return [_laid_out(layout.write(text, ask.options), said, right) for text in asked_as for layout in layouts]


def _laid_out(written: tuple[str, list[str]], said: Message, right: Sequence[int]) -> _Turn:
    text, answers = written
    return _Turn((text,), _explained(said, [answers[place] for place in right]))


def _option_names(style: str, options: Sequence[str]) -> list[str]:
    """What an answer calls each choice: its letter, or itself in styles without letters."""
    if style in UNLABELLED_STYLES:
        return list(options)
    return [chr(ord("A") + place) for place in range(len(options))]


def _listed(style: str, options: Sequence[str]) -> str:
    """The choices, one a line, lettered where the style does not leave the letters out."""
    if style in UNLABELLED_STYLES:
        return "\n".join(options)
    return "\n".join(f"{name}: {option}" for name, option in zip(_option_names(style, options), options, strict=True))


def _right_option(style: str, text: str, options: Sequence[str]) -> int:
    """The place of the choice that an answer names, or is."""
    names = _option_names(style, options)
    if text in names:
        return names.index(text)
    if text in options:
        return list(options).index(text)
    what = "one of them" if style in UNLABELLED_STYLES else f"a letter from A to {names[-1]}, or one of them"
    raise DataError(
        f"the answer to a question of style {style!r} is {text!r}; with {len(names)} options it must be {what}"
    )


def _wordings(style: str, message: Message, templates: PromptTemplates) -> tuple[str, ...]:
    """What stands for a question without text."""
    label = (message.label or "").lower()
    if templates is PromptTemplates.none:
        return (label,)
    if style not in TEMPLATES:
        known = ", ".join(sorted(TEMPLATES))
        raise DataError(f"a user message of style {style!r} has no text, and only these have templates: {known}")
    if message.label is None and any("{label}" in template for template in TEMPLATES[style]):
        raise DataError(f"a user message of style {style!r} has neither text nor the label that its prompt asks for")
    return tuple(fill(template, label=label) for template in TEMPLATES[style])


def _with_points(message: Message, point_format: PointFormat) -> str:
    """An answer's text with its inline points as tags."""
    tags_ = iter(points_to_text(one.points, one.text, point_format, alt=one.label) for one in message.inline)
    return (
        re.sub(re.escape(POINT_MARK), lambda _: next(tags_), message.text or "")
        if message.inline
        else message.text or ""
    )


# --- draws and frames


def _draw(ways: Sequence[_Turn], rng: np.random.Generator | None) -> tuple[str, str]:
    """A question and its answer; one draw for each choice."""
    way = ways[_pick(len(ways), rng)]
    question = way.questions[_pick(len(way.questions), rng)]
    return question, way.answers[_pick(len(way.answers), rng)]


def _pick(count: int, rng: np.random.Generator | None) -> int:
    return 0 if rng is None or count == 1 else int(rng.integers(count))


def _pair(question: str, answered: str, place: int, tag: str, form: PromptFormat) -> tuple[str, str]:
    return _frame(question, tag if place == 0 else "", place, form), _said(answered, form)


@lru_cache(4096)
def _framed(questions: tuple[str, ...], tag: str, first: bool, form: PromptFormat) -> tuple[str, ...]:
    """Questions as they are framed; remembered, because wordings without labels come back in every example."""
    return tuple(_frame(question, tag, 0 if first else 1, form) for question in questions)


def _said(answered: str, form: PromptFormat) -> str:
    """An answer as it is framed."""
    return answered if form.message_format is MessageFormat.chatml else " " + answered


def _frame(text: str, tag: str, place: int, form: PromptFormat) -> str:
    """A question with what the formats put around it.

    Raises:
        DataError: there is nothing to put it around, and nothing would be left to predict the answer from.
    """
    first = place == 0
    if first and tag:
        text = f"{tag} {text}" if text else tag
    if form.message_format is MessageFormat.chatml:
        begin = "user\n" + text
        return Marked("" if first else "\n", CHATML_START, begin, CHATML_END, "\n", CHATML_START, "assistant\n")
    if form.message_format is MessageFormat.role:
        text = f"User: {text} Assistant:"
    if not text:
        raise DataError(
            "a question is empty: prompt_templates none adds nothing, and neither do system_prompt "
            f"{form.system_prompt.value} and message_format {form.message_format.value}; choose others"
        )
    return text if first else " " + text
