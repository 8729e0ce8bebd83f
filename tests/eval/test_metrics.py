"""Text metrics against the published rules' known cases (each trap that naive versions fall into) and brute force."""

import random
import subprocess
import sys
from functools import cache

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS, vqa
from molmo_model.eval.metrics.answers import edit_distance, short_answer
from molmo_model.eval.metrics.charts import relaxed_equal, scifi_relaxed_equal
from molmo_model.eval.metrics.text import anls_of
from molmo_model.preprocessing.structured import parse_count


def value(metric, prediction, **references):
    return METRICS[metric].score(prediction, references).values[METRICS[metric].primary]


# --- what is taken as the answer


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("  Paris \n", "Paris"),
        ("two\ntwo\nthree", "two"),
        ("three\ntwo  \n two", "two"),
        ("b\na", "b"),
        ("It is big.\nAnswer: big", "big"),
        ("Answer: a\nAnswer: b", "a"),
        ("a   b", "a b"),
        ("", ""),
    ],
)
def test_short_answer_of_several_lines(prediction, answer):
    assert short_answer(prediction) == answer


def test_exact_match_ignores_case_and_outer_spaces_only():
    assert value("exact_match", " Empty", answer="empty") == 1.0
    assert value("exact_match", "emp ty", answer="empty") == 0.0
    assert value("exact_match", "b", answer="a", metadata={"answers": ["a", "B"]}) == 1.0


# --- relaxed accuracy


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("10.5", "10", True),
        ("10.6", "10", False),
        ("9.5", "10", True),
        ("-10", "10", False),
        ("5%", "0.05", True),
        ("5%", "5", False),
        ("1,000", "1000", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("Blue", "blue", True),
        ("blu", "blue", False),
        ("nan", "5", False),
        ("inf", "5", False),
    ],
)
def test_relaxed_equal_as_published(prediction, target, right):
    assert relaxed_equal(prediction, target) is right


def test_relaxed_accuracy_counts_what_is_no_number_where_one_is_wanted():
    score = METRICS["relaxed_accuracy"].score
    assert not score("red", {"answer": "5"}).parsed
    assert score("4", {"answer": "5"}).parsed
    assert score("red", {"answer": "blue"}).parsed
    assert score("5.1", {"answer": "5"}).values == {
        **{"relaxed_accuracy": 1.0, "relaxed_whole": 1.0},
        **{"scifi_relaxed": 1.0, "exact_match": 0.0},
    }


def test_relaxed_accuracy_of_pix2structs_own_test():
    said = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    wanted = ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"]
    scores = [value("relaxed_accuracy", one, answer=target) for one, target in zip(said, wanted, strict=True)]
    assert sum(scores) / len(scores) == 0.625


def test_relaxed_variants_differ_in_what_they_take_for_the_answer():
    said = METRICS["relaxed_accuracy"].score("The bar is high. Answer: 10", {"answer": "10"}).values
    assert said == {"relaxed_accuracy": 1.0, "relaxed_whole": 0.0, "scifi_relaxed": 1.0, "exact_match": 1.0}


def test_relaxed_accuracy_tells_who_wrote_the_question():
    def numbers(**metadata):
        return METRICS["relaxed_accuracy"].score("9", {"answer": "10", "metadata": metadata}).values

    human, augmented = numbers(is_human=True), numbers(is_human=False)
    assert human["scifi_relaxed_human"] == human["relaxed_accuracy_human"] == 0.0
    assert {name for name in human if name.endswith("_augmented")} == set()
    assert {name.removesuffix("_augmented") for name in augmented if name.endswith("_augmented")} == numbers().keys()


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("The value is 10.5.", "10", True),
        ("about 1,000 people", "1000", True),
        ("iphone 3", "3", True),  # the published code replaces `one` in `iphone`, and reads 1
        ("seventeen", "7", False),
        ("there are seven", "7", True),
        ("45%", "0.45", True),
        ("45", "0.45", True),
        ("3.5 million", "3500000", True),
        ("3.5m", "3500000", True),
        ("12k", "12000", True),
        ("2 billion", "2e9", True),
        ("5 kittens", "5000", False),
        ("-5", "-5", True),  # the published pattern reads signs of decimals only
        ("-5", "5", False),
        ("1e3", "1000", True),
        ("0.04", "0", True),
        ("6", "0", False),
        ("none", "0", False),
        ("It is blue", "blue", True),
        ("Answer: red", "blue", False),
        ("both a and b", "[a, b]", True),
        ("only a", "[a, c]", False),
        ("", "blue", False),
        ("nan", "nan", True),
    ],
)
def test_scifi_relaxed_reads_whole_sentences(prediction, target, right):
    assert scifi_relaxed_equal(prediction, target) is right


# --- VQA


def test_vqa_official_leaves_one_out_and_molmos_variant_does_not():
    for matches, official, molmo in [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1.0), (4, 1, 1), (10, 1, 1)]:
        answers = ["dog"] * matches + [f"other{i}" for i in range(10 - matches)]
        assert vqa.official("dog", answers) == pytest.approx(official)
        assert vqa.molmo("dog", answers) == pytest.approx(molmo)


def test_vqa_official_normalises_only_where_annotators_disagree():
    assert vqa.official("Dog", ["dog"] * 10) == 0.0
    assert vqa.official("Dog", ["dog"] * 9 + ["cat"]) == pytest.approx(1.0)
    assert vqa.molmo("The Dog.", ["dog"] * 10) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The cats, dogs!", "cats dogs"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("a.b", "ab"),
        ("3.5", "3.5"),
        ("Mr. X", "mr x"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("an\napple\tpie", "apple pie"),
    ],
)
def test_vqa_normalisation(text, normal):
    assert vqa.normalize(text) == normal


def test_vqa_period_rule_stops_after_32_as_the_official_count_argument_does():
    assert vqa.normalize("x" + "." * 40 + "y") == "x" + "." * 8 + "y"


def test_vqa_contractions_are_the_official_number():
    assert len(vqa.CONTRACTIONS) == 114


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("2", ["two"] * 4 + ["2"] * 2 + ["three"] * 4, 1.0),
        ("Mr X", ["mr. x", "mr x", "Mr. X"] + ["man"] * 7, 0.9),
        ("1000", ["1,000"] * 2 + ["1000"] + ["many"] * 7, 0.9),
        ("x y", ["x/y"] * 2 + ["z"] * 8, 0.6),
        ("dont", ["don't"] * 3 + ["do not"] * 7, 0.9),
        ("the", ["a"] * 3 + ["an"] * 7, 1.0),
        ("A dog", ["dog"] * 10, 0.0),
    ],
)
def test_vqa_official_gives_what_the_official_code_gives(prediction, answers, score):
    assert vqa.official(prediction, answers) == pytest.approx(score)
    assert vqa.official(prediction, answers[::-1]) == pytest.approx(score)


def test_a_okvqa_counts_annotators_without_normalising():
    answers = ["Dog", "dog ", "a dog", "cat"]
    assert value("a_okvqa", " DOG", metadata={"answers": answers}) == pytest.approx(2 / 3)
    assert value("a_okvqa", "dog.", metadata={"answers": answers}) == 0.0
    assert value("a_okvqa", "dog", metadata={"answers": ["dog"] * 10}) == 1.0


# --- ANLS


@cache
def levenshtein(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_equals_its_definition():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == levenshtein(a, b)
    long = "".join(rng.choices("abcdef ", k=90))
    assert edit_distance(long, long[:30] + "xy" + long[33:]) == 3
    assert edit_distance("", long) == 90


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [("ab", "ab", 1.0), ("AB", "ab", 1.0), ("abcd", "abce", 0.75), ("ab", "ax", 0.0), ("", "", 1.0), ("", "a", 0.0)],
)
def test_anls_is_zero_from_half_the_letters_wrong(prediction, target, score):
    assert anls_of(prediction, target) == score


def test_anls_takes_the_best_accepted_answer():
    assert value("anls", "abcd", answer="zzzz", metadata={"answers": ["zzzz", "abce"]}) == 0.75
    score = METRICS["anls"].score("ABCE", {"answer": "zzzz", "metadata": {"answers": ["zzzz", "abce"]}})
    assert score.values == {"anls": 1.0, "exact_match": 1.0}
    assert METRICS["anls"].score("abcd", {"answer": "abce"}).values == {"anls": 0.75, "exact_match": 0.0}


@pytest.mark.parametrize("name", ["exact_match", "vqa_accuracy", "a_okvqa", "anls", "relaxed_accuracy", "mmmu"])
def test_the_order_of_accepted_answers_does_not_matter(name):
    rng = random.Random(name)
    for _ in range(40):
        answers = rng.choices(["dog", "Dog", "a dog", "2", "two", "12.5", "0", "cat.", "5%"], k=rng.randint(2, 10))
        said = rng.choice([*answers, "dogs", "12", "none", "0.05", ""])
        scores = [
            METRICS[name].score(said, {"metadata": {"answers": order}})
            for order in (answers, answers[::-1], sorted(answers))
        ]
        assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize("name", ["vqa_accuracy", "a_okvqa"])
def test_agreement_of_one_person_is_refused(name):
    with pytest.raises(EvaluationError, match="how many people agree"):
        METRICS[name].score("dog", {"answer": "dog", "metadata": {}})


# --- grids


def test_caption_digits_compares_cell_by_cell():
    score = METRICS["caption_digits"].score
    references = {
        "answer": "3 . 5 / . 7 1 / 0 . .",
        "metadata": {"cells": [[3, None, 5], [None, 7, 1], [0, None, None]]},
    }
    assert score("3 . 5 / . 7 1 / 0 . .", references).values == {"digits": 1.0, "cells": 1.0, "exact": 1.0}
    wrong = score("3 . 5 / . 7 2 / 0 4 .", references)
    assert wrong.values == {"digits": pytest.approx(4 / 5), "cells": pytest.approx(7 / 9), "exact": 0.0}
    assert wrong.parsed
    shifted = score("3 5 / . 7 1 / 0 . .", references)  # a cell left out: its row is shifted, the shape is wrong
    assert shifted.values["digits"] == pytest.approx(4 / 5)
    assert not shifted.parsed
    assert score("", references).values["digits"] == 0.0
    assert score("3 . 5 / . 7 1 / 0 . .", {"answer": references["answer"]}).values["exact"] == 1.0


def test_constant_caption_is_the_commonest_digit_of_every_cell():
    training = [{"answer": text} for text in ("1 2 / . 3", "1 2 / . 4", "5 . / 6 4", "1 1 / . .")]
    assert METRICS["caption_digits"].constant(training) == "1 2 / 6 4"


# --- counting


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("There are three.", 3),
        ("There are none.", 0),
        ("none of them", 0),
        ("nonesuch", None),
        ("Counting the cats shows a total of 12.", 12),
        ('Counting the <points x1="1.0" y1="2.0" x2="3.0" y2="4.0" alt="9">9</points> shows a total of 2.', 2),
        ("a total of 4 cats", 4),
        ('<point x="5.0" y="7.0" alt="cat">cat</point>', None),
        ("", None),
        ("-3", None),
        ("iphone 3 x", None),
        ("²", None),
    ],
)
def test_parse_count(text, number):
    assert parse_count(text) == number


def test_count_scores():
    score = METRICS["count"].score
    assert score("3", {"answer": "3"}).values == {"correct": 1.0, "within_one": 1.0, "valid": 1.0, "correct_3": 1.0}
    assert score("4", {"answer": "3"}).values == {"correct": 0.0, "within_one": 1.0, "valid": 1.0, "correct_3": 0.0}
    assert score("many", {"answer": "3"}).values == {"correct": 0.0, "within_one": 0.0, "valid": 0.0, "correct_3": 0.0}
    assert not score("many", {"answer": "3"}).parsed
    assert score("2", {"answer": "", "points": [[1, 1], [2, 2]]}).values["correct"] == 1.0


# --- all of them

CHOICES = {
    "answer": "B",
    "metadata": {"options": ["a cat", "a dog", "the moon", "it"], "answer_index": 1, "answer": "a dog"},
}
ANSWERS = {
    **dict.fromkeys(
        ("multiple_choice", "science_qa", "ai2d", "muir_bench", "blink", "em_start", "perception_test"), CHOICES
    ),
    **dict.fromkeys(("egoschema", "next_qa", "long_video_bench", "video_mme", "mmmu", "mathvista"), CHOICES),
    "real_world_qa": {"answer": "2", "metadata": {"question_type": "short_answer", "answers": ["2"]}},
    "temp_compass": {"answer": "yes", "metadata": {"task": "yes_no", "question": "Is it?", "answers": ["yes"]}},
    "a_okvqa": {"answer": "dog", "metadata": {"answers": ["dog"] * 10}},
    "exact_match": {"answer": "empty"},
    "relaxed_accuracy": {"answer": "12.5"},
    "vqa_accuracy": {"answer": "dog", "metadata": {"answers": ["dog"] * 10}},
    "anls": {"answer": "Bill of sale"},
    "caption_digits": {"answer": "1 . / . 2"},
    "count": {"answer": "7"},
    "point_count": {"answer": "7"},
    "box_iou": {"answer": '<points x1="10.0" y1="20.0" x2="60.0" y2="80.0" alt="cat">cat</points>'},
    "clocks": {"answer": "4:05:09 PM", "metadata": {"hour": 16, "minute": 5, "second": 9}},
    "clock_bench": {"answer": "12:05", "metadata": {"hour": 0, "minute": 5, "second": -1}},
    "android_control": {"answer": "Plan: go. Action: Click(10.5, 20.0)", "metadata": {"target_box": [10, 20, 11, 21]}},
    "points_in_region": {
        "answer": '<point x="10.0" y="10.0" alt="a">a</point>',
        "points": [[10.0, 10.0]],
        "width": 100,
        "height": 100,
    },
    "pointing": {
        "answer": '<point x="10.0" y="10.0" alt="a">a</point>',
        "points": [[10.0, 10.0]],
        "width": 100,
        "height": 100,
    },
}


SINGLE = [name for name, metric in METRICS.items() if metric.score_all is None and not metric.measured]
"""Metrics that score one answer at a time, from its text."""


@pytest.mark.parametrize("name", SINGLE)
def test_every_metric_gives_one_for_the_reference_and_stays_in_range(name):
    metric, references = METRICS[name], ANSWERS[name]
    perfect = metric.score(references["answer"], references)
    assert set(perfect.values.values()) == {1.0}
    assert perfect.parsed
    rng = random.Random(name)
    for _ in range(200):
        text = "".join(rng.choices('abABC 01.5%,()/<>="\nßİ²٣答', k=rng.randint(0, 30)))
        score = metric.score(text, references)
        assert score.values.keys() <= perfect.values.keys()
        assert metric.primary in score.values
        assert all(0.0 <= item <= 1.0 for item in score.values.values())
        assert score.parsed or metric.unparsed  # the page of metrics says what such an answer scores


@pytest.mark.parametrize("name", SINGLE)
def test_every_metric_has_a_constant_answer_of_its_own_kind(name):
    metric, references = METRICS[name], ANSWERS[name]
    constant = metric.constant([references] * 3)
    assert metric.score(constant, references).parsed
    assert metric.primary in metric.score(constant, references).values
    assert metric.citation


def test_constant_answer_is_the_majority():
    training = [{"answer": answer} for answer in ("b", "a", "a", "c", "b")]
    assert METRICS["exact_match"].constant(training) == "a"  # of equals the first in order
    assert METRICS["count"].constant([{"answer": "2"}, {"answer": "3"}, {"answer": "3"}]) == "3"


def test_a_metric_that_does_not_fit_the_task_says_so():
    with pytest.raises(EvaluationError, match="no text answer"):
        METRICS["exact_match"].score("a", {"answer": None})
    with pytest.raises(EvaluationError, match="not a count"):
        METRICS["count"].score("3", {"answer": "a dog"})


def test_scoring_imports_neither_torch_nor_numpy():
    code = (
        "import sys; import pipelines.score, molmo_model.eval.scoring, molmo_model.eval.predictions;"
        "heavy = {'torch', 'numpy', 'transformers', 'pandas', 'scipy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
