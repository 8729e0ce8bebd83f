"""Loss on the reference answers: measured by the model, token by token, not read from a text."""

import math

from molmo_model.errors import EvaluationError
from molmo_model.eval.metrics.metric import Metric, Output, References, Score


def loss(prediction: str, references: References) -> Score:
    """Mean negative log likelihood of the reference answer's tokens, and the share of them that the model ranks first.

    Raises:
        EvaluationError: nothing was measured, or what was measured is no loss.
    """
    measured = references.get("measured")
    if not measured:
        raise EvaluationError(
            "the loss was not measured for these predictions; give the task `kind: loss` and predict it again"
        )
    nll, tokens, right = (measured[name] for name in ("nll", "tokens", "right"))
    if not (math.isfinite(nll) and nll >= 0.0 and tokens > 0 and 0 <= right <= tokens):
        raise EvaluationError(
            f"measured nll {nll}, tokens {tokens}, right {right} is no loss; nll must be finite and not negative, "
            f"and right at most tokens"
        )
    return Score({"loss": nll / tokens, "token_accuracy": right / tokens}, weight=float(tokens))


METRICS: dict[str, Metric] = {
    "loss": Metric(
        loss,
        "loss",
        lambda references: "",
        "none: nothing is answered",
        "Cross entropy and accuracy of the next token as training logs them, over the tokens of the reference answers"
        " and the one that ends them; allenai/molmo `LossDatasetEvaluator`. Every token counts the same, so a long"
        " answer counts more.",
        outputs={
            "loss": Output("nats per token of the reference answer", lower_is_better=True, upper=None),
            "token_accuracy": Output("share of the reference answer's tokens that the model ranks first"),
            "perplexity": Output("e to the power of the loss", lower_is_better=True, upper=None),
        },
        exponentials={"perplexity": "loss"},
        measured=True,
    ),
}
