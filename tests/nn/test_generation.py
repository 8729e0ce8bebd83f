"""Batched greedy answers against one row at a time and against argmax without a cache."""

import pytest
import torch

from molmo_model.nn.build import build_model
from molmo_model.nn.generation import finish_reason, generate
from tests.nn.conftest import VOCAB, Conversation, crops_and_pooling, lay_out, random_weights, sliding_model

PROMPTS = [Conversation([3], 2, []), Conversation([2, 4], 1, []), Conversation([], 5, []), Conversation([1], 9, [])]


def prompts(seed=4):
    """Prompts of different lengths with 1, 2, 0 and 1 images, each with its own crops."""
    rng = torch.Generator().manual_seed(seed)
    return [(lay_out(tree, rng), *crops_and_pooling(tree.image_tokens, rng), tree.image_tokens) for tree in PROMPTS]


def collate(items):
    length = max(len(row.ids) for row, *_ in items)

    def padded(values):
        return [0] * (length - len(values)) + values

    crops, windows, start = [], [], 0
    for _, pixels, pooling, counts in items:
        if counts:
            crops.append(pixels)
            windows.append(torch.where(pooling < 0, -1, pooling + start * 16))
            start += len(pixels)
    return {
        "input_ids": torch.tensor([padded(row.ids) for row, *_ in items]),
        "attention_mask": torch.tensor([padded([1] * len(row.ids)) for row, *_ in items]),
        "image_ids": torch.tensor([padded(row.images) for row, *_ in items]),
        "pixel_values": torch.cat(crops) if crops else torch.zeros(1, 32, 32, 3, dtype=torch.uint8),
        "pooling": torch.cat(windows) if windows else torch.zeros(0, 4, dtype=torch.long),
        "image_token_counts": torch.tensor([count for *_, counts in items for count in counts]),
    }


@torch.no_grad()
def argmax_without_cache(model, item, steps, ends):
    """The plain definition of greedy: run everything again for every token, attending by the training rule."""
    row, pixels, pooling, counts = item
    ids, images, tokens = list(row.ids), list(row.images), []
    for _ in range(steps):
        own = {"pixel_values": pixels, "pooling": pooling} if counts else {}
        length = len(ids)
        logits = model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.arange(length)[None],
            example_ids=torch.zeros(1, length, dtype=torch.long),
            image_ids=torch.tensor([images]),
            **own,
        ).logits[0, -1]
        if (token := int(logits.argmax())) in ends:
            break
        tokens.append(token)
        ids, images = [*ids, token], [*images, 0]
    return tokens


@pytest.mark.parametrize("kind", ["siglip", "clip", "sliding", "causal", "qwen3"])
def test_batch_equals_one_by_one_and_the_definition(kind, make_params):
    params = {
        "clip": {"encoder": "clip"},
        "causal": {"language": {"bidirectional_images": False}},
        "qwen3": {"family": "qwen3"},
    }
    tiny = make_params(**params.get(kind, {}))
    model = sliding_model(tiny, window=4) if kind == "sliding" else build_model(tiny, seed=1)
    random_weights(model).eval()
    items = prompts()
    free = [argmax_without_cache(model, item, 12, set()) for item in items]
    end = free[0][5]  # an end token that the model really says
    expected = [argmax_without_cache(model, item, 12, {end}) for item in items]
    assert len({tuple(tokens) for tokens in free}) == len(free)
    batch = generate(model, collate(items), 12, [end])
    assert batch == expected
    assert [generate(model, collate([item]), 12, [end])[0] for item in items] == expected
    assert {finish_reason(tokens, 12) for tokens in batch} >= {"stop"}
    for tokens, whole in zip(batch, free, strict=True):
        assert (finish_reason(tokens, 12) == "stop") == (end in whole)


def test_images_are_encoded_once(make_params):
    model = random_weights(build_model(make_params(), seed=1))
    calls = []
    model.model.vision_backbone.register_forward_hook(lambda *_: calls.append(1))
    answers = generate(model.train(), collate(prompts()), 6, [VOCAB - 1])
    assert len(calls) == 1 and len(answers) == 4 and model.training


def test_batch_without_images(make_params):
    model = random_weights(build_model(make_params(), seed=1))
    item = prompts()[2]
    (answer,) = generate(model, collate([item]), 5, [VOCAB - 1])
    bare = {name: value for name, value in collate([item]).items() if value.dim() == 2 and "pooling" not in name}
    assert generate(model, bare, 5, [VOCAB - 1]) == [answer]


def test_transformers_generate_takes_a_batch_without_images(make_params):
    """With the empty crop that stands for none, as without crops."""
    model = random_weights(build_model(make_params(), seed=1)).eval()
    batch = collate([prompts()[2]])
    bare = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model.generate(**batch, max_new_tokens=5).tolist() == model.generate(**bare, max_new_tokens=5).tolist()


def test_images_matter(make_params):
    """The comparison above has power: other pixels, or no bidirectional attention, give another answer."""
    model = random_weights(build_model(make_params(), seed=1)).eval()
    batch = collate(prompts())
    first = generate(model, batch, 12, [VOCAB - 1])
    assert generate(model, {**batch, "pixel_values": 255 - batch["pixel_values"]}, 12, [VOCAB - 1]) != first
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        images = {"pixel_values": batch["pixel_values"], "pooling": batch["pooling"]}
        both = model(**inputs, **images, image_ids=batch["image_ids"]).logits[0, -1]
        causal = model(**inputs, **images).logits[0, -1]
    assert (both - causal).abs().max() > 1e-3
