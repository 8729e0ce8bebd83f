"""Captions against people's captions: CIDEr, BLEU and ROUGE-L as the COCO server computes them.

The numbers are those of the package `pycocoevalcap` with its tokenizer, which is a Java program; nothing here computes
them again. Both are optional: the extra `captions`, and a Java runtime.
"""

import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.answers import answers_of, most_frequent
from molmo_model.eval.metrics.metric import Judge, Metric, Output, References, Score

Captions = Mapping[int, Sequence[str]]
"""Tokenized captions by the number of the item, words between single spaces."""

RUNS = 4
"""Words of the longest runs that BLEU counts."""


def caption_scores(items: Sequence[tuple[str, References]], judge: Judge | None = None) -> list[Score]:
    """Scores the captions of a task together: CIDEr weighs words by how many of its pictures people use them for.

    Raises:
        EvaluationError: pycocoevalcap or Java is not installed.
    """
    said, people = tokenized([[answer] for answer, _ in items]), tokenized([answers_of(one) for _, one in items])
    columns = _columns(people, said)
    limits = {name: METRICS["captions"].output(name).upper or math.inf for name in columns}
    return [
        # rounding may lift what is equal above the largest value by one bit
        Score({name: min(float(column[i]), limits[name]) for name, column in columns.items()}, parsed=bool(said[i][0]))
        for i in range(len(items))
    ]


def tokenized(captions: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Captions as COCO's tokenizer (Penn Treebank, lower case, no punctuation) leaves them, by their place.

    Raises:
        EvaluationError: pycocoevalcap or Java is not installed, or Java fails.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    texts = [" ".join(text.split()) for several in captions for text in several]
    lines = _java("\n".join(text or "." for text in texts) + "\n").splitlines()  # a line without a word may be dropped
    if len(lines) != len(texts):
        raise EvaluationError(f"COCO's tokenizer gave {len(lines)} captions for {len(texts)}; see `java -version`")
    words = iter(" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines)
    return {place: [next(words) for _ in several] for place, several in enumerate(captions)}


def _java(text: str) -> str:
    """Runs the tokenizer. The package's own function writes into its own folder, which may not be ours to write to."""
    jar, java = _jar(), shutil.which("java")
    if java is None:
        raise EvaluationError(
            "CIDEr, BLEU and ROUGE-L need COCO's tokenizer, a Java program, and no `java` is found; install a Java "
            "runtime (Debian: apt-get install default-jre-headless), or choose another metric"
        )
    command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input=text.encode(), capture_output=True, check=False
    )
    if done.returncode:
        raise EvaluationError(f"COCO's tokenizer failed: {done.stderr.decode(errors='replace')[-500:]}")
    return done.stdout.decode()


def _jar() -> Path:
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise EvaluationError(
            "CIDEr, BLEU and ROUGE-L need the package pycocoevalcap; install the extra `captions`: "
            'pip install ".[captions]"'
        ) from error
    return Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR


def _columns(people: Captions, said: Captions) -> dict[str, Sequence[float]]:
    """The scores of every item, by number."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    _, cider = Cider().compute_score(people, said)
    _, rouge = Rouge().compute_score(people, said)
    return {"cider": cider, "rouge_l": rouge, **_runs(people, said)}


def _runs(people: Captions, said: Captions) -> dict[str, Sequence[float]]:
    """What BLEU counts: runs of n words that were said and those of them that people said, and people's length."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=RUNS)
    for place, (caption,) in said.items():
        scorer += (caption, people[place])
    columns: dict[str, Sequence[float]] = {}
    for n in range(1, RUNS + 1):
        columns[f"said_{n}"] = [counts["guess"][n - 1] for counts in scorer.ctest]
        columns[f"shared_{n}"] = [counts["correct"][n - 1] for counts in scorer.ctest]
    columns["people_1"] = [
        min((abs(length - counts["testlen"]), length) for length in counts["reflen"])[1] for counts in scorer.ctest
    ]
    return columns


def corpus_bleu(n: int, means: Mapping[str, float]) -> float:
    """BLEU of all captions together, from the means of what `_runs` counts: a ratio of sums is one of means."""
    shares = [means[f"shared_{k}"] / means[f"said_{k}"] for k in range(1, n + 1) if means[f"said_{k}"] > 0]
    if len(shares) < n or min(shares) <= 0:
        return 0.0
    brevity = min(0.0, 1.0 - means["people_1"] / means["said_1"])
    return math.exp(math.fsum(map(math.log, shares)) / n + brevity)


def _alone(prediction: str, references: References) -> NoReturn:
    raise EvaluationError("captions are scored together, with `score_all`")


METRICS: dict[str, Metric] = {
    "captions": Metric(
        _alone,
        "cider",
        most_frequent,
        "the most frequent training caption",
        "COCO captions (Chen et al. 2015, arXiv:1504.00325) with its own code, the package pycocoevalcap: CIDEr-D"
        " (Vedantam et al. 2015, arXiv:1411.5726; published times 100, and 10 at most here), ROUGE-L (Lin 2004) and"
        " BLEU of the corpus (Papineni et al. 2002), which is no mean over pictures; the delta method gives its"
        " interval. Different here: where not one run of words is shared BLEU is 0 (there a little more).",
        outputs={
            "cider": Output(
                "ten times the cosine of tf-idf weighted runs of 1 to 4 words, mean over people's captions", upper=10.0
            ),
            "rouge_l": Output("F measure of the longest common subsequence of words, recall weighing more"),
            **{
                f"bleu_{n}": Output(
                    f"not of an item: BLEU-{n} of all captions together, the share of runs of 1 to {n} words that "
                    "people said too, less where the captions are too short"
                )
                for n in range(1, RUNS + 1)
            },
            "said_*": Output("runs of so many words in the caption", upper=None, neutral=True),
            "shared_*": Output("of these, those that one of people's captions has as often", upper=None, neutral=True),
            "people_1": Output(
                "words of the one of people's captions that is nearest in length", upper=None, neutral=True
            ),
        },
        functions={f"bleu_{n}": partial(corpus_bleu, n) for n in range(1, RUNS + 1)},
        score_all=caption_scores,
        unparsed="No word: 0.",
    ),
}
