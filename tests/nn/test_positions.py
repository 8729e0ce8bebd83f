"""Positions of patches: rotary ones against brute force and under shifts, learned rows and columns, and what refuses
them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from molmo_model.errors import ConfigError
from molmo_model.model_config import VisionConfig, VisionPositions
from molmo_model.nn.build import build_config, build_model, component_of, restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.positions import ROTARY, ROTARY_BASE, LearnedPositions2D, Rotary2D
from molmo_model.nn.vision_config import vision_config
from molmo_model.nn.vision_encoder import VISION_ENCODERS, ViTFeatures
from tests.nn.conftest import random_weights

FAMILIES = ["siglip", "clip", "dinov2_small", "dinov2_registers"]
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 4}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def turned(vector, row, column):
    """One head's channels as complex numbers, turned by row and by column."""
    quarter = len(vector) // 4
    out = []
    for half, place in ((vector[: 2 * quarter], row), (vector[2 * quarter :], column)):
        numbers = [complex(half[i], half[i + quarter]) for i in range(quarter)]
        angles = [place * ROTARY_BASE ** (-i / quarter) for i in range(quarter)]
        numbers = [z * complex(math.cos(a), math.sin(a)) for z, a in zip(numbers, angles, strict=True)]
        out += [z.real for z in numbers] + [z.imag for z in numbers]
    return out


def test_rotation_against_complex_numbers():
    rotary = Rotary2D(grid=3, prefix=2, head_width=8)
    heads = torch.randn(2, 2, 2 + 9, 8)
    found = rotary(heads)
    assert torch.equal(found[:, :, :2], heads[:, :, :2])  # prefix tokens have no place
    for crop in range(2):
        for head in range(2):
            for patch in range(9):
                expected = turned(heads[crop, head, 2 + patch].tolist(), patch // 3, patch % 3)
                torch.testing.assert_close(
                    found[crop, head, 2 + patch], torch.tensor(expected), atol=1e-6, rtol=0
                )  # worst measured: 2.4e-7


def test_products_depend_on_the_distance_alone():
    """The same query and key anywhere in the grid: equal products where they are equally far apart."""
    rotary = Rotary2D(grid=6, prefix=1, head_width=16)
    query, key = torch.randn(2, 16)
    products = rotary(query.expand(1, 1, 37, 16))[0, 0, 1:] @ rotary(key.expand(1, 1, 37, 16))[0, 0, 1:].T
    products = products.view(6, 6, 6, 6)
    for rows, columns in ((0, 0), (1, 0), (0, 2), (3, 1)):
        same = torch.stack([products[r, c, r + rows, c + columns] for r in range(6 - rows) for c in range(6 - columns)])
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-5, rtol=0)  # worst measured: 1.2e-6
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3


@pytest.mark.parametrize("encoder", FAMILIES)
@torch.no_grad()
def test_first_block_of_every_family_against_brute_force(encoder):
    """The encoder's attention written out: project, turn each patch by its place, softmax, project."""
    config, layers = vision_config(VisionConfig(encoder=encoder, feature_layers=[0], **SIZES))
    features = random_weights(ViTFeatures(config, encoder, layers, "rope_2d")).eval()
    spec, vit = features.spec, features.vit
    seen = {}
    attention = spec.attention(features.blocks[0])
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=(args or [kwargs["hidden_states"]])[0], y=output[0]),
        with_kwargs=True,
    )
    features(torch.randn(2, 3, 32, 32))
    x = seen["x"]
    q, k, v = (getattr(attention, name)(x).view(2, -1, 4, 8).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    for heads in (q, k):
        for crop in range(2):
            for head in range(4):
                for patch in range(16):
                    place = spec.prefix_tokens + patch
                    expected = turned(heads[crop, head, place].tolist(), patch // 4, patch % 4)
                    heads[crop, head, place] = torch.tensor(expected)
    mixed = ((q @ k.transpose(2, 3)) / 8**0.5).softmax(-1) @ v
    out = getattr(attention, "out_proj", None) or attention.o_proj
    expected = out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["y"], expected, atol=2e-6, rtol=0)  # worst measured: 4.8e-7
    assert vit.config._attn_implementation == ROTARY
    assert not any("position" in name for name, _ in features.named_parameters())


@pytest.mark.parametrize("encoder", FAMILIES)
@torch.no_grad()
def test_without_positions_order_does_not_matter_and_with_rotary_ones_it_does(encoder):
    """Patches of a shuffled picture: with the rotation turned off each keeps its features, so no position is left."""
    config, layers = vision_config(VisionConfig(encoder=encoder, feature_layers=[-1], **SIZES))
    features = random_weights(ViTFeatures(config, encoder, layers, "rope_2d")).eval()
    pixels = torch.randn(1, 3, 32, 32)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(pixels, 8, stride=8)
    shuffled = F.fold(patches[:, :, order], 32, 8, stride=8)
    assert (features(shuffled) - features(pixels)[:, order]).abs().max() > 1e-3
    features.rotary.cos.fill_(1)
    features.rotary.sin.fill_(0)
    torch.testing.assert_close(features(shuffled), features(pixels)[:, order], atol=1e-5, rtol=0)  # worst: 1.5e-6


@pytest.mark.parametrize("encoder", FAMILIES)
def test_rotary_model_is_saved_loaded_and_built_without_memory(encoder, make_params, batch, tmp_path):
    vision = {"positions": VisionPositions.rope_2d, "intermediate_size": 64}
    model = random_weights(build_model(make_params(encoder=encoder, vision=vision), 1)).eval()
    model.save_pretrained(tmp_path)
    logits = model(**batch).logits
    for options in ({}, {"attn_implementation": {"vision_config": "sdpa"}}):
        again = MolmoForConditionalGeneration.from_pretrained(tmp_path, **options).eval()
        assert again.config.vision_positions == "rope_2d"
        assert torch.equal(again(**batch).logits, logits)
    with torch.device("meta"):
        empty = MolmoForConditionalGeneration(model.config).eval()
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=True)
    for buffer in empty.buffers():
        buffer.zero_()
    restore_buffers(empty)
    assert torch.equal(empty(**batch).logits, logits)
    again.set_attn_implementation({"vision_config": "sdpa"})
    with pytest.raises(ConfigError, match="drops its rotary positions silently"):
        again(**batch)


@pytest.mark.slow
@torch.no_grad()
def test_rotary_blocks_compile():
    encoder = "clip"
    config, layers = vision_config(VisionConfig(encoder=encoder, feature_layers=[-1], **SIZES))
    features = random_weights(ViTFeatures(config, encoder, layers, "rope_2d")).eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = features(pixels)
    for block in features.blocks:
        block.compile(fullgraph=True)
    torch.testing.assert_close(features(pixels), expected, atol=1e-5, rtol=0)  # worst measured: 7.2e-7


def test_a_copy_has_a_rotation_of_its_own():
    config, layers = vision_config(VisionConfig(encoder="clip", feature_layers=[-1], **SIZES))
    features = ViTFeatures(config, "clip", layers, "rope_2d").eval()
    copied = copy.deepcopy(features)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(copied(pixels), features(pixels))
    assert copied.rotary is not features.rotary
    assert all(block.self_attn.rotary[0] is copied.rotary for block in copied.blocks)


def test_learned_rows_and_columns():
    positions = LearnedPositions2D(3, 4)
    features = torch.randn(2, 9, 4)
    positions.first_weights()
    assert torch.equal(positions(features), features)  # a pretrained encoder starts as it was
    random_weights(positions)
    found = positions(features)
    for patch in range(9):
        expected = features[:, patch] + positions.rows[patch // 3] + positions.columns[patch % 3]
        torch.testing.assert_close(found[:, patch], expected)


@pytest.mark.parametrize("encoder", FAMILIES)
def test_learned_positions_start_at_the_encoder_and_learn_with_the_connector(encoder, make_params, batch, tmp_path):
    size = {"intermediate_size": 64}
    plain = build_model(make_params(encoder=encoder, vision=size), 1).eval()
    learned = build_model(make_params(encoder=encoder, vision={"positions": VisionPositions.learned_2d, **size}), 1)
    state = plain.state_dict()
    new = {name for name in learned.state_dict() if name not in state}
    assert new == {f"model.vision_backbone.encoder.learned_positions.{name}" for name in ("rows", "columns")}
    assert {component_of(name) for name in new} == {"connector"}
    learned.load_state_dict(state, strict=False)
    assert torch.equal(learned.eval()(**batch).logits, plain(**batch).logits)
    learned(**batch).loss_sum.backward()
    assert all(dict(learned.named_parameters())[name].grad.abs().max() > 0 for name in new)
    learned.save_pretrained(tmp_path)
    again = MolmoForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, learned(**batch).logits)


def test_what_rotary_positions_refuse(make_params, tmp_path):
    build_model(make_params(), 1).model.vision_backbone.encoder.vit.save_pretrained(tmp_path)
    free = dict.fromkeys(("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"))
    rotary = {"positions": VisionPositions.rope_2d}
    with pytest.raises(ConfigError, match=r"take the place of the learned ones.*leave `pretrained` out"):
        build_config(make_params(vision={**free, **rotary, "feature_layers": [-1], "pretrained": str(tmp_path)}))
    with pytest.raises(ConfigError, match="2 channels per head are no multiple of 4"):
        build_config(make_params(vision={**rotary, "num_heads": 16}))
    assert VISION_ENCODERS["siglip"].hidden_size // 16 % 4 == 0  # the published widths divide: 72 and 64
