"""Points as text and back; an XML parser and a brute-force reading are the oracles."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo_model.errors import DataError
from molmo_model.preprocessing.points import NO_POINTS, count_to_text, extract_points, points_to_text, sorted_points

percent = st.floats(0, 100, allow_nan=False)
points = st.lists(st.tuples(percent, percent), min_size=1, max_size=30)
labels = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=20)


def test_the_written_forms():
    assert points_to_text([(10.5, 20)], "cat") == '<point x="10.5" y="20.0" alt="cat">cat</point>'
    assert points_to_text([(61.24, 9.87), (10.5, 20)], "cats") == (
        '<points x1="10.5" y1="20.0" x2="61.2" y2="9.9" alt="cats">cats</points>'
    )
    assert count_to_text([(1, 2), (3, 4), (1, 1)], "cats") == (
        'Counting the <points x1="1.0" y1="1.0" x2="1.0" y2="2.0" x3="3.0" y3="4.0" alt="cats">cats</points> '
        "shows a total of 3."
    )
    assert points_to_text([], "cats") == count_to_text([], "cats") == NO_POINTS == "There are none."


def test_sorted_after_rounding():
    """10.04 and 9.96 are both 10.0 once rounded, so y decides."""
    assert sorted_points([(10.04, 5), (9.96, 7), (9.94, 9)]) == [(9.9, 9.0), (10.0, 5.0), (10.0, 7.0)]
    assert sorted_points([(-0.0, 0)]) == [(0.0, 0.0)] and "-" not in points_to_text([(-0.0, -0.0)], "")


@given(points, labels)
def test_round_trip(some, label):
    rounded = sorted(((round(x, 1), round(y, 1)) for x, y in some), key=lambda point: point[0] * 10000 + point[1])
    for text in (points_to_text(some, label), count_to_text(some, label)):
        assert extract_points(text) == rounded


@given(points, labels)
def test_an_xml_parser_reads_the_same(some, label):
    tag = ElementTree.fromstring(points_to_text(some, label))
    assert tag.tag == ("point" if len(some) == 1 else "points")
    assert (tag.text or "") == tag.get("alt") == label
    numbers = [""] if len(some) == 1 else range(1, len(some) + 1)
    assert [(float(tag.get(f"x{i}")), float(tag.get(f"y{i}"))) for i in numbers] == sorted_points(some)


def test_a_label_cannot_forge_points():
    label = '"></point><point x="1.0" y="2.0" alt="(30.0, 40.0) Click(5.0, 6.0) p=111,222'
    assert extract_points(points_to_text([(50, 60)], label)) == [(50.0, 60.0)]


def test_the_caller_keeps_its_points():
    mine = np.array([[60.123, 5.5], [1.27, 99.0]])
    before = mine.copy()
    as_list = mine.tolist()
    points_to_text(mine, "a")
    points_to_text(as_list, "a")
    count_to_text(as_list, "a")
    np.testing.assert_array_equal(mine, before)
    assert as_list == before.tolist()


@pytest.mark.parametrize("bad", [(100.1, 5), (5, -0.1), (math.nan, 5), (5, math.inf)])
def test_points_outside_are_refused(bad):
    with pytest.raises(DataError, match="outside the picture"):
        points_to_text([(1, 1), bad], "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<point x="10.5" y="20" alt="a">a</point>', [(10.5, 20.0)]),
        ('<point x=" 10.5" y=" 20.0" alt="a">a', [(10.5, 20.0)]),
        ('<points x1="1.0" y1="2.0" x2="3.0" y2="4.0" alt="a">a</points>', [(1, 2), (3, 4)]),
        ('<points x1="1.0" y1="2.0" x2="3.0" y2="4.0" x3="5.', [(1, 2), (3, 4)]),  # cut off
        ('<point x="1.0" y="2.0" alt="a">a</point> and <point x="3.0" y="4.0" alt="b">b</point>', [(1, 2), (3, 4)]),
        ("Click(10.5, 20.0)", [(10.5, 20.0)]),
        ("(10.5, 20.0) and (1.0,2.0) and (3.0 4.0)", [(10.5, 20.0), (1, 2), (3, 4)]),
        ("(10, 20) (10.55, 20.0) [10.5, 20.0]", []),  # exactly one decimal, round brackets
        ("1=105,200 2 = 010 , 999", [(10.5, 20.0), (1.0, 99.9)]),
        ("p=105,200", [(10.5, 20.0)]),
        ("p=105,2000", []),
        ('<point x="100.1" y="20.0" alt="a">a</point>', []),
        ('<points x1="1.0" y1="200.0" x2="3.0" y2="100.0" alt="a">a</points>', [(3, 100)]),
        ("", []),
        (NO_POINTS, []),
    ],
)
def test_formats_that_are_read(text, expected):
    assert extract_points(text) == expected


@given(st.text(alphabet='<point s/x1y2="0.5>Click(,)p=alt ', max_size=200))
def test_anything_can_be_read(text):
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in extract_points(text))
