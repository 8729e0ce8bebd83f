"""Mixtures of experts: both losses against loops, padding left out, and the parameters that a token meets."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from molmo_model.nn.build import active_parameter_counts, build_model, parameter_counts
from molmo_model.nn.experts import load_balancing_loss, router_z_loss
from tests.nn.conftest import random_weights

EXPERTS = {"num_experts": 6, "num_experts_per_token": 2, "intermediate_size": 32}


@pytest.fixture
def model(make_params):
    return random_weights(build_model(make_params(family="olmoe", language=EXPERTS), 1)).train()


def loop_losses(logits, per_token, present):
    """Both losses, one token and one expert at a time."""
    experts, chosen, probability, squares, count = logits[0].shape[-1], {}, {}, 0.0, 0
    for layer in logits:
        for row, here in zip(layer, present.flatten().tolist(), strict=True):
            if not here:
                continue
            count += 1
            squares += row.logsumexp(-1).item() ** 2
            for expert in row.topk(per_token).indices.tolist():
                chosen[expert] = chosen.get(expert, 0) + 1
            for expert, share in enumerate(row.softmax(-1).tolist()):
                probability[expert] = probability.get(expert, 0.0) + share
    balance = sum(chosen.get(e, 0) / (count * per_token) * probability[e] / count for e in range(experts)) * experts
    return balance, squares / count


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed):
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2 * 7, 5, generator=rng) for _ in range(3)]
    present = torch.rand(2, 7, generator=rng) < 0.7
    balance, squares = loop_losses(logits, 2, present)
    assert load_balancing_loss(logits, 2, present).item() == pytest.approx(balance, rel=1e-5)
    assert router_z_loss(logits, present).item() == pytest.approx(squares, rel=1e-5)
    theirs = load_balancing_loss_func(tuple(logits), 5, 2, present.long())
    assert load_balancing_loss(logits, 2, present).item() == pytest.approx(theirs.item() / 2, rel=1e-6)


def test_scale():
    """1 where experts share alike, the number of experts where one token's worth goes to one alone."""
    present = torch.ones(1, 8)
    alike = [torch.eye(4).repeat(2, 1) * 1e-4]
    assert load_balancing_loss(alike, 1, present).item() == pytest.approx(1, rel=1e-3)
    assert load_balancing_loss([torch.tensor([50.0, 0, 0, 0]).repeat(8, 1)], 1, present).item() == pytest.approx(4)
    assert router_z_loss([torch.zeros(8, 4)], present).item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)


def test_the_model_adds_them(model, batch):
    """Padding is left out, and dividing the sum by the batch's weight gives their mean; cross-entropy stays pure."""
    logits = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: logits.append(output[0].detach()))
    output = model(**batch, z_loss=0.01)
    balance, squares = loop_losses(logits, 2, batch["example_ids"] >= 0)
    assert output.load_balancing_loss.item() == pytest.approx(balance, rel=1e-5)
    assert output.router_z_loss.item() == pytest.approx(squares, rel=1e-5)
    model.config.load_balancing_weight = model.config.router_z_weight = 0.0
    plain = model(**batch, z_loss=0.01)
    assert output.cross_entropy_sum.item() == plain.cross_entropy_sum.item()
    expected = plain.loss_sum.item() + output.weight_sum.item() * (0.01 * balance + 0.001 * squares)
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-6)
    assert output.loss.item() == pytest.approx(expected / output.weight_sum.item(), rel=1e-6)


def test_routers_learn_from_them(model, batch):
    """Training on the two losses alone evens the experts out."""
    model.config.load_balancing_weight, model.config.router_z_weight = 1.0, 0.01
    routers = [layer.mlp.gate.weight for layer in model.model.language_model.layers]
    with torch.no_grad():
        for router in routers:
            router[0] += 0.2
    optimizer = torch.optim.Adam(routers, lr=0.01)
    seen = []
    for _ in range(30):
        output = model(**batch)
        (output.loss - output.cross_entropy_sum / output.weight_sum).backward()
        seen.append(output.load_balancing_loss.item())
        optimizer.step()
        model.zero_grad()
    assert seen[-1] < seen[0] - 0.02


def test_models_without_experts_have_none(make_params, batch):
    output = build_model(make_params(), 1)(**batch)
    assert output.load_balancing_loss is None and output.router_z_loss is None


def test_active_parameters(model, make_params, batch):
    """Brute force: a token's gradient is zero exactly for the experts that it does not meet."""
    language = model.model.language_model
    embeddings = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    language(
        inputs_embeds=embeddings, attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool)
    ).last_hidden_state.sum().backward()
    met = 0
    for layer in language.layers:
        for tensor in layer.mlp.experts.parameters():
            met += int((tensor.grad.abs().flatten(1).amax(1) > 0).sum()) * tensor[0].numel()
    experts = sum(parameter.numel() for name, parameter in language.named_parameters() if "experts" in name)
    total, active = parameter_counts(model), active_parameter_counts(model)
    assert total["language"] - active["language"] == experts - met > 0
    assert (total["vision"], total["connector"]) == (active["vision"], active["connector"])
    dense = build_model(make_params(), 1)
    assert active_parameter_counts(dense) == parameter_counts(dense)


def test_micro_batches(model, batch):
    """Two micro-batches give the weighted mean of their own balances, not that of the whole batch: documented."""
    text = {name: value for name, value in batch.items() if value.shape[:2] == (2, 40)}
    text["input_ids"] = torch.where(text["input_ids"] == 62, 0, text["input_ids"])
    halves = [model(**{name: value[row : row + 1] for name, value in text.items()}) for row in (0, 1)]
    whole = model(**text)
    weights = torch.stack([half.weight_sum for half in halves])
    auxiliary = sum(half.loss_sum - half.cross_entropy_sum for half in halves) / weights.sum()
    means = torch.stack([0.01 * half.load_balancing_loss + 0.001 * half.router_z_loss for half in halves])
    assert auxiliary.item() == pytest.approx(F.linear(means, weights / weights.sum()).item(), rel=1e-3)
    assert whole.load_balancing_loss.item() != pytest.approx(
        F.linear(torch.stack([half.load_balancing_loss for half in halves]), weights / weights.sum()).item(), rel=1e-6
    )
