"""Dropout inside transformers' layers: shares, scale, only the right tokens, and checkpointing that draws the same."""

import copy

import pytest
import torch
from torch import nn

from molmo_model.nn.build import build_config, build_model
from molmo_model.nn.dropout import ResidualDropout, add_residual_dropout, drop_probabilities
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from tests.nn.conftest import random_weights
from tests.nn.families import FAMILIES


class Layer(nn.Module):
    """The names of a transformers layer around two summands of ones."""

    def __init__(self, norm_after: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = Ones(True), Ones(False)
        if norm_after:
            self.post_attention_layernorm, self.post_feedforward_layernorm = nn.Identity(), nn.Identity()

    def forward(self, states, **kwargs):
        summand = self.self_attn(states, **kwargs)[0]
        states = states + getattr(self, "post_attention_layernorm", nn.Identity())(summand)
        summand = self.mlp(states)
        return states + getattr(self, "post_feedforward_layernorm", nn.Identity())(summand)


class Ones(nn.Module):
    def __init__(self, several: bool) -> None:
        super().__init__()
        self.several = several

    def forward(self, states, **kwargs):
        return (torch.ones_like(states), None) if self.several else torch.ones_like(states)


@pytest.mark.parametrize("norm_after", [False, True])
def test_share_and_scale(norm_after):
    """Two summands, each dropped by itself: sums are 0, 1 and 2 over the share that stays, and 2 on average."""
    tower = nn.Module()
    tower.layers = nn.ModuleList([Layer(norm_after)])
    add_residual_dropout(tower, 0.25, None)
    torch.manual_seed(0)
    out = tower.layers[0](torch.zeros(4, 100, 200)) * 0.75
    shares = [(out.round(decimals=4) == count).float().mean().item() for count in (0, 1, 2)]
    assert shares == pytest.approx([0.0625, 0.375, 0.5625], abs=0.006)  # standard error 0.002
    assert out.mean().item() / 0.75 == pytest.approx(2, abs=0.01)
    tower.eval()
    assert torch.equal(tower.layers[0](torch.zeros(1, 2, 3)), torch.full((1, 2, 3), 2.0))


def test_answered_tokens_have_their_own_share():
    tower = nn.Module()
    tower.layers = nn.ModuleList([Layer(False)])
    add_residual_dropout(tower, 0.0, 0.5)
    labels = torch.tensor([[-100, 3, 0, -100]]).repeat_interleave(5000, 1)
    torch.manual_seed(0)
    out = tower.layers[0](torch.zeros(1, 20_000, 8), drop_probability=drop_probabilities(labels, 0.0, 0.5))
    answered = labels[0] >= 0
    assert torch.equal(out[0, ~answered], torch.full((10_000, 8), 2.0))
    zeros, ones, twos = ((out[0, answered] == 2 * count).float().mean().item() for count in (0, 1, 2))
    assert (zeros, ones, twos) == pytest.approx((0.25, 0.5, 0.25), abs=0.006)
    assert tower.layers[0].residual_dropout.per_token is None  # nothing stays behind


def test_which_tokens():
    labels = torch.tensor([[-100, 3, 0]])
    assert drop_probabilities(labels, 0.1, None) is drop_probabilities(labels, 0.1, 0.1) is None
    assert drop_probabilities(None, 0.1, 0.2) is None
    assert drop_probabilities(labels, 0.1, 0.0)[..., 0].tolist() == [pytest.approx([0.1, 0.0, 0.0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family, make_params, batch):
    """In training states differ from draw to draw and gradients with checkpointing are the same to the bit; the
    probability 0 adds no module, and evaluation is as without dropout."""
    language = {**FAMILIES[family], "residual_dropout": 0.2, "response_residual_dropout": 0.4, "embedding_dropout": 0.1}
    plain = random_weights(build_model(make_params(family=family, language=FAMILIES[family]), 1))
    assert not any(isinstance(module, ResidualDropout) for module in plain.modules())
    model = build_model(make_params(family=family, language=language), 1)
    assert set(model.state_dict()) == set(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    layers = model.model.language_model.layers
    assert sum(isinstance(module, ResidualDropout) for module in model.modules()) == len(layers)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
        torch.manual_seed(0)
        first = model.train()(**batch).logits
        assert not torch.equal(first, model(**batch).logits)
        torch.manual_seed(0)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch).logits, first)
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_answered_tokens_alone_in_a_model(make_params, batch):
    """With dropout on answered tokens only, states of a prefix, which sees no answer, stay as they are."""
    model = random_weights(build_model(make_params(language={"response_residual_dropout": 0.5}), 1)).train()
    plain = random_weights(build_model(make_params(), 1)).train()
    with torch.no_grad():
        changed = (model(**batch).last_hidden_state - plain(**batch).last_hidden_state).abs().amax(-1) > 1e-6
    assert changed[batch["labels"] >= 0].all()
    prefix = (batch["segment_ids"] == 10_000) & (batch["labels"] < 0)
    assert prefix.any() and not changed[prefix].any()


def test_config_keeps_it(make_params, tmp_path):
    language = {"residual_dropout": 0.1, "response_residual_dropout": 0.0, "embedding_dropout": 0.3}
    config = build_config(make_params(language=language))
    MolmoForConditionalGeneration(config).save_pretrained(tmp_path)
    loaded = MolmoForConditionalGeneration.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in language} == language
    assert isinstance(loaded.model.language_model.layers[0].residual_dropout, ResidualDropout)


def test_compiled_layers_drop_too(make_params, batch):
    """Traced without a graph break; the draws of a traced layer are those of an untraced one."""
    language = {"residual_dropout": 0.2, "response_residual_dropout": 0.4}
    model = random_weights(build_model(make_params(language=language), 1)).train()
    torch.manual_seed(0)
    expected = model(**batch).logits
    torch._dynamo.reset()
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    assert torch.equal(model(**batch).logits, expected)
    torch._dynamo.reset()
