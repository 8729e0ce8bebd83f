"""The loss of a model on reference answers: what tasks of kind `loss` ask for in place of an answer.

Tokens are forced, as in training: the model reads the whole conversation as the trainer's batches have it, and every
place with a label counts, the token that ends an answer included. Weights of examples and conversations do not count,
so a sum divided by its tokens is training's loss of the same conversation where that has one weight.

Shape suffixes: B rows, S tokens of a row, E width, A answered tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_model.eval.answering import Answer
from molmo_model.nn.loss import answered_places
from molmo_model.preprocessing.collator import collate
from molmo_model.preprocessing.preprocessor import IGNORE, Encoded, Preprocessor

if TYPE_CHECKING:
    from molmo_model.nn.molmo import MolmoForConditionalGeneration

CHUNK = 512
"""Answered tokens whose logits exist at a time: 300 MB in fp32 for a vocabulary of 152,000."""


def measure(
    model: "MolmoForConditionalGeneration", encoded: Sequence[Encoded], preprocessor: Preprocessor
) -> list[Answer]:
    """What the model makes of each example's answers; the texts of the answers are empty.

    Args:
        encoded: one example each, with labels, as `Preprocessor.encode` makes them.
    """
    batch = collate([[one] for one in encoded], None, preprocessor.config, preprocessor.pad_id)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    labels = batch.pop("labels")
    del batch["loss_weights"]
    with torch.no_grad():
        hidden = model(**batch, use_cache=False, logits_to_keep=1).last_hidden_state
        sums = loss_of_rows(model.lm_head, hidden, labels)
    asked = [int((one.labels != IGNORE).argmax()) + 1 for one in encoded]  # this place predicts the first token
    return [
        Answer("", "stop", int(found["tokens"]), before, measured=found)
        for found, before in zip(sums, asked, strict=True)
    ]


def loss_of_rows(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int = CHUNK
) -> list[Mapping[str, float]]:
    """For every row `nll` (nats), `tokens` and `right`: sum of -log p over its labels, their number, and how many of
    them the model would have chosen greedily.

    Args:
        head: from [A, E] to logits [A, V].
        hidden: [B, S, E].
        labels: [B, S], below 0 where nothing is answered.
        chunk: labels whose logits exist at a time.
    """
    rows, length = labels.shape
    places = answered_places(labels)
    nll = torch.zeros(rows, dtype=torch.float64, device=hidden.device)
    right = torch.zeros(rows, dtype=torch.long, device=hidden.device)
    for some in places.split(chunk):
        logits = head(hidden.flatten(0, 1)[some]).float()
        targets, row = labels.flatten()[some], some // length
        nll.index_add_(0, row, F.cross_entropy(logits, targets, reduction="none").double())
        right.index_add_(0, row, (logits.argmax(-1) == targets).long())
    tokens = (labels >= 0).sum(1)
    return [
        {"nll": round(loss, 9), "tokens": count, "right": hits}
        for loss, count, hits in zip(nll.tolist(), tokens.tolist(), right.tolist(), strict=True)
    ]
