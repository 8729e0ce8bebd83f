"""The loss in chunks and with known places against the plain one: the same numbers and gradients."""

import pytest
import torch

from molmo_model.nn.build import build_model
from molmo_model.nn.loss import answered_loss, answered_places
from tests.nn.conftest import random_weights


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("filled", [False, True])
def test_chunks_change_nothing(chunk, filled, make_params, batch):
    """Worst difference of a gradient seen: 7e-6."""
    model = random_weights(build_model(make_params(), 1)).train()
    plain = model(**batch, z_loss=0.01)
    plain.loss_sum.backward()
    expected = gradients(model)
    places = answered_places(batch["labels"])
    known = torch.cat([places, torch.full((5,), -1)]) if filled else None
    output = model(**batch, z_loss=0.01, loss_chunk=chunk, answered=known)
    output.loss_sum.backward()
    assert output.logits is None and plain.logits is not None
    assert output.weight_sum.item() == pytest.approx(plain.weight_sum.item(), rel=1e-6)
    assert output.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-6)
    assert output.cross_entropy_sum.item() == pytest.approx(plain.cross_entropy_sum.item(), rel=1e-6)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5)


def test_known_places_give_the_same_bits(make_params, batch):
    model = random_weights(build_model(make_params(), 1))
    found, known = model(**batch), model(**batch, answered=answered_places(batch["labels"]))
    assert torch.equal(found.logits, known.logits) and found.loss_sum.item() == known.loss_sum.item()


@pytest.mark.parametrize("chunk", [None, 4])
def test_nothing_answered_is_zero_with_zero_gradients(chunk, make_params, batch):
    model = random_weights(build_model(make_params(), 1)).train()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch, loss_chunk=chunk)
    output.loss.backward()
    assert output.loss.item() == output.loss_sum.item() == output.weight_sum.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_only_one_chunk_of_logits_exists():
    """The head is asked for chunks, twice: forward and, again, backward."""
    sizes = []
    weight = torch.randn(11, 4, requires_grad=True)

    def head(states):
        sizes.append(len(states))
        return states @ weight.T

    hidden = torch.randn(2, 5, 4, requires_grad=True)
    labels = torch.arange(10).view(2, 5) % 11
    answered_loss(head, hidden, labels, None, 0.0, chunk=4).loss_sum.backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]
