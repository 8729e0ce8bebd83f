"""Points in all published formats, boxes and counts: what is written is read back, what is outside is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_model.data.example import Conversation, Message
from molmo_model.errors import DataError
from molmo_model.model_config import PointFormat
from molmo_model.preprocessing import prompts
from molmo_model.preprocessing.points import (
    NO_POINTS,
    Located,
    count_to_text,
    extract_points,
    frames_to_text,
    parse_exact,
    points_to_text,
    read_points,
    sorted_points,
)
from molmo_model.preprocessing.structured import boxes_to_text, parse_count, read_boxes

HTML = [PointFormat.html_v1, PointFormat.html_v2]
percent = st.floats(0, 100, allow_nan=False)
points = st.lists(st.tuples(percent, percent), min_size=1, max_size=12)
labels = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=20)
grid = st.integers(0, 999)


def tenths(some):
    """Points on the written grid, in the written order."""
    return sorted((round(x * 10) / 10, round(y * 10) / 10) for x, y in some)


# --- points


@pytest.mark.parametrize("style", HTML)
def test_the_written_form(style):
    assert (
        points_to_text([(50, 12), (4.2, 31)], "cats", style) == '<points coords="1 1 042 310 2 500 120">cats</points>'
    )
    assert points_to_text([(100, 0)], "a", style) == '<points coords="1 1 1000 000">a</points>'
    assert count_to_text([(50, 12), (4.2, 31)], "cats", style) == (
        'Counting the <points coords="1 1 042 310 2 500 120">cats</points> shows a total of 2.'
    )
    assert points_to_text([], "a", style) == frames_to_text([(1, [])], "a", style) == NO_POINTS


def test_pictures_and_frames_are_separated_and_the_index_goes_on():
    frames = [(1, [(50, 12), (4.2, 31)]), (2, []), (3, [(0, 99.9)])]
    assert (
        frames_to_text(frames, "a", PointFormat.html_v1)
        == '<points coords="1 1 042 310 2 500 120\t3 3 000 999">a</points>'
    )
    assert (
        frames_to_text(frames, "a", PointFormat.html_v2)
        == '<points coords="1 1 042 310 2 500 120;3 3 000 999">a</points>'
    )
    clip = frames_to_text([(0.5, [(1, 2)]), (12.25, [(3, 4)])], "a", PointFormat.html_v2)
    assert clip == '<points coords="0.5 1 010 020;12.2 2 030 040">a</points>'
    with pytest.raises(DataError, match="molmo_v1 cannot say in which picture"):
        frames_to_text(frames, "a", PointFormat.molmo_v1)


@given(points, labels, st.sampled_from(PointFormat))
def test_round_trip_in_every_format(some, label, style):
    for text in (points_to_text(some, label, style), count_to_text(some, label, style)):
        reading = read_points(text)
        assert [(point.x, point.y) for point in reading.points] == parse_exact(text) == extract_points(text)
        assert (reading.outside, reading.malformed) == (0, 0)
        assert extract_points(text) == (tenths(some) if style in HTML else sorted_points(some))


@given(st.lists(points, min_size=1, max_size=5), labels, st.sampled_from(HTML), st.booleans())
def test_round_trip_of_several_pictures_and_of_clips(several, label, style, clip):
    frames = [(n / 2 if clip else n, some) for n, some in enumerate(several, start=1)]
    found = read_points(frames_to_text(frames, label, style)).points
    expected = [(frame, *point) for frame, some in frames for point in tenths(some)]
    assert [(point.frame, point.x, point.y) for point in found] == expected
    assert [point.index for point in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("style", HTML)
def test_a_label_cannot_forge_points(style):
    label = '</points><points coords="1 1 111 222">(30.0, 40.0) p=111,222'
    assert extract_points(points_to_text([(50, 60)], label, style)) == [(50.0, 60.0)]


@pytest.mark.parametrize("style", PointFormat)
@pytest.mark.parametrize("bad", [(100.04, 5), (5, -0.04), (float("nan"), 5)])
def test_points_outside_are_refused_before_rounding(style, bad):
    with pytest.raises(DataError, match="outside the picture"):
        points_to_text([(1, 1), bad], "a", style)


@pytest.mark.parametrize(
    ("text", "expected", "outside", "malformed"),
    [
        ('<points coords="1 1 042 310 2 500 120">a</points>', [(4.2, 31), (50, 12)], 0, 0),
        ('<points alt="x" coords="1 1 042 310">a</points>', [(4.2, 31)], 0, 0),
        ('<points coords="1 1 042 310:2 2 500 120">a</points>', [(4.2, 31), (50, 12)], 0, 0),
        ('<points coords="1 1 042 310,2 2 500 120"/>', [(4.2, 31), (50, 12)], 0, 0),
        ('<points coords="1 1 042 310 2 500 12', [(4.2, 31)], 0, 1),  # cut off
        ('<points coords="1 1 042 1001 2 500 120">a</points>', [(50, 12)], 1, 0),
        ('<points coords="1 1 042 310 2 50 120">a</points>', [(4.2, 31)], 0, 1),
        ('<points coords="none">a</points>', [], 0, 1),
        ('<point x="-1.0" y="20.0" alt="a">a</point>', [], 1, 0),
        ('<points x1="1.0" y1="2.0" x2="3.0" alt="a">a</points>', [(1, 2)], 0, 1),
        ('<points x1="1.0" y1="2.0" x2="3.0" y2="100.1" alt="a">a</points>', [(1, 2)], 1, 0),
        ("Click(10.5, 200.0)", [], 1, 0),
        ("<points 1.5 1 42.0 31.0 2 50.0 12.5/>", [(42, 31), (50, 12.5)], 0, 0),
        ("<points 1.5 1 42.0 131.0/>", [], 1, 0),
    ],
)
def test_formats_that_are_read(text, expected, outside, malformed):
    reading = read_points(text)
    assert [(point.x, point.y) for point in reading.points] == expected
    assert (reading.outside, reading.malformed) == (outside, malformed)
    assert parse_exact(text) is None or not (outside or malformed)


def test_tracks_are_read_with_times_and_objects():
    text = '<tracks coords="0.0 1 100 200 2 300 400\t0.5 1 110 210">dogs</tracks>'
    assert read_points(text).points == (
        Located(10.0, 20.0, 0.0, 1),
        Located(30.0, 40.0, 0.0, 2),
        Located(11.0, 21.0, 0.5, 1),
    )


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ('<points coords="1 1 042 310">a</points>', True),
        ('There are 1 <points coords="1 1 042 310">a</points>.', True),
        ('Counting the <points coords="1 1 042 310">a</points> shows a total of 1.', True),
        ('I see <points coords="1 1 042 310">a</points>', False),
        ('<points coords="1 1 042 310">a</points><points coords="1 1 042 310">a</points>', False),
        ('<points coords="1 1 042 310">a', False),
        ('<points coords="1 1 042">a</points>', False),
        ("(10.0, 20.0)", False),
    ],
)
def test_whole_answers(text, exact):
    assert (parse_exact(text) == [(4.2, 31.0)]) is exact
    assert exact or parse_exact(text) is None


@given(st.text(alphabet='<pointsracked 0123/x="19.5>;\t,:Click()', max_size=200))
def test_anything_can_be_read(text):
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in extract_points(text))
    read_boxes(text, list_scale=1000)
    parse_count(text)


def test_the_models_format_decides_what_is_taught():
    message = Message("assistant", points=((50.0, 12.0),), label="Cat")
    conversation = Conversation("point", (Message("user", "Where?"), message))
    texts = prompts.choices(conversation, prompts.PromptFormat(point_format=PointFormat.html_v2))
    assert texts[-1] == (' <points coords="1 1 500 120">cat</points>',)


# --- boxes

boxes = st.lists(
    st.tuples(grid, grid, grid, grid)
    .map(lambda b: (*sorted(b[::2]), *sorted(b[1::2])))
    .filter(lambda b: b[0] < b[1] and b[2] < b[3])
    .map(lambda b: (b[0] / 10, b[2] / 10, b[1] / 10, b[3] / 10)),
    min_size=1,
    max_size=6,
)


@given(boxes, labels, st.sampled_from(PointFormat))
def test_boxes_round_trip_in_every_format(some, label, style):
    reading = read_boxes(boxes_to_text(some, label, style))
    assert reading.boxes == tuple(sorted(some)) and reading.rejected == 0


def test_boxes_as_text():
    assert boxes_to_text([(10.5, 20, 61.2, 80)], "cat") == (
        '<points x1="10.5" y1="20.0" x2="61.2" y2="80.0" alt="cat">cat</points>'
    )
    assert boxes_to_text([], "cat") == NO_POINTS
    for bad in [(10, 10, 10.04, 20), (20, 10, 10, 20), (10, 10, 20, 100.1), (-1, 0, 5, 5)]:
        with pytest.raises(DataError, match="no box inside the picture"):
            boxes_to_text([bad], "cat")


@pytest.mark.parametrize(
    ("text", "scale", "expected", "rejected"),
    [
        ("(10.0, 20.0), (30.0, 40.0)", None, [(10, 20, 30, 40)], 0),
        ("(30.0, 40.0), (10.0, 20.0)", None, [], 1),
        ("(10.0, 20.0), (30.0, 40.0), (50.0, 60.0)", None, [(10, 20, 30, 40)], 1),
        ("(10.0, 20.0), (30.0, 400.0), (50.0, 60.0), (70.0, 80.0)", None, [], 2),
        ("[100, 200, 300, 400]", None, [], 0),
        ("[100, 200, 300, 400]", 1000, [(10, 20, 30, 40)], 0),
        ("the cat [0.1, 0.2, 0.3, 0.4], the dog (0.5,0.5,1,1)", 1, [(10, 20, 30, 40), (50, 50, 100, 100)], 0),
        ("[10, 20, 30, 140]", 100, [], 1),
        ("[-1, 20, 30, 40]", 100, [], 1),
        ("no box", 100, [], 0),
    ],
)
def test_boxes_that_are_read(text, scale, expected, rejected):
    reading = read_boxes(text, scale)
    assert len(reading.boxes) == len(expected)
    for found, wanted in zip(reading.boxes, expected, strict=True):
        assert found == pytest.approx(wanted)
    assert reading.rejected == rejected


# --- counts


@given(points, st.sampled_from(PointFormat))
def test_counts_round_trip(some, style):
    assert parse_count(count_to_text(some, "cats", style)) == len(some)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("seventeen", 17),
        ("There are 3 cats.", 3),
        ('There are 2 <points coords="1 1 042 310 2 500 120">cats</points>.', 2),
        ("There is one dog", 1),
        ("There are none.", 0),
        ("There are none to see", 0),
        ("someone", None),
        ("none", 0),
        ("phone 3 of them", None),
        ("a total of 4 cats", 4),
        ("a total of many", None),
        ('<points coords="1 1 042 310">cats</points>', None),
    ],
)
def test_counts_that_are_read(text, number):
    assert parse_count(text) == number
