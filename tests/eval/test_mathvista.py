"""MathVista: its short cuts and normalisation against published extractions, and the judge in the place of GPT-4."""

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.metrics.mathvista import at_once, by_rules, nearest, normal

SHAPES = ["3/11", "8/11", "6/11", "3/5"]


def number(answer, kind="integer", precision=None):
    return {"answer": answer, "metadata": {"answers": [answer], "answer_type": kind, "precision": precision}}


def choice(letter, options=SHAPES):
    right = "ABCDEFGH".index(letter)
    facts = {"options": options, "answer_index": right, "answer": options[right], "answer_type": "text"}
    return {"answer": letter, "metadata": facts}


@pytest.mark.parametrize(
    ("extraction", "kind", "precision", "said"),
    [
        ("14", "integer", None, "14"),
        ("3.4", "integer", None, "3"),
        ("-0.5", "integer", None, "0"),
        ("14 apples", "integer", None, None),
        ("inf", "integer", None, None),
        ("0.11", "float", 1, "0.1"),
        ("1.456", "float", 2, "1.46"),
        ("1.456", "float", 2.0, "1.46"),
        ("2", "float", 1, "2.0"),
        ("half", "float", 1, None),
        ("[2007, 2008]", "list", None, "[2007, 2008]"),
        ("", "list", None, None),
    ],
)
def test_numbers_take_the_form_of_the_reference(extraction, kind, precision, said):
    assert normal(extraction, {"answer_type": kind, "precision": precision}) == said


@pytest.mark.parametrize(
    ("extraction", "said", "published"),
    [
        ("B", "8/11", "8/11"),
        ("(B) 8/11", "8/11", "8/11"),
        ("(b)", "8/11", "8/11"),
        ("8/11", "8/11", "8/11"),
        ("The correct answer is (D) because (A) is less", "3/5", "3/5"),
        ("8/12", None, "8/11"),
        ("E", None, "3/5"),
        ("b", None, "3/5"),
    ],
)
def test_choices_are_named_or_unread_and_published_ones_are_the_nearest(extraction, said, published):
    found = normal(extraction, choice("B")["metadata"])
    assert found == said
    assert (found or nearest(extraction, SHAPES)) == published


@pytest.mark.parametrize(
    ("response", "references", "said"),
    [
        ("14", number("14"), "14"),
        ("1.50", number("1.5", "float", 1), "1.5"),
        ("14.0", number("14"), None),
        ("8/11", choice("B"), "8/11"),
        ("B", choice("B"), None),
        ("", choice("B"), ""),
    ],
)
def test_what_is_the_answer_at_once(response, references, said):
    assert at_once(response, references) == said


@pytest.mark.parametrize(
    ("response", "references", "said"),
    [
        ('The answer is "14".', number("14"), "14"),
        ("The number missing in the sequence is 14.", number("14"), "14"),
        ("3 + 4 = 7", number("7"), "7"),
        ("First 3, then 5, so the answer is 1,200 metres", number("1200"), "1200"),
        ("It is 3 or 5", number("3"), ""),
        ("nothing", number("3"), ""),
        ("The correct answer is (B) 8/11.", choice("B"), "8/11"),
        ("Let me see.\n(A) is small.\nThe answer is B.", choice("B"), "8/11"),
        ("It is blue", choice("B"), ""),
        ("They are [1, 2] and [3, 4]", number("[3, 4]", "list"), "[3, 4]"),
    ],
)
def test_answers_within_explanations(response, references, said):
    assert by_rules(response, references) == said


def test_scores_of_both_ways():
    score = METRICS["mathvista"].score
    assert score("B", choice("B")).values == {"mathvista": 1.0, "nearest": 1.0}
    assert score("8/12", choice("B")).values == {"mathvista": 0.0, "nearest": 1.0}
    assert not score("8/12", choice("B")).parsed
    assert score("", choice("A")).values == {"mathvista": 0.0, "nearest": 0.0}
    assert score("0.11", number("0.1", "float", 1)).read == "0.1"
    assert not score("many", number("3")).parsed
    with pytest.raises(EvaluationError, match="precision None"):
        score("0.11", number("0.1", "float"))


class _Judge:
    name = "a fake"

    def __init__(self, answers):
        self.answers, self.prompts, self.asked, self.missing = answers, [], 0, 0

    def ask(self, prompts):
        self.prompts += prompts
        return [next((said for part, said in self.answers.items() if part in prompt), None) for prompt in prompts]


def test_the_judge_is_asked_only_for_what_is_no_answer_as_it_stands():
    judge = _Judge({"fourteen": "14", "hard to say": "NONE", "second": " B "})
    items = [
        ("14", number("14")),
        ("There are fourteen.", number("14")),
        ("It is hard to say: 3 or 14", number("14")),
        ("The second one", choice("B")),
        ("The total is 14, I think", number("14")),
        ("", number("14")),
    ]
    metric = METRICS["mathvista_judged"]
    scores = metric.score_all(items, judge)
    assert [score.values["mathvista"] for score in scores] == [1, 1, 0, 1, 1, 0]
    assert [score.parsed for score in scores] == [True, True, False, True, True, False]
    assert len(judge.prompts) == 4
    assert "(B) 8/11" in judge.prompts[2]
    assert [score.read for score in scores[:2]] == ["14", "14"]
    assert scores[4].read == "14 (read by rules: the judge gave no answer)"
    assert metric.judged
    assert metric.score("There are fourteen.", number("14")).parsed is False  # the rules alone read no words


@pytest.mark.parametrize("metadata", [{}, {"options": ["a", "b"], "answer_index": 1}])
def test_answers_of_no_kind_are_refused(metadata):
    with pytest.raises(EvaluationError, match="choose another metric"):
        METRICS["mathvista"].score("green", {"answer": "green", "metadata": metadata})
