"""The attention rule against a triple loop, and what follows from it: packing and message trees change nothing."""

import copy
import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, LlamaConfig, Qwen2Config

from molmo_model.nn.attention import (
    IMPLEMENTATION,
    PackedMask,
    allowed,
    block_mask,
    dense_mask,
    masks_for,
    molmo_attention,
    packed_mask,
    run_lengths,
)
from molmo_model.nn.build import build_model
from molmo_model.nn.generation import generate
from tests.nn.conftest import (
    Conversation,
    crops_and_pooling,
    lay_out,
    pack,
    random_weights,
    sliding_model,
    split_branches,
    tensors,
)
from tests.nn.families import FAMILIES


def random_layout(seed):
    """Example, segment, image and position ids of two rows, unordered enough to be unlike any real pack."""
    rng = random.Random(seed)
    length = rng.randint(5, 24)
    rows = []
    for _ in range(2):
        row = {"example": [], "segment": [], "image": [], "position": []}
        example = 0
        while len(row["example"]) < length:
            run = rng.randint(1, 8)
            row["example"] += [example if rng.random() < 0.85 else -1] * run
            row["segment"] += [rng.choice([10_000, 0, 1, 2]) for _ in range(run)]
            row["image"] += [rng.choice([0, 0, 1, 2]) for _ in range(run)]
            row["position"] += [rng.randint(0, 9) for _ in range(run)]
            example += 1
        rows.append({name: values[:length] for name, values in row.items()})
    return rows, length


def loop_mask(rows, length, segments, images, window):
    mask = torch.zeros(2, 1, length, length, dtype=torch.bool)
    for b, row in enumerate(rows):
        for q in range(length):
            for k in range(length):
                if row["example"][q] != row["example"][k]:
                    continue
                visible = k <= q
                if segments and row["segment"][q] > row["segment"][k]:
                    visible = False
                if window and row["position"][q] - row["position"][k] >= window:
                    visible = False
                if images and row["image"][q] > 0 and row["image"][q] == row["image"][k]:
                    visible = True
                mask[b, 0, q, k] = visible
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_rule_equals_triple_loop(seed):
    rows, length = random_layout(seed)
    ids = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    choose = random.Random(seed + 1000)
    segments, images, window = choose.random() < 0.7, choose.random() < 0.7, choose.choice([None, 1, 3])
    rule = allowed(
        ids["example"],
        ids["segment"] if segments else None,
        ids["image"] if images else None,
        ids["position"],
        window,
    )
    expected = loop_mask(rows, length, segments, images, window)
    assert torch.equal(dense_mask(rule, 2, length, "cpu"), expected)
    assert torch.equal(create_mask(rule, 2, None, length, length, device="cpu").expand(2, 1, -1, -1), expected)
    if (lengths := run_lengths(ids["example"])) is not None:
        packed = packed_mask(rule, lengths, 2, length, "cpu")
        rebuilt = torch.block_diag(*[mask[0, 0].float() for mask in packed.masks]).bool()
        assert torch.equal(rebuilt, torch.block_diag(*[row[0].float() for row in expected]).bool())


def test_run_lengths():
    assert run_lengths(torch.tensor([[0, 0, 1, -1], [1, 1, 1, 1]])) == (2, 1, 1, 4)
    assert run_lengths(torch.tensor([[0, 1, 0]])) is None


@pytest.mark.parametrize("gate", [False, True])
def test_all_kinds_of_mask_attend_alike(gate):
    rng = torch.Generator().manual_seed(0)
    rows = [pack([lay_out(Conversation([3], 2, [3, 2]), rng), lay_out(Conversation([2, 2], 1, [4]), rng)], 40)]
    ids = tensors(rows * 2)
    rule = allowed(ids["example_ids"], ids["segment_ids"], ids["image_ids"])
    q = torch.randn(2, 4, 40, 8, generator=rng)
    k, v = torch.randn(2, 2, 2, 40, 8, generator=rng)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    gates = torch.rand(2, 40, generator=rng) if gate else None
    masks = [
        dense_mask(rule, 2, 40, "cpu"),
        packed_mask(rule, run_lengths(ids["example_ids"]), 2, 40, "cpu"),
        block_mask(rule, 2, 40, "cpu"),
    ]
    outputs = [molmo_attention(module, q, k, v, mask, scaling=0.3, value_gate=gates)[0] for mask in masks]
    wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v if gates is None else v * gates[:, None, :, None]))
    scores = (q @ wide_k.transpose(-1, -2) * 0.3).masked_fill(~masks[0], -torch.inf)
    expected = (scores.softmax(-1) @ wide_v).transpose(1, 2)
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_attention_over_random_layouts_equals_a_loop(seed):
    """Every kind of mask, with fewer heads of keys and with a gate on the values, against one softmax per query."""
    rows, length = random_layout(seed)
    ids = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    rule = allowed(ids["example"], ids["segment"], ids["image"], ids["position"], 4 if seed % 2 else None)
    visible = loop_mask(rows, length, True, True, 4 if seed % 2 else None)[:, 0]
    rng = torch.Generator().manual_seed(seed)
    width = (16, 24, 72)[seed % 3]
    q = torch.randn(2, 4, length, width, generator=rng)
    k, v = torch.randn(2, 2, 2, length, width, generator=rng)
    gate = torch.rand(2, length, generator=rng)
    expected = torch.empty(2, length, 4, width)
    for b in range(2):
        for place in range(length):
            seen = visible[b, place].nonzero()[:, 0]
            for head in range(4):
                scores = (k[b, head // 2, seen] @ q[b, head, place] * width**-0.5).softmax(-1)
                expected[b, place, head] = (scores * gate[b, seen]) @ v[b, head // 2, seen]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    masks = [dense_mask(rule, 2, length, "cpu"), block_mask(rule, 2, length, "cpu")]
    if (lengths := run_lengths(ids["example"])) is not None:
        masks.append(packed_mask(rule, lengths, 2, length, "cpu"))
    for mask in masks:
        found = molmo_attention(module, q, k, v, mask, scaling=width**-0.5, value_gate=gate)[0]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_window_needs_positions():
    with pytest.raises(ValueError, match="measured in positions"):
        allowed(torch.zeros(1, 3), window=2)


def test_masks_for_follows_the_layer_types():
    ids = torch.zeros(1, 6, dtype=torch.long)
    positions = torch.arange(6)[None]
    sliding = Qwen2Config(
        num_hidden_layers=2, use_sliding_window=True, sliding_window=2, max_window_layers=1, vocab_size=8
    )
    masks = masks_for(sliding, example_ids=ids, position_ids=positions, kind="dense")
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert masks["full_attention"].sum() == 21 and masks["sliding_attention"].sum() == 11
    assert isinstance(masks_for(sliding, example_ids=ids, position_ids=positions)["full_attention"], PackedMask)
    assert masks_for(LlamaConfig(), example_ids=ids).shape == (1, 1, 6, 6)
    scattered = torch.tensor([[0, 1, 0]])
    assert masks_for(Qwen2Config(), example_ids=scattered)["full_attention"].shape == (1, 1, 3, 3)
    with pytest.raises(ValueError, match="in one piece"):
        masks_for(Qwen2Config(), example_ids=scattered, kind="packed")


def test_registered_for_attention_and_masks():
    """Without the mask registration a padding mask would be dropped: the padded batch would differ."""
    assert IMPLEMENTATION in AttentionInterface() and IMPLEMENTATION in AttentionMaskInterface()
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModel.from_config(config, attn_implementation=IMPLEMENTATION).eval()
    ids = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[0, 2:]
    alone = model(input_ids=ids[:1, 2:]).last_hidden_state[0]
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=0)


KINDS = [(family, True, "any") for family in FAMILIES] + [
    *((family, False, "any") for family in ("llama", "olmo3")),
    *((family, True, "dense") for family in ("qwen2", "olmo3")),
    ("qwen2 with a window", True, "any"),
]


def comparable(family, bidirectional, make_params):
    """A model of every family, with a window where it has or can have sliding layers."""
    name = family.split()[0]
    params = make_params(family=name, language={**FAMILIES[name], "bidirectional_images": bidirectional})
    return random_weights(sliding_model(params, window=4) if "with a window" in family else build_model(params, seed=1))


def three_trees():
    """A message tree of each kind: with one image, with two, without; longer than the windows of the tests."""
    rng = torch.Generator().manual_seed(2)
    trees = [
        lay_out(tree, rng)
        for tree in (Conversation([3], 2, [4, 3, 5]), Conversation([2, 4], 1, [3]), Conversation([], 4, [5, 2]))
    ]
    pixels, pooling = crops_and_pooling([3, 2, 4], rng)
    return trees, pixels, pooling


@pytest.mark.parametrize(("family", "bidirectional", "kind"), KINDS)
def test_packed_trees_equal_separate_conversations(family, bidirectional, kind, make_params, monkeypatch):
    """One row of three message trees against six conversations alone: logits, loss and every gradient. Logits are of
    size 2 to 3; the worst difference seen over all families is 2.2e-6, that of a gradient 5e-6 of its largest."""
    model = comparable(family, bidirectional, make_params)
    if kind == "dense":
        monkeypatch.setattr("molmo_model.nn.attention.run_lengths", lambda ids: None)
    trees, pixels, pooling = three_trees()
    model.config.load_balancing_weight = model.config.router_z_weight = 0.0  # means over a batch, not sums
    whole = model(**tensors([pack(trees, 72)]), pixel_values=pixels, pooling=pooling)
    whole.loss_sum.backward()
    packed_grads = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()

    of_tree = [(slice(0, 1), slice(0, 3)), (slice(1, 3), slice(3, 9)), (slice(0, 0), slice(0, 0))]
    logits, loss_sum, weight_sum = [], 0.0, 0.0
    for tree, (crops, windows) in zip(trees, of_tree, strict=True):
        for conversation in split_branches(tree):
            patches = crops.start * 16
            own = pooling[windows]
            images = {"pixel_values": pixels[crops], "pooling": torch.where(own < 0, -1, own - patches)}
            one = model(**tensors([conversation]), **images)
            one.loss_sum.backward()
            logits.append(one.logits)
            loss_sum, weight_sum = loss_sum + one.loss_sum.item(), weight_sum + one.weight_sum.item()
    assert weight_sum == pytest.approx(whole.weight_sum.item(), rel=1e-6)
    assert loss_sum == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    torch.testing.assert_close(whole.logits, torch.cat(logits), atol=1e-5, rtol=0)
    for key, value in model.named_parameters():
        scale = packed_grads[key].abs().max()  # zero but for rounding in key biases, which a softmax does not see
        assert (value.grad - packed_grads[key]).abs().max() < 1e-4 * scale + 1e-5, key


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("broken", ["segment_ids", "example_ids"])
def test_every_family_needs_segments_and_examples(family, broken, make_params):
    """Left out, logits change by 0.2 or more in every family; so the comparison above has power."""
    model = comparable(family, True, make_params)
    trees, pixels, pooling = three_trees()
    batch = {**tensors([pack(trees, 72)]), "pixel_values": pixels, "pooling": pooling}
    right = model(**batch).logits
    wrong = model(**{**batch, broken: torch.zeros_like(batch[broken])}).logits
    assert (right - wrong).abs().max() > 0.05


@torch.no_grad()
def test_windows_are_measured_in_positions(make_params):
    """OLMo 3 beyond its window: equal to transformers' own on a plain conversation; by index, a tree would differ."""
    model = comparable("olmo3", True, make_params).eval()
    text = model.config.text_config
    assert text.layer_types == ["sliding_attention"] * 3 + ["full_attention"] and text.sliding_window == 6
    own = AutoModel.from_config(copy.deepcopy(text), attn_implementation="sdpa").eval()
    own.load_state_dict(model.model.language_model.state_dict())
    ids = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = own(ids).last_hidden_state
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, expected, atol=1e-5, rtol=0)  # seen: 0

    trees, pixels, pooling = three_trees()
    batch = {**tensors([pack(trees, 72)]), "pixel_values": pixels, "pooling": pooling}
    right = model(**batch).logits
    rule = {"example_ids": batch["example_ids"], "segment_ids": batch["segment_ids"], "image_ids": batch["image_ids"]}
    by_index = masks_for(text, **rule, position_ids=torch.arange(72)[None], kind="dense")
    assert (model(**{**batch, "attention_mask": by_index}).logits - right).abs().max() > 0.05
    plain = dense_mask(allowed(*rule.values()), 1, 72, "cpu")  # a single mask: sliding layers would lose their window
    assert (model(**{**batch, "attention_mask": plain}).logits - right).abs().max() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_equals_unpadded(family, make_params):
    """Logits of prompts padded on the left, and every token generated from them, equal those of each prompt alone."""
    model = comparable(family, True, make_params).eval()
    rng = torch.Generator().manual_seed(4)
    prompts = [Conversation([3], 4, []), Conversation([2, 3], 3, []), Conversation([], 5, [])]
    rows = [lay_out(one, rng) for one in prompts]
    pixels, pooling = crops_and_pooling([3, 2, 3], rng)
    parts = [(pixels[:1], pooling[:3], [3]), (pixels[1:], pooling[3:], [2, 3]), (pixels[:0], pooling[:0], [])]
    width = max(len(row.ids) for row in rows)
    ids, mask, images = (torch.zeros(3, width, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        place = (number, slice(width - len(row.ids), None))
        ids[place], mask[place], images[place] = torch.tensor(row.ids), 1, torch.tensor(row.images)
    together = model(input_ids=ids, attention_mask=mask, image_ids=images, pixel_values=pixels, pooling=pooling).logits
    batch = {"input_ids": ids, "attention_mask": mask, "image_ids": images, "pixel_values": pixels, "pooling": pooling}
    answers = generate(model, {**batch, "image_token_counts": torch.tensor([3, 2, 3])}, 8, [59])
    for number, (row, (crops, windows, counts)) in enumerate(zip(rows, parts, strict=True)):
        own = torch.where(windows < 0, -1, windows - 16 * (1 if number == 1 else 0))
        single = {"input_ids": torch.tensor([row.ids]), "image_ids": torch.tensor([row.images])}
        single |= {"pixel_values": crops, "pooling": own} if counts else {}
        alone = model(**single).logits[0]
        torch.testing.assert_close(together[number, -len(row.ids) :], alone, atol=1e-5, rtol=0)  # seen: 6e-7
        single |= {"attention_mask": torch.ones(1, len(row.ids), dtype=torch.long)}
        single |= {"image_token_counts": torch.tensor(counts)} if counts else {}
        assert generate(model, single, 8, [59]) == [answers[number]]


@pytest.mark.parametrize("broken", ["segment_ids", "example_ids"])
def test_the_comparison_has_power(broken, make_params, batch):
    model = random_weights(build_model(make_params(), seed=1))
    right = model(**batch).logits
    wrong = model(**{**batch, broken: torch.zeros_like(batch[broken])}).logits
    assert (right - wrong).abs().max() > 0.05


def test_value_gate_reaches_every_layer(make_params, batch):
    model = random_weights(build_model(make_params(), seed=1))
    plain = model(**batch).logits
    gate = torch.ones(2, 40, requires_grad=True)
    gated = model(**batch, value_gate=gate)
    assert torch.equal(gated.logits, plain)
    gated.loss.backward()
    assert (gate.grad[batch["example_ids"] >= 0] != 0).float().mean() > 0.5
    assert not torch.equal(model(**batch, value_gate=torch.zeros(2, 40)).logits, plain)
