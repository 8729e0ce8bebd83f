"""Texts of questions and answers."""

import numpy as np
import pytest

from molmo_model.data.example import Conversation, Message
from molmo_model.errors import DataError
from molmo_model.preprocessing.prompts import TEMPLATES, MessageFormat, SystemPrompt, answer, choices, draw
from tests.preprocessing.examples import asked

PLAIN = (SystemPrompt.none, MessageFormat.none)


def pointing(points, style="point", label="Red Cars") -> Conversation:
    return Conversation(style, (Message("user", label=label), Message("assistant", points=points, label=label)))


def test_first_template_without_a_generator():
    for style, templates in TEMPLATES.items():
        conversation = pointing(((1.0, 2.0),), style)
        assert draw(choices(conversation, *PLAIN), None)[0] == templates[0].replace("{label}", "red cars")


def test_a_generator_draws_every_template_and_repeats_itself():
    conversation = pointing(((1.0, 2.0),))
    texts = choices(conversation, *PLAIN)
    drawn = [draw(texts, np.random.default_rng([7, n]))[0] for n in range(100)]
    assert set(drawn) == {template.replace("{label}", "red cars") for template in TEMPLATES["point"]}
    assert drawn == [draw(texts, np.random.default_rng([7, n]))[0] for n in range(100)]


@pytest.mark.parametrize("style", ["qa", "scene_point", "a style of mine"])
def test_text_is_used_as_it_is(style):
    for rng in (None, np.random.default_rng(0)):
        texts = draw(choices(asked("What {label} is THIS?", "A cat.", style), *PLAIN), rng)
        assert texts == ["What {label} is THIS?", " A cat."]


@pytest.mark.parametrize("style", ["qa", "chat", "scene_qa", "chart_qa", "mine"])
def test_without_text_and_template(style):
    with pytest.raises(DataError, match=f"style '{style}' has no text"):
        choices(asked(None, "yes", style), *PLAIN)


def test_without_the_label_that_a_template_needs():
    with pytest.raises(DataError, match="'point' has neither text nor the label"):
        choices(asked(None, "yes", "point"), *PLAIN)
    choices(asked(None, "a cat", "caption"), *PLAIN)


def test_answers_with_points():
    two = Message("assistant", points=((60.0, 5.0), (10.0, 20.0)), label="Red Cars")
    tag = '<points x1="10.0" y1="20.0" x2="60.0" y2="5.0" alt="red cars">red cars</points>'
    assert answer("point", two) == answer("scene_point", two) == answer("chat", two) == tag
    assert answer("point_count", two) == answer("scene_count", two) == f"Counting the {tag} shows a total of 2."
    assert answer("point_count", Message("assistant", points=(), label="a")) == "There are none."
    with pytest.raises(DataError, match="neither text nor points"):
        answer("point", Message("assistant"))


def test_formats_of_several_turns():
    turns = ("First?", "One.", "Second?", "Two.")
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    talk = Conversation("chat", messages)
    assert draw(choices(talk, *PLAIN), None) == ["First?", " One.", " Second?", " Two."]
    assert draw(choices(talk, SystemPrompt.style, MessageFormat.none), None)[::2] == ["chat: First?", " Second?"]
    assert draw(choices(talk, SystemPrompt.style, MessageFormat.role), None) == [
        "User: chat: First? Assistant:",
        " One.",
        " User: Second? Assistant:",
        " Two.",
    ]
