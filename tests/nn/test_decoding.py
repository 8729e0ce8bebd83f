"""Every way of choosing tokens: the same in a batch as alone, and right against brute force over all sequences."""

import pytest
import torch

from molmo_model.config import DecodingConfig
from molmo_model.errors import ConfigError
from molmo_model.nn.build import build_model
from molmo_model.nn.generation import Difference, Said, differences, generate, greedy
from molmo_model.nn.image_token_cache import ImageTokenCache
from tests.nn.conftest import IM_PATCH, VOCAB, random_weights, sliding_model
from tests.nn.test_generation import collate, prompts

END = VOCAB - 1
NEVER = [VOCAB + 5]
"""An id that the model cannot say, so that no answer ends."""
STEPS = 12


@pytest.fixture(scope="module")
def model(make_params):
    built = random_weights(build_model(make_params(), seed=1)).eval()
    with torch.no_grad():
        built.lm_head.weight.mul_(3.0)  # so that some tokens are likelier than others
    return built


def alone(model, items, decoding, seeds=None):
    """The answers of rows that are asked one by one."""
    seeds = seeds or [None] * len(items)
    return [
        generate(model, collate([item]), STEPS, [END], decoding, seeds=None if seed is None else [seed])[0]
        for item, seed in zip(items, seeds, strict=True)
    ]


# --- batches


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "olmo", "olmo2", "olmo3", "olmoe", "sliding"])
def test_a_batch_answers_as_its_rows_alone_but_for_near_ties(family, make_params):
    """Measured over the eight, 4 rows of up to 12 tokens each: no difference, 375 margins of at least 1.2e-3."""
    windows = {"olmo3": {"sliding_window": 6}, "olmoe": {"num_experts": 4, "num_experts_per_token": 2}}
    if family == "sliding":
        built = sliding_model(make_params(), window=4)
    else:
        built = build_model(make_params(family=family, language=windows.get(family, {})), seed=1)
    random_weights(built).eval()
    items = prompts()
    together = greedy(built, collate(items), STEPS, [END])
    apart = [greedy(built, collate([item]), STEPS, [END])[0] for item in items]
    ties = differences(together, apart)
    assert all(tie.near_tie for tie in ties), ties
    assert len(ties) <= 1
    assert [said.tokens for said in together] == generate(built, collate(items), STEPS, [END])
    margins = [margin for said in together for margin in said.margins]
    assert sum(margin > 1e-3 for margin in margins) > 0.9 * len(margins)  # so the comparison has power
    for one, other in zip(together, apart, strict=True):
        if one.tokens == other.tokens:
            assert one.margins == pytest.approx(other.margins, abs=1e-4)  # measured: 4.8e-6


def test_differences_are_found_at_their_first_place_with_their_margin():
    one = [Said([1, 2, 3], [0.5, 0.4, 0.3, 0.2]), Said([1], [0.5, 2e-4]), Said([7, 8], [1.0, 1.0])]
    other = [Said([1, 9, 3], [0.5, 0.1, 0.3, 0.2]), Said([1, 4], [0.5, 3e-4, 0.9]), Said([7, 8], [0.9, 1.0])]
    found = differences(one, other)
    assert found == [Difference(0, 1, (2, 9), 0.1), Difference(1, 1, (None, 4), 2e-4)]
    assert [difference.near_tie for difference in found] == [False, True]


def test_margins_are_those_of_the_logits(model):
    (said,) = greedy(model, collate([prompts()[2]]), 3, [END])
    item = prompts()[2]
    ids = [*item[0].ids, *said.tokens[:2]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -3:]
    best = logits.topk(2).values
    assert said.margins == pytest.approx((best[:, 0] - best[:, 1]).tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_answer_and_their_flips_are_counted(model, dtype):
    """Measured: 2 of 16 rows part in bf16, at margins of 0.04, and none in fp16; random weights decide by little."""
    rows = [item for seed in range(4) for item in prompts(seed)]
    exact = greedy(model, collate(rows), STEPS, [END])
    with torch.autocast("cpu", dtype=dtype):
        low = greedy(model, collate(rows), STEPS, [END])
    flips = differences(exact, low)
    assert len(flips) <= 8, flips
    assert all(flip.margin < 0.2 for flip in flips), flips
    assert any(a.margins != b.margins for a, b in zip(exact, low, strict=True))  # it really computed in `dtype`


# --- sampling

SAMPLED = DecodingConfig(do_sample=True)


def test_a_sampled_batch_answers_as_its_rows_alone(model):
    items, seeds = prompts(), [3, 1, 4, 1]
    decoding = DecodingConfig(do_sample=True, temperature=1.3, top_k=20, top_p=0.9)
    torch.manual_seed(0)
    together = generate(model, collate(items), STEPS, [END], decoding, seeds=seeds)
    state = torch.get_rng_state()
    assert together == alone(model, items, decoding, seeds)
    assert together == generate(model, collate(items), STEPS, [END], decoding, seeds=seeds)
    assert torch.equal(state, torch.get_rng_state())  # no draw from the global generator
    assert together != generate(model, collate(items), STEPS, [END], decoding, seeds=[5, 6, 7, 8])


@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.4},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.8},
    ],
)
def test_samples_have_the_distribution(model, decoding):
    """Frequencies of 3,000 first tokens against the definition; for a right sampler chi-square exceeds its mean by
    five standard deviations about once in a million."""
    rows, (question, *_) = 3000, prompts()[2]
    ids = torch.tensor([question.ids])
    with torch.no_grad():
        probabilities = expected(model(input_ids=ids).logits[0, -1].double(), **decoding)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_ids": torch.zeros_like(ids)}
    batch = {name: tensor.repeat(rows, 1) for name, tensor in batch.items()}
    settings = DecodingConfig(do_sample=True, **decoding)
    answers = generate(model, batch, 1, NEVER, settings, seeds=range(rows))
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=VOCAB)
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    degrees = int(kept.sum()) - 1
    wanted = probabilities[kept] * rows
    chi_square = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5 + 5


def expected(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, then the k best, then the smallest set that holds `top_p`, by sorting."""
    order = (logits / temperature).argsort(descending=True)[: top_k or None]
    kept = (logits[order] / temperature).softmax(-1)
    size = next(n for n in range(1, len(kept) + 1) if n == len(kept) or kept[:n].sum() >= top_p)
    found = torch.zeros_like(logits)
    found[order[:size]] = kept[:size] / kept[:size].sum()
    return found


def test_what_cannot_be_sampled_is_refused(model):
    batch = collate(prompts())
    with pytest.raises(ConfigError, match="do_sample with num_beams 2"):
        generate(model, batch, 2, [END], DecodingConfig(do_sample=True, num_beams=2), seeds=[1] * 4)
    with pytest.raises(ConfigError, match="a seed for every row"):
        generate(model, batch, 2, [END], SAMPLED)


# --- beams and constraints


def test_beams_find_the_likeliest_sequence(model):
    """As many beams as tokens and two steps are an exhaustive search."""
    batch = collate(prompts())
    decoding = DecodingConfig(num_beams=VOCAB, min_new_tokens=2)
    found = generate(model, batch, 2, [END], decoding)
    for row, item in enumerate(prompts()):
        ids, pixels, pooling, counts = item
        own = {"pixel_values": pixels, "pooling": pooling} if counts else {}
        words = [word for word in range(VOCAB) if word != END]
        with torch.no_grad():
            first = model(input_ids=torch.tensor([ids.ids]), image_ids=torch.tensor([ids.images]), **own).logits[0, -1]
            best = None
            for word in words:
                logits = model(
                    input_ids=torch.tensor([[*ids.ids, word]]), image_ids=torch.tensor([[*ids.images, 0]]), **own
                ).logits[0, -1]
                second = logits.log_softmax(-1)
                second[END] = -torch.inf  # `min_new_tokens` forbids it, after the softmax
                total = float(first.log_softmax(-1)[word] + second.max())
                best = max(best or (total, 0, 0), (total, word, int(second.argmax())))
        assert found[row] == list(best[1:])


@pytest.mark.parametrize(
    "decoding",
    [
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 3.0},
        {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"min_new_tokens": 3, "num_beams": 4},
    ],
)
def test_a_constrained_batch_answers_as_its_rows_alone(model, decoding):
    items = prompts()
    settings = DecodingConfig(**decoding)
    assert generate(model, collate(items), STEPS, [END], settings) == alone(model, items, settings)


def test_images_are_encoded_once_for_all_beams(model):
    calls = []
    hook = model.model.vision_backbone.register_forward_hook(lambda *_: calls.append(1))
    generate(model, collate(prompts()), 4, [END], DecodingConfig(num_beams=4))
    hook.remove()
    assert len(calls) == 1


def test_length_penalty_moves_the_length(model):
    """Where ending is likely, a strong penalty on length ends sooner than a strong reward."""
    batch, end = collate(prompts()), generate(model, collate(prompts()), STEPS, [END])[0][2]
    lengths = [
        sum(map(len, generate(model, batch, STEPS, [end], DecodingConfig(num_beams=4, length_penalty=penalty))))
        for penalty in (-3.0, 3.0)
    ]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("size", [1, 2])
def test_no_n_gram_comes_twice(model, size):
    free = generate(model, collate(prompts()), 40, NEVER)
    assert any(len(set(grams(tokens, size))) < len(grams(tokens, size)) for tokens in free)
    for tokens in generate(model, collate(prompts()), 40, NEVER, DecodingConfig(no_repeat_ngram_size=size)):
        assert len(tokens) == 40 and len(set(grams(tokens, size))) == len(grams(tokens, size))


def grams(tokens, size):
    return list(zip(*(tokens[start:] for start in range(size)), strict=False))


def test_repetition_penalty_is_that_of_the_formula_and_leaves_padding_and_image_ids_alone(model):
    """Keskar et al. 2019 (CTRL): logits of tokens that stand in the row already are divided, negative ones multiplied.
    Image ids stand beyond the head; the id that pads short rows is the end token, which no prompt holds."""
    items, penalty = prompts(), 1.7
    found = generate(model, collate(items), 4, [END], DecodingConfig(repetition_penalty=penalty))
    for (row, pixels, pooling, counts), tokens in zip(items, found, strict=True):
        assert IM_PATCH in row.ids or not counts
        ids, images, expected = list(row.ids), list(row.images), []
        for _ in range(4):
            own = {"pixel_values": pixels, "pooling": pooling} if counts else {}
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), image_ids=torch.tensor([images]), **own).logits[0, -1]
            for seen in {token for token in ids if token < VOCAB}:
                logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
            if (token := int(logits.argmax())) == END:
                break
            expected.append(token)
            ids, images = [*ids, token], [*images, 0]
        assert tokens == expected


def test_min_new_tokens_holds_back_the_end(model):
    ends = [tokens[0] for tokens in generate(model, collate(prompts()), 3, NEVER)]
    for tokens in generate(model, collate(prompts()), STEPS, ends, DecodingConfig(min_new_tokens=5)):
        assert len(tokens) >= 5 and not set(ends) & set(tokens)
    assert not any(generate(model, collate(prompts()), STEPS, ends))


# --- the cache of image tokens


def count_crops(model):
    """Crops that the encoder has seen, call by call."""
    seen = []
    hook = model.model.vision_backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return seen, hook


def test_each_picture_is_encoded_once_over_batches_and_beams(model):
    items = prompts()  # rows with 1, 2, 0 and 1 pictures of one crop each
    expected = [generate(model, collate(order), STEPS, [END]) for order in (items, items[::-1], items[:1])]
    cache = ImageTokenCache()
    seen, hook = count_crops(model)
    found = [generate(model, collate(order), STEPS, [END], cache=cache) for order in (items, items[::-1], items[:1])]
    beams = DecodingConfig(num_beams=3)
    with_beams = generate(model, collate(items), STEPS, [END], beams, cache=cache)
    hook.remove()
    assert found == expected
    assert with_beams == generate(model, collate(items), STEPS, [END], beams)
    assert seen == [4] and cache.encoded == 4 and cache.reused == 4 + 1 + 4


def test_several_questions_about_one_picture_in_one_batch(model):
    first = prompts()[0]
    asked = [first, (prompts(9)[0][0], *first[1:]), first]
    expected = generate(model, collate(asked), STEPS, [END])
    seen, hook = count_crops(model)
    cache = ImageTokenCache()
    assert generate(model, collate(asked), STEPS, [END], cache=cache) == expected
    hook.remove()
    assert seen == [1] and len(cache) == 1 and len({tuple(tokens) for tokens in expected}) == 2


def test_another_pixel_or_window_is_another_picture(model):
    item = prompts()[0]
    cache = ImageTokenCache()
    batch = collate([item])
    (known,) = cache.encode(model, batch)
    for name, change in (("pixel_values", (0, 0, 0, 0)), ("pooling", (0, 0))):
        other = {**batch, name: batch[name].clone()}
        other[name][change] = other[name][change] ^ 1
        (found,) = cache.encode(model, other)
        assert not torch.equal(found, known)
    assert cache.encoded == 3 and cache.reused == 0


def test_the_oldest_tokens_make_room(model):
    items = [item for seed in range(3) for item in prompts(seed)[:1]]
    one = ImageTokenCache()
    one.encode(model, collate(items[:1]))
    cache = ImageTokenCache(max_bytes=2 * one.bytes)
    for item in (items[0], items[1], items[0], items[2], items[0], items[1]):
        cache.encode(model, collate([item]))
        assert cache.bytes <= cache.max_bytes
    assert (cache.encoded, cache.reused) == (4, 2)  # 0 and 1, then 2 pushes out 1, which is encoded again
    tiny = ImageTokenCache(max_bytes=1)
    assert len(tiny.encode(model, collate(items))) == 3 and len(tiny) == 0


def test_what_is_not_encoded_picture_by_picture_is_left_to_the_model(model):
    batch = collate(prompts())
    assert ImageTokenCache().encode(model, {**batch, "crop_videos": torch.zeros(4)}) is None


def test_all_settings_are_covered_here():
    """Whoever adds a setting adds a test."""
    assert set(DecodingConfig.__dataclass_fields__) == {
        *("num_beams", "length_penalty", "do_sample", "seed", "temperature", "top_k", "top_p"),
        *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    }
