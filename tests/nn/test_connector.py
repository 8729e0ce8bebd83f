"""The connector against loops over heads and patches, and against transformers' Molmo2 with copied weights.

The poolings by themselves are tested in `test_pooling.py`, models with every pooling in `test_connector_models.py`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig
from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter

from molmo_model.errors import DataError
from molmo_model.nn.connector import PADDING_VECTORS, Connector
from molmo_model.nn.pooling import MANY_TOKENS, POOLINGS
from molmo_model.nn.projector import PROJECTORS
from tests.nn.conftest import random_weights

WIDTH, LAYERS, HEADS, TEXT, HIDDEN = 16, 2, 4, 24, 20


def make(**options):
    settings = {"pooling_attention_mask": True, "window_position_embedding": False, "window": (2, 2), **options}
    connector = Connector(
        vision_width=WIDTH,
        num_layers=LAYERS,
        text_width=TEXT,
        num_heads=HEADS,
        projector_hidden_size=HIDDEN,
        **{"pooling": "attention_meanq", "projector": "mlp", **settings},
    )
    return random_weights(connector)


def make_pooling(name, **options):
    """A connector with this pooling over four patches, or over one."""
    options = {"num_queries": 4} | options if name in MANY_TOKENS else options
    return make(pooling=name, window=(1, 1) if name == "none" else (2, 2), **options)


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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("fusion", [None, "sum", "concat"])
@pytest.mark.parametrize("name", sorted(POOLINGS))
@torch.no_grad()
def test_holes_read_nothing(name, fusion, positions, masked):
    """Whatever index a hole is looked up at: patches that no window names have no effect."""
    connector = make_pooling(
        name, pooling_attention_mask=masked, window_position_embedding=positions, scale_fusion=fusion
    )
    features, _ = windows()
    pooling = torch.full((3, connector.columns), -1)
    pooling[0, 0] = 5
    pooling[1, -1] = 7
    other = features + 100
    for named in (5, 7):
        other.view(-1, WIDTH * LAYERS)[named] = features.view(-1, WIDTH * LAYERS)[named]
    assert torch.equal(connector(features, pooling), connector(other, pooling))
    pooling[2, 0] = 1
    assert (connector(features, pooling) - connector(other, pooling)).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_windows_of_holes_are_finite(name, masked):
    connector = make_pooling(name, pooling_attention_mask=masked)
    features, _ = windows()
    features.requires_grad_()
    tokens = connector(features, torch.full((2, connector.columns), -1))
    tokens.sum().backward()
    assert tokens.isfinite().all() and features.grad.abs().max() == 0
    assert all(parameter.grad.isfinite().all() for parameter in connector.parameters())


@pytest.mark.parametrize("projector", sorted(PROJECTORS))
@torch.no_grad()
def test_projectors_equal_the_formula(projector):
    connector = make(pooling="mean", projector=projector)
    features, pooling = windows()
    x = connector.pooling(*gather(features, pooling)).flatten(0, 1)
    weights = {name.removeprefix("projector."): value for name, value in connector.state_dict().items()}

    def swiglu(y, part=""):
        gate, up = y @ weights[f"{part}gate_proj.weight"].T, y @ weights[f"{part}up_proj.weight"].T
        return (gate * gate.sigmoid() * up) @ weights[f"{part}down_proj.weight"].T

    if projector == "linear":
        expected = x @ weights["weight"].T
    elif projector == "mlp":
        expected = swiglu(x)
    else:
        expected = swiglu(x, "first.") + swiglu(swiglu(x, "first."), "second.")
    assert expected.shape == (12, TEXT)
    torch.testing.assert_close(connector(features, pooling), expected, atol=1e-6, rtol=1e-5)


def gather(features, pooling):
    valid = pooling >= 0
    return features.flatten(0, 1)[pooling.clamp(min=0)] * valid[..., None], valid


@pytest.mark.parametrize("name", ["attention_meanq", "learned_queries", "c_abstractor", "stack"])
@pytest.mark.parametrize("fusion", ["sum", "concat"])
@torch.no_grad()
def test_scales_are_fused_window_by_window(name, fusion):
    """Each token of a window gets the same patch of the global crop; a hole there adds nothing."""
    connector = make_pooling(name, scale_fusion=fusion)
    features, fine = windows()
    coarse = torch.arange(12) * 2
    coarse[3] = -1
    tokens = connector(features, torch.cat([fine, coarse[:, None]], dim=1)).unflatten(0, (12, -1))
    flat = features.flatten(0, 1)
    for number, window in enumerate(fine):
        pooled = connector.pooling(*gather(features, window[None]))[0]
        other = flat[coarse[number]] if coarse[number] >= 0 else torch.zeros(WIDTH * LAYERS)
        for query, vector in enumerate(pooled):
            if fusion == "sum":
                fused = vector + connector.fusion.coarse_proj.weight @ other
            else:
                fused = connector.fusion.merge_proj.weight @ torch.cat([vector, other])
            torch.testing.assert_close(tokens[number, query], connector.projector(fused), atol=1e-5, rtol=1e-5)


def padding_by_hand(kind, feature, share, vectors):
    if kind == "regress":
        return feature + share * vectors[0]
    if share == 0:
        return feature + vectors[0]
    return feature + vectors[1] if kind == "pad_and_partial_pad" and share < 1 else feature


@pytest.mark.parametrize("kind", sorted(PADDING_VECTORS))
@torch.no_grad()
def test_padding_embeddings_equal_loops(kind):
    connector, plain = make(padding_embedding=kind), make()
    plain.load_state_dict(connector.state_dict(), strict=False)
    features, pooling = windows()
    masks = torch.tensor([0.0, 0.25, 1.0]).repeat(9).view(3, 9)
    masks[0, 0] = 1e-6  # a sliver of picture is none that is all padding
    by_hand = [
        padding_by_hand(kind, feature, float(share), connector.padding.weight)
        for feature, share in zip(features.flatten(0, 1), masks.flatten(), strict=True)
    ]
    expected = plain(torch.stack(by_hand).view_as(features), pooling)
    torch.testing.assert_close(connector(features, pooling, masks), expected, atol=1e-6, rtol=1e-5)
    connector.padding.first_weights()
    assert torch.equal(connector(features, pooling, masks), plain(features, pooling))


@pytest.mark.parametrize("kind", sorted(PADDING_VECTORS))
def test_padding_embeddings_get_gradients_without_padding(kind):
    connector = make(padding_embedding=kind)
    features, pooling = windows()
    connector(features, pooling, torch.ones(3, 9)).sum().backward()
    assert (connector.padding.weight.grad.abs().max() > 0) == (kind == "regress")
    with pytest.raises(DataError, match=r"needs patch_masks \[3, 9\], given: none"):
        connector(features, pooling)
    with pytest.raises(DataError, match=r"needs patch_masks \[3, 9\], given: \[2, 9\]"):
        connector(features, pooling, torch.ones(2, 9))


def test_windows_of_another_size_are_refused():
    features, pooling = windows()
    for fixed in ({"pooling": "stack"}, {"pooling_attention_mask": False}, {"window_position_embedding": True}):
        with pytest.raises(DataError, match="windows have 3 patches, the connector's 4"):
            make(**fixed)(features, pooling[:, :3])
    with pytest.raises(DataError, match="windows have 4 patches, the connector's 5"):
        make(scale_fusion="sum")(features, pooling)


def test_feature_dropout_drops_elements_of_features_in_training_alone():
    connector = make(feature_dropout=0.5, pooling="stack", projector="linear")
    features, pooling = torch.ones(3, 9, WIDTH * LAYERS), windows()[1]
    calls = []
    connector.pooling.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    torch.manual_seed(0)
    connector.train()(features, pooling)
    connector.eval()(features, pooling)
    trained, evaluated = calls
    kept = trained[pooling >= 0]
    assert set(kept.unique().tolist()) == {0.0, 2.0} and 0.4 < (kept == 0).float().mean() < 0.6
    assert set(evaluated[pooling >= 0].unique().tolist()) == {1.0}


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
