"""Captions against pycocoevalcap called directly, and against CIDEr, BLEU and ROUGE-L written out by their papers."""

import math
import random
import shutil
import sys
from collections import Counter

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.metrics import captions as room
from molmo_model.eval.scoring import numbers

WORDS = ["a", "man", "dog", "rides", "the", "horse's", "red,", "ball", "on", "(green)", "grass.", "-", "it's", "fast!"]


def sentence(rng):
    return " ".join(["The", *rng.choices(WORDS, k=rng.randint(0, 12))])


def corpus(size=12):
    rng = random.Random(0)
    items = []
    for _ in range(size):
        people = [sentence(rng) for _ in range(rng.randint(1, 4))]
        said = rng.choice([sentence(rng), people[0], people[-1] + " near water"])
        items.append((said, {"answer": people[0], "metadata": {"answers": people}}))
    return [*items, ("", items[0][1]), ("...", items[1][1]), ("a man\na dog", items[2][1])]


@pytest.fixture(scope="module")
def scored():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("COCO's tokenizer needs Java")
    items = corpus()
    return items, METRICS["captions"].score_all(items, None)


def test_scores_are_those_of_cocos_own_pipeline(scored):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    items, scores = scored
    tokenize = PTBTokenizer().tokenize
    people = tokenize(
        {i: [{"caption": one} for one in item["metadata"]["answers"]] for i, (_, item) in enumerate(items)}
    )
    said = tokenize({i: [{"caption": text}] for i, (text, _) in enumerate(items)})
    for name, scorer in (("cider", Cider()), ("rouge_l", Rouge())):
        mean, each = scorer.compute_score(people, said)
        assert [score.values[name] for score in scores] == pytest.approx(list(each))
        assert sum(score.values[name] for score in scores) / len(scores) == pytest.approx(mean)
    bleu, _ = Bleu(4).compute_score(people, said, verbose=0)
    found = numbers(METRICS["captions"], scores, range(len(scores)), 0.95)
    for n in (1, 2, 3, 4):
        assert found[f"bleu_{n}"].mean == pytest.approx(bleu[n - 1])
    assert [score.parsed for score in scores] == [True] * 12 + [False, False, True]


def runs(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_by_the_paper(said, people, all_people):
    """CIDEr-D of Vedantam et al. 2015, equations 1 to 5, with sigma 6."""
    total = 0.0
    for n in (1, 2, 3, 4):
        rarity = Counter(run for several in all_people for run in {run for one in several for run in runs(one, n)})

        def vector(words, n=n, rarity=rarity):
            counts = runs(words, n)
            return {run: k * (math.log(len(all_people)) - math.log(max(1, rarity[run]))) for run, k in counts.items()}

        ours = vector(said)
        for one in people:
            theirs = vector(one)
            dot = sum(min(weight, theirs.get(run, 0.0)) * theirs.get(run, 0.0) for run, weight in ours.items())
            norm = math.hypot(*ours.values()) * math.hypot(*theirs.values()) if ours and theirs else 0.0
            # pycocoevalcap takes the number of pairs of words for the length
            apart = max(0, len(said) - 1) - max(0, len(one) - 1)
            total += (dot / norm if norm else 0.0) * math.exp(-(apart**2) / 72) / len(people)
    return 10 * total / 4


def test_cider_is_that_of_the_paper(scored):
    items, scores = scored
    people = [
        [one.split() for one in several]
        for several in room.tokenized([item["metadata"]["answers"] for _, item in items]).values()
    ]
    said = [several[0].split() for several in room.tokenized([[text] for text, _ in items]).values()]
    for i, score in enumerate(scores):
        assert score.values["cider"] == pytest.approx(cider_by_the_paper(said[i], people[i], people), abs=1e-9)


def test_the_reference_itself_is_the_best_caption_and_never_above_the_upper_value(scored):
    items, _ = scored
    alone = [(item["metadata"]["answers"][0], {"answer": item["metadata"]["answers"][0]}) for _, item in items[:12]]
    for score in METRICS["captions"].score_all(alone, None):
        assert score.values["rouge_l"] == 1.0
        assert score.values["said_1"] == score.values["shared_1"] == score.values["people_1"] > 0
        for name, value in score.values.items():
            assert 0.0 <= value <= (METRICS["captions"].output(name).upper or math.inf)


def test_the_error_of_a_corpus_bleu_is_that_of_leaving_pictures_out(scored):
    _, scores = scored
    metric, n = METRICS["captions"], len(scores)
    whole = numbers(metric, scores, range(n), 0.95)["bleu_2"]
    left_out = [numbers(metric, scores[:i] + scores[i + 1 :], range(n - 1), 0.95)["bleu_2"].mean for i in range(n)]
    middle = math.fsum(left_out) / n
    jackknife = math.sqrt((n - 1) / n * math.fsum((value - middle) ** 2 for value in left_out))
    assert whole.stderr == pytest.approx(jackknife, rel=0.15)
    assert 0.0 < whole.low < whole.mean < whole.high < 1.0


def test_bleu_without_a_shared_run_is_zero():
    means = {f"{name}_{n}": 5.0 - n for name in ("said", "shared", "people") for n in (1, 2, 3, 4)}
    assert room.corpus_bleu(4, means) == 1.0
    assert room.corpus_bleu(4, means | {"shared_4": 0.0}) == room.corpus_bleu(1, means | {"said_1": 0.0}) == 0.0
    assert room.corpus_bleu(1, means | {"people_1": 8.0}) == pytest.approx(math.exp(-1.0))


def test_captions_keep_their_places_whatever_stands_in_them(scored):
    found = room.tokenized([["", "A bee."], ["x\n\u2028y"], ["..."], ["Zwölf\tBoxkämpfer"]])
    assert found == {0: ["", "a bee"], 1: ["x y"], 2: [""], 3: ["zwölf boxkämpfer"]}


def test_without_java_or_the_package_it_says_what_to_install(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EvaluationError, match=r"Java program, and no `java` is found; install"):
        METRICS["captions"].score_all(corpus(3), None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer", None)
    with pytest.raises(EvaluationError, match="extra `captions`"):
        METRICS["captions"].score_all(corpus(3), None)
