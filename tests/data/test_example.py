"""The one form of an example: what it refuses, and that JSON keeps it whole."""

import copy
import json

import pytest

from molmo_model.data.example import (
    POINT_MARK,
    Conversation,
    Example,
    ExampleError,
    Image,
    InlinePoints,
    Message,
    item_id,
    plain_problem,
)
from molmo_model.errors import DataError

PICTURE = Image(b"picture bytes", 640, 480, "JPEG")


def conversation(**changes):
    fields = {"style": "chat", "messages": (Message("user", "What is it?"), Message("assistant", "A cat."))}
    return Conversation(**{**fields, **changes})


def example(**changes):
    fields = {"id": "cat-1", "images": (PICTURE,), "conversations": (conversation(),), "metadata": {"a": [1, None]}}
    return Example(**{**fields, **changes})


def pointing(points, label="cat"):
    return conversation(messages=(Message("user", label="cat"), Message("assistant", points=points, label=label)))


def test_json_keeps_everything():
    whole = example(
        images=(PICTURE, Image(b"other", 1, 2, "PNG")),
        conversations=(
            conversation(weight=0.5, metadata={"answers": ["Katze", "ネコ"], "area": 0.25}),
            pointing(((10.5, 20.0), (0.0, 100.0))),
            pointing(()),
        ),
    )
    text = json.dumps(whole.to_json())
    again = Example.from_json(json.loads(text), [image.data for image in whole.images])
    assert again == whole
    assert again.content_hash() == whole.content_hash()
    assert "picture bytes" not in text


@pytest.mark.parametrize(
    "changed",
    [
        example(id="cat-2"),
        example(images=(Image(b"picture byteZ", 640, 480, "JPEG"),)),
        example(images=(Image(b"picture bytes", 641, 480, "JPEG"),)),
        example(conversations=(conversation(weight=2.0),)),
        example(conversations=(conversation(style="qa"),)),
        example(conversations=(conversation(metadata={"x": 1}),)),
        example(metadata={}),
    ],
)
def test_content_hash_sees_every_part(changed):
    assert changed.content_hash() != example().content_hash()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": 7}, "id"),
        ({"conversations": ()}, "conversations"),
        ({"images": (Image(b"", 1, 1, "PNG"),)}, "images[0].data"),
        ({"images": (Image(b"x", 0, 1, "PNG"),)}, "images[0].width"),
        ({"images": (Image(b"x", 1, 1.0, "PNG"),)}, "images[0].height"),
        ({"images": (Image(b"x", 1, 1, ""),)}, "images[0].format"),
        ({"metadata": {"a": {"b": [float("nan")]}}}, "metadata.a.b[0]"),
        ({"metadata": {"a": (1, 2)}}, "metadata.a"),
        ({"metadata": {1: 2}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"conversations": (conversation(style=""),)}, "conversations[0].style"),
        ({"conversations": (conversation(weight=0.0),)}, "conversations[0].weight"),
        ({"conversations": (conversation(weight=float("inf")),)}, "conversations[0].weight"),
        ({"conversations": (conversation(weight=10**400),)}, "conversations[0].weight"),
        ({"conversations": (conversation(messages=()),)}, "conversations[0].messages"),
        ({"conversations": (conversation(messages=(Message("user", "hm"),)),)}, "conversations[0].messages"),
        (
            {"conversations": (conversation(messages=(Message("assistant", "a"), Message("user", "b"))),)},
            "conversations[0].messages[0].role",
        ),
        (
            {"conversations": (conversation(messages=(Message("user", "a"), Message("assistant", " \n"))),)},
            "conversations[0].messages[1].text",
        ),
        (
            {"conversations": (conversation(messages=(Message("user", "a"), Message("assistant"))),)},
            "conversations[0].messages[1]",
        ),
        ({"conversations": (conversation(), pointing(((1.0, 100.1),)))}, "conversations[1].messages[1].points[0]"),
        ({"conversations": (pointing(((1.0, float("nan")),)),)}, "conversations[0].messages[1].points[0]"),
        ({"conversations": (pointing(((1.0, 2.0, 3.0),)),)}, "conversations[0].messages[1].points[0]"),
        ({"conversations": (pointing(((1.0, 2.0),), label=None),)}, "conversations[0].messages[1].label"),
        ({"conversations": (pointing(((1.0, 2.0),)),), "images": ()}, "conversations[0].messages[1].points"),
    ],
)
def test_refuses_what_no_example_may_be(changes, field):
    with pytest.raises(ExampleError) as error:
        example(**changes)
    assert error.value.field == field
    assert field in str(error.value)
    assert repr(changes.get("id", "cat-1")) in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("extra",), 1, "example"),
        (("images",), {}, "images"),
        (("images", 0, "sha256"), "0" * 64, "images[0].sha256"),
        (("images", 0, "mime"), "x", "images[0]"),
        (("conversations",), "text", "conversations"),
        (("conversations", 0, "messages", 0, "content"), "x", "conversations[0].messages[0]"),
        (("conversations", 0, "messages", 1, "points"), 3, "conversations[0].messages[1].points"),
        (("conversations", 0, "metadata"), [], "conversations[0].metadata"),
    ],
)
def test_json_that_is_not_as_written_is_refused(path, value, field):
    raw = copy.deepcopy(example().to_json())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(DataError, match=r"'cat-1'") as error:
        Example.from_json(raw, [PICTURE.data])
    assert error.value.field == field


def test_a_missing_field_and_other_bytes_are_refused():
    raw = example().to_json()
    with pytest.raises(DataError, match=r"describes 1 images, but 2"):
        Example.from_json(raw, [b"a", b"b"])
    with pytest.raises(DataError, match=r"images\[0\].sha256"):
        Example.from_json(raw, [b"other bytes"])
    assert Example.from_json(raw, [b"other bytes"], verify=False).images[0].data == b"other bytes"
    del raw["conversations"][0]["weight"]
    with pytest.raises(DataError, match=r"lacks \['weight'\]"):
        Example.from_json(raw, [PICTURE.data])


def explained(**answer):
    """A picture's question, answered with an explanation and with points inside the text."""
    text = {"text": f"the {POINT_MARK}", "explanation": "It is red."}
    inline = (InlinePoints(((1.0, 2.5), (3.0, 4.0)), "left ones", "cars"),)
    said = Message("assistant", **{**text, "inline": inline, **answer})
    return Conversation("point_qa", (Message("user", "which?"), said))


def test_explanations_and_inline_points_come_back():
    made = example(conversations=(explained(),))
    raw = json.loads(json.dumps(made.to_json()))
    assert raw["conversations"][0]["messages"][1]["inline"] == [
        {"points": [[1.0, 2.5], [3.0, 4.0]], "text": "left ones", "label": "cars"}
    ]
    assert Example.from_json(raw, [PICTURE.data]) == made
    assert not {"inline", "explanation"} & set(example().to_json()["conversations"][0]["messages"][1])


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"text": "no mark"}, "inline"),
        ({"text": POINT_MARK * 2}, "inline"),
        ({"inline": (InlinePoints((), "a", "a"),)}, "inline[0].points"),
        ({"inline": (InlinePoints(((1.0, 101.0),), "a", "a"),)}, "inline[0].points[0]"),
        ({"inline": (InlinePoints(((1.0, 1.0),), 3, "a"),)}, "inline[0].text"),
        ({"alternatives": ("b",)}, "inline"),
        ({"explanation": " "}, "explanation"),
        ({"text": None, "points": ((1.0, 1.0),), "label": "a", "inline": ()}, "explanation"),
    ],
)
def test_refuses_parts_of_an_answer_that_do_not_fit(answer, field):
    with pytest.raises(ExampleError) as error:
        example(conversations=(explained(**answer),))
    assert error.value.field == f"conversations[0].messages[1].{field}"


def choosing(answer, options, style="science_qa", **more):
    """A question with choices."""
    turns = (Message("user", "which?", options=options), Message("assistant", answer, **more))
    return Conversation(style, turns)


def test_equal_options_are_told_apart_by_their_letters():
    """Published benchmarks repeat choices by mistake; their right letter is still one."""
    made = example(conversations=(choosing("C", ("a cat", "a cat", "a dog"), alternatives=("a dog",)),))
    assert Example.from_json(json.loads(json.dumps(made.to_json())), [PICTURE.data]) == made


@pytest.mark.parametrize(
    ("talk", "field", "reason"),
    [
        (choosing("a cat", ("a cat", "a cat")), "messages[1].text", "2 options are; name its letter"),
        (choosing("A", ("a", "b"), alternatives=("C",)), "messages[1].text", "none of the options and no letter"),
        (choosing("A", ("a", "b"), "ai2_diagram_no_letter"), "messages[1].text", "is 'A', none of the options$"),
        (choosing("b", ("a", "b", "a"), "ai2_diagram_no_letter"), "messages[0].options[2]", "is options.0. again"),
        (choosing("A", ("a",)), "messages[0].options", "2 to 26"),
        (choosing("A", ("a", " ")), "messages[0].options[1]", "not empty"),
    ],
)
def test_refuses_choices_that_do_not_fit(talk, field, reason):
    with pytest.raises(ExampleError, match=reason) as error:
        example(conversations=(talk,))
    assert error.value.field == f"conversations[0].{field}"


def test_item_ids_and_plain_values():
    assert item_id(example(), 3) == "cat-1#3"
    assert plain_problem({"a": [1, 2.5, "x", None, True, {"b": []}]}, "m") is None
    assert plain_problem([1, [object()]], "m") == ("m[1][0]", "is a object, which is not plain JSON")
