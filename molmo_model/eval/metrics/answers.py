"""What was said and what is accepted: the parts of predictions and references that most metrics begin with."""

from collections import Counter
from collections.abc import Sequence

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.metric import References

MOST_FREQUENT = "the most frequent training answer"


def short_answer(prediction: str) -> str:
    """The answer inside a prediction, as Molmo's VQA evaluation takes it (allenai/molmo, `VqaEval`).

    What follows the first `Answer:`; else, of several lines, the most frequent (the first of those that tie); white
    space is collapsed in lines.
    """
    prediction = prediction.strip()
    if "Answer:" in prediction:
        return prediction.split("Answer:")[1].strip()
    if "\n" not in prediction:
        return " ".join(prediction.split())
    lines = Counter(" ".join(line.split()) for line in prediction.split("\n"))
    return max(lines, key=lambda line: lines[line])


def answers_of(references: References) -> list[str]:
    """The accepted answers: all annotators' where the metadata list them, else the one in the conversation.

    Raises:
        EvaluationError: there is none.
    """
    answers = references.get("metadata", {}).get("answers") or [references.get("answer")]
    if not all(isinstance(answer, str) for answer in answers):
        raise EvaluationError(f"references {dict(references)!r} have no text answer; choose another metric")
    return list(answers)


def most_frequent(references: Sequence[References]) -> str:
    """The answer that training references accept most often; of those that tie the first in the alphabet."""
    counts = Counter(answer for item in references for answer in answers_of(item))
    return min(counts, key=lambda answer: (-counts[answer], answer))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions.

    Rows of the table are bit vectors in two integers (Myers 1999, in the form of Hyyrö 2001): one step for each letter
    of the longer text. Own code because no such library is among the project's.
    """
    if a == b:
        return 0
    if len(a) > len(b):
        a, b = b, a
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last, distance = (1 << len(a)) - 1, 1 << (len(a) - 1), len(a)
    rising, falling = every, 0  # where the table's column goes up and down by one
    for letter in b:
        equal = places.get(letter, 0)
        diagonal = (((equal & rising) + rising) ^ rising) | equal | falling
        up, down = falling | (every & ~(diagonal | rising)), rising & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, (down << 1) & every
        rising, falling = down | (every & ~(diagonal | up)), up & diagonal
    return distance
