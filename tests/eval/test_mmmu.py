"""MMMU against what its official code gives for the same answers."""

import random

import pytest

from molmo_model.eval.metrics import METRICS
from molmo_model.eval.metrics.letters import parse_letter
from molmo_model.eval.metrics.mmmu import DISCIPLINES, open_equal, parse_open

CHARACTERS = ["Protagonist", "Round character", "Character foil", "Shape"]
ELECTRONICS = ["yes, saturation", "no, not in saturation"]


def choice(answer, options, **metadata):
    right = "ABCD".index(answer)
    return {
        "answer": answer,
        "metadata": {"options": options, "answer_index": right, "answer": options[right]} | metadata,
    }


@pytest.mark.parametrize(
    ("response", "options", "letter"),
    [
        ("(A)", ELECTRONICS, "A"),
        ("C", CHARACTERS, "C"),
        ("C\n", CHARACTERS, "C"),
        ("B)", CHARACTERS, "B"),
        ("The answer is (A). Not (C).", CHARACTERS, "C"),
        ("A) is wrong. (B) is right. D.", CHARACTERS, "B"),
        ("A. no; B: yes", CHARACTERS, "A"),
        ("I pick D here", CHARACTERS, "D"),
        ("I think that it must be a round character here", CHARACTERS, "B"),
        ("Round character", CHARACTERS, None),  # five words or fewer are not searched for texts
        ("first the protagonist and then the shape it is", CHARACTERS, "D"),
        ("[(1 -", CHARACTERS, None),
        ("", CHARACTERS, None),
        ("c", CHARACTERS, None),
        ("made in the USA.", CHARACTERS, None),
        ("made in the USA. in 2010", CHARACTERS, "A"),
    ],
)
def test_letters_are_read_as_officially_and_never_drawn(response, options, letter):
    assert parse_letter(response, options) == (None if letter is None else "ABCD".index(letter))
    score = METRICS["mmmu"].score(response, choice("A", options))
    assert score.values["mmmu"] == score.values["multiple_choice"] == float(letter == "A")
    assert score.parsed is (letter is not None)
    assert score.read == letter


@pytest.mark.parametrize(
    ("response", "values"),
    [
        ("36 watts", {"36 watts", 36.0}),
        ("The answer is 36.", {36.0}),
        ("so x = 3,000.5", {3000.5, 3000.0, 0.5}),
        ("between 3 and 5", {"between 3 and 5", 3.0, 5.0}),
        ("Therefore the result is 1.5e3 W", {"1.5e3 w", 1500.0, 1.0, 3.0}),
        ("yes", {"yes"}),
        ("it is the third one", {"the third one"}),
        ("final answer: a", {"answer: a"}),
        ("-4", {-4.0}),
        ("0.333", {0.33}),
        ("x", {" x", "x "}),
        ("", {""}),
    ],
)
def test_open_answers_are_taken_apart_as_officially(response, values):
    assert parse_open(response) == values


@pytest.mark.parametrize(
    ("response", "answers", "right"),
    [
        ("36 watts", ["36"], True),
        ("36 watts", ["30"], False),
        ("about 6.333", ["6.333"], True),
        ("6.33", ["6.333"], True),
        ("6.3", ["6.333"], False),
        ("1,000", ["1000"], True),
        ("It is the diode", ["transistor", "diode"], True),
        ("a", ["a"], True),
        ("a cat", ["b"], False),
        ("option a cat", ["a"], True),
        ("", ["5"], False),
    ],
)
def test_open_answers_are_compared_as_officially(response, answers, right):
    assert open_equal(answers, parse_open(response)) is right
    assert open_equal(answers[::-1], parse_open(response)) is right
    score = METRICS["mmmu"].score(response, {"answer": answers[0], "metadata": {"answers": answers}})
    assert score.values == {"mmmu": float(right), "open": float(right), "accuracy": float(right)}
    assert score.parsed is bool(response)


def test_the_published_outputs_of_one_subject():
    """LLaVA 1.5 13B on Literature, `eval/example_outputs` of MMMU-Benchmark/MMMU: 20 of 30."""
    answers, responses = "CDCDBBABADBADABABCBCBADABACCDD", "CDCBABABACBADBAABCBCCADABDADDB"
    scores = [
        METRICS["mmmu"].score(said, choice(answer, CHARACTERS, subject="Literature")).values
        for answer, said in zip(answers, responses, strict=True)
    ]
    assert sum(score["mmmu"] for score in scores) == 20
    assert all(score["discipline_humanities_and_social_science"] == score["mmmu"] for score in scores)


def test_thirty_subjects_in_six_disciplines():
    assert len(DISCIPLINES) == 6
    assert len({subject for subjects in DISCIPLINES.values() for subject in subjects}) == 30
    unknown = METRICS["mmmu"].score("A", choice("A", CHARACTERS, subject="Cookery")).values
    assert not any(name.startswith("discipline") for name in unknown)


def test_every_number_is_defined_and_within_its_range():
    rng = random.Random(0)
    for _ in range(100):
        said = " ".join(rng.choices(["A", "(B)", "is", "=", "3,0", "1e999", "nan", "inf", ".", "\n", "shape"], k=6))
        for references in (choice("B", CHARACTERS, subject="Art"), {"answer": "3"}):
            values = METRICS["mmmu"].score(said, references).values
            assert all(METRICS["mmmu"].output(name) and value in (0.0, 1.0) for name, value in values.items())
