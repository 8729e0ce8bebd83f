"""Pruned prompts against loops and against prompts shortened by hand, answered without a cache."""

from math import ceil

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from molmo_model.config import DecodingConfig
from molmo_model.errors import ConfigError
from molmo_model.model_config import PaddingEmbedding, Pooling
from molmo_model.nn.build import build_model
from molmo_model.nn.generation import generate
from molmo_model.nn.token_pruning import diverse, prune_image_tokens
from tests.nn.conftest import IM_PATCH, PATCHES, VOCAB, Conversation, crops_and_pooling, lay_out, random_weights
from tests.nn.test_generation import collate

TREES = [Conversation([7], 2, []), Conversation([5, 8], 1, []), Conversation([], 5, []), Conversation([1], 9, [])]


@pytest.fixture
def model(make_params):
    return random_weights(build_model(make_params(), seed=1)).eval()


def prompts(seed=4):
    rng = torch.Generator().manual_seed(seed)
    return [(lay_out(tree, rng), *crops_and_pooling(tree.image_tokens, rng), tree.image_tokens) for tree in TREES]


def greedy_by_hand(tokens, count):
    """DivPrune's greedy solution in plain loops."""
    unit = [vector / vector.norm() for vector in tokens]

    def distance(i, j):
        return 1 - float(unit[i] @ unit[j])

    everyone = range(len(tokens))
    first = max(everyone, key=lambda i: min((distance(i, j) for j in everyone if j != i), default=0.0))
    chosen = [first]
    while len(chosen) < count:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance(i, j) for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_the_most_different_tokens_stay(count):
    rng = torch.Generator().manual_seed(count)
    tokens = torch.randn(12, 6, generator=rng)
    assert diverse(tokens, count).tolist() == greedy_by_hand(tokens, count)
    assert diverse(tokens * torch.rand(12, 1, generator=rng), count).tolist() == greedy_by_hand(tokens, count)


def test_copies_go_first():
    vectors = torch.eye(4)[[0, 0, 1, 1, 1, 2, 3, 3]]
    assert len({int(vectors[place].argmax()) for place in diverse(vectors, 4)}) == 4
    assert diverse(torch.ones(5, 3), 5).tolist() == [0, 1, 2, 3, 4]
    assert diverse(torch.zeros(3, 3), 2).tolist() == [0, 1]


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.75])
def test_rows_hold_what_is_left(model, keep):
    """Only image tokens go, the same share of each image; the rest keeps its order and positions."""
    items = prompts()
    batch = collate(items)
    pruned = prune_image_tokens(model, batch, keep, pad_id=3)
    tokens = model.get_image_features(
        batch["pixel_values"], batch["pooling"], batch["image_token_counts"]
    ).pooler_output
    counts = [ceil(keep * count) for count in batch["image_token_counts"].tolist()]
    assert pruned["image_token_counts"].tolist() == counts
    kept = [diverse(one, count).tolist() for one, count in zip(tokens, counts, strict=True)]
    left = pruned["mm_encoder_outputs"]["image"].pooler_output
    assert all(torch.equal(a, b[places]) for a, b, places in zip(left, tokens, kept, strict=True))
    assert not {"pixel_values", "pooling"} & set(pruned)
    chosen = iter(
        [
            place in places
            for count, places in zip(batch["image_token_counts"], kept, strict=True)
            for place in range(count)
        ]
    )
    rows = []
    for row, *_ in items:
        stays = [token != IM_PATCH or next(chosen) for token in row.ids]
        rows.append([(row.ids[i], row.images[i], i) for i in range(len(row.ids)) if stays[i]])
    length = max(map(len, rows))
    for number, row in enumerate(rows):
        pads = length - len(row)
        ids, images, positions = (list(values) for values in zip(*row, strict=True))
        assert pruned["input_ids"][number].tolist() == [3] * pads + ids
        assert pruned["attention_mask"][number].tolist() == [0] * pads + [1] * len(row)
        assert pruned["image_ids"][number].tolist() == [0] * pads + images
        assert pruned["position_ids"][number].tolist() == [0] * pads + positions


@torch.no_grad()
def argmax_without_cache(model, pruned, steps):
    """Greedy answers of one pruned row, everything computed again for every token, by the training rule."""
    ids, images = pruned["input_ids"], pruned["image_ids"]
    positions, tokens = pruned["position_ids"], []
    for _ in range(steps):
        encoded = {
            "image": BaseModelOutputWithPooling(pooler_output=pruned["mm_encoder_outputs"]["image"].pooler_output)
        }
        logits = model(
            input_ids=ids,
            position_ids=positions,
            example_ids=torch.zeros_like(ids),
            image_ids=images,
            mm_encoder_outputs=encoded,
        ).logits
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], dim=1)
        images = torch.cat([images, torch.zeros(1, 1, dtype=torch.long)], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return tokens


@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_answers_equal_one_by_one_and_the_definition(model, keep):
    items = prompts()
    together = generate(model, prune_image_tokens(model, collate(items), keep), 8, [VOCAB])
    for number, item in enumerate(items):
        pruned = prune_image_tokens(model, collate([item]), keep)
        assert generate(model, pruned, 8, [VOCAB]) == [together[number]]
        if item[-1]:
            assert argmax_without_cache(model, pruned, 8) == together[number]
    whole = generate(model, collate(items), 8, [VOCAB])
    assert whole != together and whole[2] == together[2]  # of text alone nothing goes


def test_keeping_all_changes_no_answer(model):
    batch = collate(prompts())
    whole = generate(model, batch, 8, [VOCAB])
    assert prune_image_tokens(model, batch, 1.0) == batch
    nearly = prune_image_tokens(model, batch, 0.99)  # every token stays, by the other way
    assert nearly["input_ids"].shape == batch["input_ids"].shape and generate(model, nearly, 8, [VOCAB]) == whole


def test_images_are_encoded_once(model):
    calls = []
    model.model.vision_backbone.register_forward_hook(lambda *_: calls.append(model.training))
    model.train()
    pruned = prune_image_tokens(model, collate(prompts()), 0.5)
    first = generate(model, pruned, 4, [VOCAB], DecodingConfig(num_beams=2))
    assert generate(model, pruned, 4, [VOCAB], DecodingConfig(num_beams=2)) == first
    assert calls == [False] and model.training
    tokens = [tokens.clone() for tokens in pruned["mm_encoder_outputs"]["image"].pooler_output]
    batch = collate(prompts())
    known = model.eval().get_image_features(batch["pixel_values"], batch["pooling"], batch["image_token_counts"])
    again = prune_image_tokens(model, batch, 0.5, tokens=known.pooler_output)
    left = again["mm_encoder_outputs"]["image"].pooler_output
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(left, tokens, strict=True))


def test_several_tokens_of_a_window_and_padding(make_params):
    params = make_params(
        connector={
            "pooling": Pooling.learned_queries,
            "num_queries": 3,
            "padding_embedding": PaddingEmbedding.regress,
        }
    )
    model = random_weights(build_model(params, seed=1)).eval()
    rng = torch.Generator().manual_seed(1)
    pixels, pooling = crops_and_pooling([3], rng)
    batch = collate([(lay_out(Conversation([9], 2, []), rng), pixels, pooling, [9])])
    batch["patch_masks"] = torch.rand(1, PATCHES, generator=rng)
    pruned = prune_image_tokens(model, batch, 0.5)
    assert (pruned["input_ids"] == IM_PATCH).sum() == 5
    (answer,) = generate(model, pruned, 4, [VOCAB])
    assert answer == argmax_without_cache(model, pruned, 4)


def test_what_cannot_be_is_refused(model):
    batch = collate(prompts())
    for keep in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            prune_image_tokens(model, batch, keep)
    with pytest.raises(ConfigError, match="selects its image tokens itself"):
        prune_image_tokens(model, {**batch, "selector_low": batch["pooling"]}, 0.5)
