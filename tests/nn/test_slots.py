"""Slots against one question at a time: whatever their number, the order of the questions and what stands beside them.

The oracle is `nn.generation.greedy` row by row, which has its own oracle in argmax without a cache. Differences are
allowed where the two best tokens are nearly equal, and listed.
"""

import pytest
import torch

from molmo_model.errors import ConfigError, DataError
from molmo_model.nn.build import build_model
from molmo_model.nn.generation import Said, differences, greedy
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.slots import Prompts, SlotDecoder, lay_out
from molmo_model.nn.static_cache import StaticCache, cache_bytes
from tests.nn.conftest import (
    VOCAB,
    Conversation,
    random_weights,
    sliding_model,
)
from tests.nn.conftest import (
    lay_out as lay_out_tokens,
)
from tests.nn.families import FAMILIES
from tests.nn.test_generation import collate, prompts

STEPS, CONTEXT = 8, 96
NEVER = VOCAB + 100


def asked(seed):
    """Rows with 1, 2, 0 and 1 pictures, then more questions of several lengths about the first two rows' pictures."""
    items = prompts(seed)
    rng = torch.Generator().manual_seed(seed + 100)
    more = []
    for first, text in ((0, 1), (0, 7), (1, 4), (1, 4), (0, 3)):
        _, pixels, pooling, counts = items[first]
        more.append((lay_out_tokens(Conversation(counts, text, []), rng), pixels, pooling, counts))
    return [*items[:1], *more[:2], *items[1:2], *more[2:4], *items[2:], more[4]]


@pytest.fixture(autouse=True)
def small_trees(monkeypatch):
    """Tiny prompts share few tokens."""
    monkeypatch.setattr("molmo_model.nn.slots.LEAST_SHARED", 4)


def alone(model, items, end, limits):
    """The oracle, a row at a time."""
    return [greedy(model, collate([item]), limit, [end])[0] for item, limit in zip(items, limits, strict=True)]


def answered(model, items, end, limits, *, slots, order=None, at_once=1, flip=False, **settings):
    """What the slots say, in the order of the items."""
    order = list(range(len(items))) if order is None else order
    decoder = SlotDecoder(model, slots, settings.pop("context", CONTEXT), [end], margins=True, **settings)
    batches = []
    for start in range(0, len(order), at_once):
        numbers = order[start : start + at_once]
        batch = collate([items[number] for number in numbers])
        if flip:
            batch |= padded_on_the_right(batch)
        batches.append(Prompts(numbers, batch, [limits[number] for number in numbers]))
    source = iter(batches)
    found = list(decoder.run(lambda wait: next(source, None)))
    assert sorted(number for number, _ in found) == sorted(order)  # each once
    assert not any(decoder._asked) and not decoder._pending
    said = dict(found)
    return [said[number] for number in range(len(items))]


def padded_on_the_right(batch):
    counts = batch["attention_mask"].sum(1).tolist()
    names = ("input_ids", "attention_mask", "image_ids")
    shifted = {name: torch.zeros_like(batch[name]) for name in names}
    for row, count in enumerate(counts):
        for name in names:
            shifted[name][row, :count] = batch[name][row, -count:]
    return shifted


def require_equal(expected, found):
    """Equal tokens but for near-ties, which are shown; equal margins as far as floats go."""
    apart = differences(expected, found)
    if apart:
        print(f"near-ties: {apart}")
    assert all(difference.near_tie for difference in apart), apart
    parted = {difference.row for difference in apart}
    for row, (one, other) in enumerate(zip(expected, found, strict=True)):
        if row not in parted:
            assert one.margins == pytest.approx(other.margins, abs=1e-4)


@pytest.fixture(scope="module")
def model(make_params):
    return random_weights(build_model(make_params(), seed=1)).eval()


@pytest.fixture(scope="module")
def questions(model):
    """Twenty questions with answers from nothing at all to `STEPS` tokens, and what they are one by one."""
    items = [*asked(4), *asked(5)]
    limits = [(STEPS, 1, 5, STEPS, 2, 9, STEPS, STEPS, 3)[number % 9] for number in range(len(items))]
    free = alone(model, items, NEVER, [STEPS] * len(items))
    end = free[0].tokens[0]  # one answer is over at once
    expected = alone(model, items, end, limits)
    lengths = {len(said.tokens) for said in expected}
    assert 0 in lengths and len(lengths) > 4
    return items, limits, end, expected


@pytest.mark.parametrize(("slots", "at_once"), [(1, 1), (2, 1), (3, 2), (8, 8), (32, 5)])
def test_slots_say_what_each_question_gets_alone(model, questions, slots, at_once):
    items, limits, end, expected = questions
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(slots)).tolist()
    cache = ImageTokenCache() if slots > 2 else None  # what neighbours share is read once, or again for each
    require_equal(expected, answered(model, items, end, limits, slots=slots, at_once=at_once, order=order, cache=cache))
    assert cache is None or (cache.encoded, cache.reused) == (8, 14)


def test_the_side_of_the_padding_and_late_looks_change_nothing(model, questions):
    items, limits, end, expected = questions
    require_equal(expected, answered(model, items, end, limits, slots=4, at_once=3, flip=True))
    require_equal(expected, answered(model, items, end, limits, slots=4, at_once=2, steps=5))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(make_params, family):
    """OLMo 3 with a window of 6: prompts and answers are longer."""
    model = random_weights(build_model(make_params(family=family, language=FAMILIES[family]), seed=1)).eval()
    items = asked(4)
    limits = [STEPS] * len(items)
    expected = alone(model, items, NEVER, limits)
    cache = ImageTokenCache()
    require_equal(expected, answered(model, items, NEVER, limits, slots=3, at_once=3, cache=cache))


@pytest.mark.parametrize("kind", ["sliding", "causal", "one block", "head_dim"])
def test_other_rules_of_attention(make_params, kind):
    changes = {"causal": {"bidirectional_images": False}, "head_dim": {"head_dim": 12}}
    params = make_params(family="qwen3" if kind == "head_dim" else "qwen2", language=changes.get(kind))
    model = sliding_model(params, window=4) if kind == "sliding" else build_model(params, seed=1)
    model.config.one_image_block = kind == "one block"
    random_weights(model).eval()
    items = asked(6)
    limits = [STEPS] * len(items)
    expected = alone(model, items, NEVER, limits)
    cache = ImageTokenCache()
    require_equal(expected, answered(model, items, NEVER, limits, slots=5, at_once=5, cache=cache))


def test_the_comparison_has_power(model, questions, monkeypatch):
    """A cache that is read one place too far, or a neighbour's branch that is seen, is found."""
    items, limits, end, expected = questions
    from molmo_model.nn import slots, static_cache

    with monkeypatch.context() as patch:
        seen = static_cache.visible_places
        patch.setattr(static_cache, "visible_places", lambda at, extent, window: seen(at + 1, extent, window))
        with pytest.raises(AssertionError):
            require_equal(expected, answered(model, items, end, limits, slots=4))
    with monkeypatch.context() as patch:
        patch.setattr(slots, "_whole_images", lambda pictures, shared, one_block: shared)
        patch.setattr(slots.Layout, "shares", False)
        patch.setattr(slots, "LEAST_SHARED", 1)
        with pytest.raises(AssertionError):
            require_equal(expected, answered(model, items, end, limits, slots=8, at_once=8, cache=ImageTokenCache()))


def test_what_neighbours_share_is_read_once():
    """Four questions about one picture: its tokens stand in the row once, and their texts."""
    items = [asked(4)[number] for number in (0, 1, 2, 8)]
    batch = collate(items)
    counts = batch["attention_mask"].sum(1).tolist()
    picture = torch.zeros(3, 8)
    layout = lay_out(batch, counts, [5, 0, 3, 1], [[picture]] * 4)
    prefix = 6  # start, 3 tokens, column, end
    assert len(layout.input_ids) == prefix + sum(count - prefix for count in counts) and layout.lengths == (31 - 12,)
    assert layout.written.shape[1] == sum(counts) and len(layout.images) == 1
    for row, slot in enumerate([5, 0, 3, 1]):
        sources = layout.written[0][layout.written[1] == slot]
        own = batch["attention_mask"][row].bool()
        assert torch.equal(layout.input_ids[sources], batch["input_ids"][row][own])
        assert torch.equal(layout.places[sources], torch.arange(counts[row]))
        assert layout.last[row] == sources[-1]
    other = lay_out(batch, counts, [5, 0, 3, 1], [[picture], [picture], [picture.clone()], [picture]])
    assert len(other.lengths) == 3  # another picture is another tree, whatever its tokens


def test_slots_are_reused_by_later_runs(model, questions):
    """The decoder of one task goes on with the next; what lies in its cache is not seen."""
    items, limits, end, expected = questions
    decoder = SlotDecoder(model, 3, CONTEXT, [end], margins=True)
    left = iter([Prompts([100 + number], collate([items[number]]), [STEPS]) for number in range(4)])
    assert next(decoder.run(lambda wait: next(left, None)))[0] >= 100  # and nobody wants the others
    for _ in range(2):
        source = iter([Prompts([number], collate([items[number]]), [limits[number]]) for number in range(len(items))])
        said = dict(decoder.run(lambda wait: next(source, None)))  # noqa: B023
        require_equal(expected, [said[number] for number in range(len(items))])


def test_an_answer_comes_while_others_are_still_written(model, questions):
    """A free slot is refilled at once: the device does not wait for the longest answer of a batch."""
    items = questions[0]
    decoder = SlotDecoder(model, 2, CONTEXT, [NEVER])
    limits = [30, 2, 2, 2, 2]
    source = iter([Prompts([number], collate([items[number]]), [limits[number]]) for number in range(5)])
    assert [number for number, _ in decoder.run(lambda wait: next(source, None))] == [1, 2, 3, 4, 0]


def test_prompts_that_are_not_ready_stop_nobody(model, questions):
    """`more` without waiting may have nothing yet; it waits only when no slot is busy."""
    items, limits, end, expected = questions
    left, waits = list(range(6)), []

    def more(wait):
        waits.append(wait)
        if not left or not (wait or len(waits) % 3 == 0):
            return None
        number = left.pop(0)
        return Prompts([number], collate([items[number]]), [limits[number]])

    said = dict(SlotDecoder(model, 2, CONTEXT, [end], margins=True).run(more))
    require_equal(expected[:6], [said[number] for number in range(6)])
    assert waits[0] and not all(waits)


def test_what_does_not_fit_is_refused(model, questions):
    items, *_ = questions
    batch = collate(items[:1])
    length = int(batch["attention_mask"].sum())

    def run(context, numbers, batch, limit, slots=1):
        source = iter([Prompts(numbers, batch, [limit] * len(numbers))])
        return list(SlotDecoder(model, slots, context, [NEVER]).run(lambda wait: next(source, None)))

    ((number, said),) = run(length + 4, [7], batch, 5)  # the last token of an answer needs no place
    assert number == 7 and said == Said(greedy(model, batch, 5, [NEVER])[0].tokens)
    with pytest.raises(
        ConfigError, match=f"question 7: a prompt of {length} tokens with an answer of up to 5 .* slot of"
    ):
        run(length + 3, [7], batch, 5)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        run(length + 3, [7], batch, 0)
    with pytest.raises(ConfigError, match="2 prompts at once for 1 slots"):
        run(CONTEXT, [0, 1], collate(items[:2]), 5)
    with pytest.raises(DataError, match="positions with gaps"):
        run(CONTEXT, [7], {**batch, "position_ids": torch.arange(length)[None] * 2}, 5)


def test_the_consumer_keeps_its_gradients(model, questions):
    """Whoever takes answers one by one is not left in inference mode between them."""
    items, limits, end, _ = questions
    source = iter([Prompts([number], collate([items[number]]), [limits[number]]) for number in range(3)])
    for _ in SlotDecoder(model, 1, CONTEXT, [end]).run(lambda wait: next(source, None)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert model.model.language_model.config._attn_implementation == "molmo"


def test_half_precision_keeps_half_the_cache(model, questions):
    items, _, end, expected = questions
    limits = [STEPS] * len(items)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = alone(model, items, end, limits)
    found = answered(model, items, end, limits, slots=4, autocast=torch.bfloat16)
    assert len(differences(low, found)) <= 4  # bf16 rounds other shapes otherwise
    assert any(one.margins != other.margins for one, other in zip(expected, found, strict=True))
    config = model.config.text_config
    cache = StaticCache(config, 4, CONTEXT, torch.bfloat16, torch.device("cpu"))
    assert cache_bytes(config, 4, CONTEXT, torch.bfloat16) == sum(one.nbytes for one in [*cache.keys, *cache.values])


@pytest.mark.slow
def test_compiled_steps_are_one_graph_for_all_layers(make_params):
    """What a GPU captures, compiled here for the CPU: one graph for the layers, one for the head, no break."""
    from torch._dynamo.utils import counters

    model = random_weights(build_model(make_params(language={"num_layers": 4}), seed=1)).eval()
    items = asked(4)
    limits = [STEPS] * len(items)
    expected = alone(model, items, NEVER, limits)
    torch._dynamo.reset()
    counters.clear()
    require_equal(expected, answered(model, items, NEVER, limits, slots=4, compiled=True))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
