"""Pooling against loops over heads and patches, and against transformers' Molmo2 with copied weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig
from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter

from molmo_model.nn.connector import Connector
from tests.nn.conftest import random_weights

WIDTH, LAYERS, HEADS, TEXT, HIDDEN = 16, 2, 4, 24, 20


def make(**options):
    settings = {"pooling_attention_mask": True, "window_position_embedding": False, **options}
    connector = Connector(
        vision_width=WIDTH,
        num_layers=LAYERS,
        text_width=TEXT,
        window=4,
        pooling="attention_meanq",
        num_heads=HEADS,
        projector="mlp",
        projector_hidden_size=HIDDEN,
        **settings,
    )
    return random_weights(connector)


def windows(seed=0, tokens=12):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 9, WIDTH * LAYERS, generator=rng)
    pooling = torch.randint(0, 27, (tokens, 4), generator=rng)
    holes = torch.rand(tokens, 4, generator=rng) < 0.3
    holes[:, 0] = False
    return features, torch.where(holes, -1, pooling)


def by_hand(connector, features, indices, masked):
    """One image token, in plain loops."""
    flat, pool = features.flatten(0, 1), connector.pooling
    patches = []
    for place, index in enumerate(indices):
        patch = flat[index] if index >= 0 else torch.zeros(WIDTH * LAYERS)
        if index >= 0 and connector.window_position is not None:
            patch = patch + connector.window_position.weight[place]
        patches.append(patch)
    seen = [place for place, index in enumerate(indices) if index >= 0 or not masked]
    query = pool.q_proj(sum(patches[place] for place in seen) / len(seen))
    heads, size = [], WIDTH // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = [float(query[part] @ pool.k_proj(patches[place])[part]) / math.sqrt(size) for place in seen]
        weights = torch.tensor(scores).softmax(0)
        heads.append(sum(w * pool.v_proj(patches[place])[part] for w, place in zip(weights, seen, strict=True)))
    pooled = pool.o_proj(torch.cat(heads))
    project = connector.projector
    return project.down_proj(F.silu(project.gate_proj(pooled)) * project.up_proj(pooled))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("positions", [True, False])
@torch.no_grad()
def test_equals_loops(masked, positions):
    connector = make(pooling_attention_mask=masked, window_position_embedding=positions)
    features, pooling = windows()
    tokens = connector(features, pooling)
    assert tokens.shape == (12, TEXT)
    for token, indices in zip(tokens, pooling.tolist(), strict=True):
        torch.testing.assert_close(token, by_hand(connector, features, indices, masked), atol=1e-5, rtol=1e-5)


def test_holes_matter_only_without_the_mask():
    """With the mask, one patch and three holes are as good as the patch four times; without it, not."""
    features, _ = windows()
    once, repeated = torch.tensor([[5, -1, -1, -1]]), torch.tensor([[5, 5, 5, 5]])
    masked, plain = make(pooling_attention_mask=True), make(pooling_attention_mask=False)
    torch.testing.assert_close(masked(features, once), masked(features, repeated), atol=1e-6, rtol=1e-5)
    assert (plain(features, once) - plain(features, repeated)).abs().max() > 1e-3


def test_a_hole_does_not_read_the_first_patch():
    features, _ = windows()
    other = features.clone()
    other[0, 0] += 100
    connector, pooling = make(), torch.tensor([[5, -1, 7, -1]])
    assert torch.equal(connector(features, pooling), connector(other, pooling))


@pytest.mark.parametrize("masked", [True, False])
def test_windows_of_holes_are_finite(masked):
    connector = make(pooling_attention_mask=masked)
    features, _ = windows()
    features.requires_grad_()
    tokens = connector(features, torch.full((2, 4), -1))
    tokens.sum().backward()
    assert tokens.isfinite().all() and features.grad.abs().max() == 0
    assert all(parameter.grad.isfinite().all() for parameter in connector.parameters())


@torch.no_grad()
def test_equals_native_molmo2_adapter():
    connector = make()
    config = Molmo2AdapterConfig(
        vision_feature_layer=[0, 1],
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        intermediate_size=HIDDEN,
        text_hidden_size=TEXT,
        hidden_act="silu",
    )
    native = Molmo2Adapter(config).eval()
    renamed = {
        name.replace("pooling.", "image_pooling_2d.").replace("projector.", "image_projector."): value
        for name, value in connector.state_dict().items()
    }
    native.load_state_dict(renamed, strict=True)
    features, pooling = windows(tokens=40)
    expected = native(features, pooling).last_hidden_state
    torch.testing.assert_close(connector(features, pooling), expected, atol=1e-6, rtol=1e-5)
