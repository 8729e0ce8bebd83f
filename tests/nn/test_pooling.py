"""Every pooling against an independent definition: torch's own attention and pooling, and plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from molmo_model.nn.pooling import MANY_TOKENS, POOLINGS, WITH_HEADS, PoolingSpec, adaptive_mean
from tests.nn.conftest import random_weights

FEATURES, WIDTH, HEADS, TOKENS = 12, 8, 2, 10


def make(name, masked, window=(2, 2), queries=1):
    queries = queries if name in MANY_TOKENS else 1
    window = (1, 1) if name == "none" else window
    torch.manual_seed(3)
    return random_weights(POOLINGS[name](PoolingSpec(FEATURES, WIDTH, window, HEADS, masked, queries)))


def windows(size, seed=0, holes=0.3):
    rng = torch.Generator().manual_seed(seed)
    valid = torch.rand(TOKENS, size, generator=rng) >= holes
    valid[:, -1] |= ~valid.any(-1)
    return torch.randn(TOKENS, size, FEATURES, generator=rng) * valid[..., None], valid


def mean_by_hand(window, valid, masked):
    out = torch.zeros(len(window), FEATURES)
    for token in range(len(window)):
        for feature in range(FEATURES):
            values = [
                float(window[token, place, feature])
                for place in range(window.shape[1])
                if valid[token, place] or not masked
            ]
            out[token, feature] = sum(values) / len(values)
    return out


def first_by_hand(window, valid, masked):
    places = [next(p for p in range(window.shape[1]) if valid[t, p] or not masked) for t in range(len(window))]
    return torch.stack([window[token, place] for token, place in enumerate(places)])


QUERIES = {
    "attention_meanq": (mean_by_hand, 1),
    "attention_meanq_2x": (mean_by_hand, 2),
    "attention_meanq_4x": (mean_by_hand, 4),
    "attention": (first_by_hand, 1),
    "attention_2wide": (first_by_hand, 2),
    "learned_queries": (None, 1),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", WITH_HEADS)
@torch.no_grad()
def test_attention_equals_torchs_own(name, masked):
    by_hand, factor = QUERIES[name]
    pooling = make(name, masked, (2, 3), queries=3)
    window, valid = windows(6)
    wide = factor * WIDTH
    assert pooling.out_features == wide and pooling.q_proj.out_features == wide  # embedding and heads grow together
    torchs = nn.MultiheadAttention(wide, HEADS, kdim=FEATURES, vdim=FEATURES, batch_first=True)
    torchs.q_proj_weight.copy_(torch.eye(wide))  # torch's queries are as wide as the result: project them before
    torchs.k_proj_weight.copy_(pooling.k_proj.weight)
    torchs.v_proj_weight.copy_(pooling.v_proj.weight)
    torchs.in_proj_bias.copy_(torch.cat([torch.zeros(wide), pooling.k_proj.bias, pooling.v_proj.bias]))
    torchs.out_proj.load_state_dict(pooling.o_proj.state_dict())
    queries = pooling.queries.expand(TOKENS, -1, -1) if by_hand is None else by_hand(window, valid, masked)[:, None]
    asked = pooling.q_proj(queries)
    expected, _ = torchs(asked, window, window, key_padding_mask=~valid if masked else None)
    pooled = pooling(window, valid)
    assert pooled.shape == (TOKENS, 3 if name == "learned_queries" else 1, wide)
    # worst seen: 1.2e-7
    torch.testing.assert_close(pooled, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("window", [(2, 2), (4, 4), (1, 3)])
def test_mean_equals_loops(masked, window):
    patches, valid = windows(math.prod(window))
    pooled = make("mean", masked, window)(patches, valid)
    torch.testing.assert_close(pooled[:, 0], mean_by_hand(patches, valid, masked), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_none_and_stack_keep_every_patch(masked):
    patches, valid = windows(1, holes=0)
    assert torch.equal(make("none", masked)(patches, valid), patches)
    patches, valid = windows(6)
    stacked = make("stack", masked, (2, 3))(patches, valid)
    for token in range(TOKENS):
        assert stacked[token, 0].tolist() == [value for patch in patches[token].tolist() for value in patch]


def block_by_hand(block, x):
    """One residual block of a whole grid [T, C, h, w], with torch's convolutions."""

    def norm(y, layer):
        return F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], layer.weight, layer.bias).permute(0, 3, 1, 2)

    def pointwise(y, linear):
        return F.conv2d(y, linear.weight[:, :, None, None], linear.bias)

    y = F.silu(norm(pointwise(x, block.expand), block.expand_norm))
    y = F.conv2d(y, block.spread.weight, padding=1, groups=y.shape[1])
    y = F.silu(norm(y, block.spread_norm))
    gate = pointwise(F.silu(pointwise(F.adaptive_avg_pool2d(y, 1), block.squeeze)), block.gate).sigmoid()
    y = norm(pointwise(y * gate, block.project), block.project_norm)
    return F.silu(y + (x if block.shortcut is None else pointwise(x, block.shortcut)))


def abstract_by_hand(pooling, window, size, side):
    x = window.view(-1, *size, FEATURES).permute(0, 3, 1, 2)
    for block in pooling.before:
        x = block_by_hand(block, x)
    x = F.adaptive_avg_pool2d(x, side)
    for block in pooling.behind:
        x = block_by_hand(block, x)
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("size", "side"), [((3, 5), 2), ((4, 4), 4), ((5, 3), 1)])
@torch.no_grad()
def test_c_abstractor_equals_torchs_convolutions(size, side):
    """Without the mask, holes are zero vectors like any other; with it, nothing changes where there are none."""
    pooling = make("c_abstractor", False, size, side**2)
    window, valid = windows(math.prod(size))
    expected = abstract_by_hand(pooling, window, size, side)
    assert expected.shape == (TOKENS, side**2, WIDTH)
    # worst seen: 3.9e-6
    torch.testing.assert_close(pooling(window, valid), expected, atol=1e-5, rtol=1e-5)
    pooling.use_mask = True
    torch.testing.assert_close(pooling(window, torch.ones_like(valid)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_c_abstractor_with_a_mask_equals_a_smaller_window():
    """Holes at the border are as good as the zeros that a convolution adds there."""
    pooling = make("c_abstractor", True, (4, 5))
    window, _ = windows(20)
    valid = torch.zeros(TOKENS, 4, 5, dtype=torch.bool)
    valid[:, :3, 1:] = True
    small = window.view(TOKENS, 4, 5, FEATURES)[:, :3, 1:].reshape(TOKENS, 12, FEATURES)
    masked = pooling(window * valid.flatten(1)[..., None], valid.flatten(1))
    torch.testing.assert_close(masked, abstract_by_hand(pooling, small, (3, 4), 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (6, 6), (5, 9)])
def test_adaptive_mean_equals_torch_and_loops(size):
    rng = torch.Generator().manual_seed(0)
    grid = torch.randn(3, *size, 4, generator=rng)
    for side in range(1, min(size) + 1):
        expected = F.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        found = adaptive_mean(grid, torch.ones(3, *size, 1), side)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        shown = (torch.rand(3, *size, 1, generator=rng) < 0.5).float()
        found = adaptive_mean(grid, shown, side)
        for token, row, column in torch.cartesian_prod(*(torch.arange(n) for n in (3, side, side))).tolist():
            top, bottom = row * size[0] // side, math.ceil((row + 1) * size[0] / side)
            left, right = column * size[1] // side, math.ceil((column + 1) * size[1] / side)
            inside = grid[token, top:bottom, left:right][shown[token, top:bottom, left:right, 0] > 0]
            mean = inside.mean(0) if len(inside) else torch.zeros(4)
            torch.testing.assert_close(found[token, row, column], mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(POOLINGS) - {"none", "stack"}))
@torch.no_grad()
def test_the_mask_tells_holes_from_zeros(name):
    """Two holes fewer or more change nothing with the mask, and something without it."""
    window = windows(4, holes=0)[0]
    window[:, 2:] = 0
    valid = torch.tensor([[True, True, False, False]]).expand(TOKENS, 4)
    masked, plain = (make(name, masked, (2, 2), 4) for masked in (True, False))
    if name != "c_abstractor":  # its average knows where a patch stands
        few = PoolingSpec(FEATURES, WIDTH, (1, 2), HEADS, True, 4)
        small = POOLINGS[name](few)
        small.load_state_dict(masked.state_dict())
        torch.testing.assert_close(masked(window, valid), small(window[:, :2], valid[:, :2]), atol=1e-6, rtol=1e-5)
    assert (masked(window, valid) - plain(window, valid)).abs().max() > 1e-3
    torch.testing.assert_close(plain(window, valid), masked(window, torch.ones_like(valid)), atol=1e-6, rtol=1e-5)
