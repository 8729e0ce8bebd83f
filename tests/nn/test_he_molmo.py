"""HeMolmo as a whole: against a plain Molmo, brute force, one example at a time, and finite differences."""

from dataclasses import replace

import pytest
import torch

from molmo_model.errors import ConfigError, DataError
from molmo_model.nn.attention import masks_for
from molmo_model.nn.build import build_config, build_model, component_of
from molmo_model.nn.generation import generate
from molmo_model.nn.he_molmo import Reading, generation_inputs, run_layers, select
from molmo_model.preprocessing.collator import collate, collate_prompts
from tests.nn.he_molmo import QUIET, build, params, preprocessor, same_weights
from tests.preprocessing.examples import asked, example

ALL = 1000
SIZES = ((90, 90), (70, 150), (150, 70), (64, 64), (110, 130))


def examples(count=4, conversations=1):
    """Examples with one image each, of different shapes, and different questions."""
    return [
        replace(
            example([asked(f"what {n} {k}?", f"it is {n * k + 7}") for k in range(conversations)], (SIZES[n],)),
            id=f"example-{n}",
        )
        for n in range(count)
    ]


def without_labels(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "olmo2", "olmoe"])
@pytest.mark.parametrize("question_first", [False, True])
def test_with_all_tokens_it_is_a_plain_molmo(family, question_first):
    """All candidates selected and no gate: the loss of every answered token is a plain model's, whose tokens stand in
    raster order between column tokens. Largest difference seen: 2e-6."""
    model, encode = build({"tokens": ALL, "question_first": question_first}, family=family)
    plain, encode_plain = build(None, family=family)
    same_weights(plain, model)
    model.eval(), plain.eval()
    items = examples()
    if question_first:  # the plain one has no such order of its own; build it from the text
        one = collate([[encode.encode(item)] for item in items], None, encode.config)
        rows = [reorder(encode.encode(item), encode_plain.encode(item)) for item in items]
        two = collate([[row] for row in rows], None, encode_plain.config)
    else:
        one = collate([[encode.encode(item) for item in items]], None, encode.config)
        two = collate([[encode_plain.encode(item) for item in items]], None, encode_plain.config)
    found, expected = model(**one), plain(**two)
    assert len(found.logits) >= 16
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=0)


def reorder(encoded, plain):
    """A plain encoding with the question before the image, from the ids of a HeMolmo's."""
    first = int((encoded.image_ids > 0).argmax())
    last = len(encoded) - int((encoded.image_ids[::-1] > 0).argmax())
    view = plain.input_ids[plain.image_ids > 0]
    ids = [*encoded.input_ids[:first], *view, *encoded.input_ids[last:]]
    import numpy as np

    labels = np.concatenate([np.full(first + len(view) - 1, -100), encoded.labels[last - 1 :]])
    images = np.repeat([0, 1, 0], [first, len(view), len(encoded) - last])
    return replace(
        plain,
        input_ids=np.array(ids),
        labels=labels,
        loss_weights=(labels != -100).astype(np.float32),
        position_ids=np.arange(len(ids)),
        segment_ids=np.where(np.arange(len(ids)) < first + len(view), 10_000, 0),
        image_ids=images,
    )


@torch.no_grad()
def test_selected_tokens_are_those_of_a_plain_model_with_the_others_removed():
    """A plain language model, given by hand the features and positions that the selection names, says the same."""
    model, encode = build({"tokens": 6})
    model.eval()
    batch = collate([[encode.encode(item)] for item in examples(1)], None, encode.config)
    found = model(**without_labels(batch))
    body = model.model
    tokens = body.vision_backbone(batch["pixel_values"], batch["pooling"])
    embeddings = body.embed(batch["input_ids"])
    reading = Reading(batch["example_ids"], batch["position_ids"], batch["segment_ids"], batch["image_ids"])
    where = {name: value for name, value in batch.items() if name.startswith("selector_")}
    chosen = select(body, embeddings, tokens, reading, where).choice.chosen[0].tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == 6
    low = 4  # of a 2 x 2 view
    patch = model.config.image_token_id
    places = (batch["input_ids"][0] == patch).nonzero().flatten().tolist()
    assert len(places) == low + 6
    x, positions = embeddings.clone(), batch["position_ids"].clone()
    columns = max(int(c) for c in range(2, 9) if (len(tokens) - low) % c == 0 and c * c <= len(tokens) - low)
    for number, place in enumerate(places):
        if number < low:
            x[0, place] += tokens[number]
        else:
            candidate = chosen[number - low]
            x[0, place] += tokens[low + candidate]
            row, column = divmod(candidate, columns)
            positions[0, place] = 1 + (2 * 3 + 2) + 1 + row * (columns + 1) + column
    masks = masks_for(
        body.config.text_config, example_ids=batch["example_ids"], segment_ids=batch["segment_ids"],
        image_ids=batch["image_ids"], position_ids=positions,
    )  # fmt: skip
    states = body.language_model(inputs_embeds=x, attention_mask=masks, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found.last_hidden_state, states.last_hidden_state, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "llama", "olmo", "olmo2", "olmo3", "qwen3", "olmoe"])
def test_first_pass_is_the_language_model(family):
    """Running layers one by one gives the hidden states of the language model's own forward, in every family."""
    model, _ = build({"tokens": 4}, family=family)
    text = model.model.language_model.eval()
    x, positions = torch.randn(2, 9, 32), torch.arange(9).expand(2, 9)
    masks = masks_for(model.config.text_config, example_ids=torch.zeros(2, 9, dtype=torch.long), position_ids=positions)
    own = text(
        inputs_embeds=x, attention_mask=masks, position_ids=positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    states = run_layers(text, x, masks, positions, 3, range(1, 2))
    for mine, theirs in zip(states[:2], own[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    torch.testing.assert_close(text.norm(states[2]), own[3], atol=0, rtol=0)
    assert [state.requires_grad for state in states] == [False, True, False]


@pytest.mark.parametrize(
    "selector",
    [
        {"tokens": 5},
        {"tokens": 5, "query": True, "all_layers": True, "low_res_layers": 2, "gradient_layers": [0, 2]},
        {"tokens": 9, "score": "prior_only"},
        {"tokens": 5, "hidden_size": 0, "norm": False, "prior": False, "gradient_embedding": True,
         "gradient_layers": [0, 3]},
    ],
    ids=["default", "query", "prior", "linear"],
)  # fmt: skip
def test_pack_equals_one_by_one(selector):
    """Packed message trees with images of several shapes and without any: losses and gradients are the sum of those of
    every example alone. Worst seen: losses 2e-6, gradients 3e-6."""
    model, encode = build({**selector, **QUIET})
    model.train()
    items = [*examples(3, conversations=2), replace(example([asked("two?", "yes")], ((90, 64), (64, 120))), id="two")]
    text = replace(example([asked("no picture", "none")], ()), id="text")
    encoded = [encode.encode(item) for item in [items[0], text, *items[1:]]]
    whole = model(**collate([encoded[:3], encoded[3:]], None, encode.config))
    whole.loss_sum.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    single = [model(**collate([[one]], None, encode.config)) for one in encoded]
    sum(one.loss_sum for one in single).backward()
    assert whole.loss_sum.item() == pytest.approx(sum(one.loss_sum.item() for one in single), rel=1e-5)
    assert whole.selection_loss.item() == pytest.approx(sum(one.selection_loss.item() for one in single), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=1e-4, msg=name)


def test_padding_and_fixed_lengths_change_nothing():
    model, encode = build({"tokens": 5, **QUIET})
    model.train()
    packs = [[encode.encode(item)] for item in examples(2)]
    free, fixed = (model(**collate(packs, length, encode.config)) for length in (None, 200))
    assert fixed.loss_sum.item() == pytest.approx(free.loss_sum.item(), rel=1e-6)


def test_a_tree_equals_its_separate_conversations():
    model, encode = build({"tokens": 5})
    model.eval()
    (item,) = examples(1, conversations=3)
    tree = model(**collate([[encode.encode(item)]], None, encode.config))
    alone = [model(**collate([[encode.encode(item, [k])]], None, encode.config)) for k in range(3)]
    # worst seen 3e-6
    torch.testing.assert_close(tree.logits, torch.cat([one.logits for one in alone]), atol=2e-5, rtol=0)


def test_scorer_learns_through_the_gate():
    """The gradient that the answer's loss sends to the scorer is that of the loss as a function of its weights, with
    the selection held. Against central differences; the loss itself is a float32. Worst seen: 0.4 %."""
    model, encode = build({"tokens": 4, **QUIET, "importance_weight": 0.0})
    model.double().train()
    batch = collate([[encode.encode(item)] for item in examples(2)], None, encode.config)
    model(**batch).loss.backward()
    selector = model.model.token_selector
    for name, parameter in selector.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        place = int(parameter.grad.abs().argmax())
        values, losses = parameter.data.view(-1), []
        before = values[place].item()
        for step in (1e-2, -1e-2):
            values[place] = before + step
            with torch.no_grad():
                losses.append(model(**batch).loss.item())
        values[place] = before
        expected = (losses[0] - losses[1]) / 2e-2
        assert parameter.grad.view(-1)[place].item() == pytest.approx(expected, rel=1e-2), name


@pytest.mark.parametrize(
    ("selector", "reached"),
    [
        ({}, set()),
        ({"gradient_layers": [1, 3]}, {1, 2}),
        ({"gradient_layers": [0, 1], "all_layers": True}, {0}),
    ],
)
def test_first_pass_sends_gradients_into_the_named_layers_alone(selector, reached):
    model, encode = build({"tokens": 4, **selector})
    model.train()
    batch = collate([[encode.encode(item)] for item in examples(1)], None, encode.config)
    body = model.model
    tokens = body.vision_backbone(batch["pixel_values"], batch["pooling"])
    reading = Reading(batch["example_ids"], batch["position_ids"], batch["segment_ids"], batch["image_ids"])
    where = {name: value for name, value in batch.items() if name.startswith("selector_")}
    select(body, body.embed(batch["input_ids"]), tokens, reading, where).choice.gate.sum().backward()
    with_gradient = {
        int(name.split("layers.")[1].split(".")[0])
        for name, parameter in body.language_model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert with_gradient == reached
    assert body.extra_embedding.weight.grad is None
    assert all(parameter.grad is None for parameter in body.vision_backbone.parameters())


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing():
    model, encode = build({"tokens": 5, "query": True, "gradient_layers": [1, 3], **QUIET})
    model.train()
    batch = collate([[encode.encode(item) for item in examples(2)]], None, encode.config)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        if enabled:
            model.activation_checkpointing_enable()
        output = model(**batch)
        output.loss.backward()
        results.append([output.loss.detach(), *[parameter.grad.clone() for parameter in model.parameters()]])
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))
    names = [name for name, _ in model.named_parameters() if "token_selector" in name]
    assert names and {component_of(name) for name in names} == {"connector"}


def test_text_only_batch_keeps_the_whole_graph():
    model, encode = build({"tokens": 5, "query": True})
    text = replace(example([asked("no picture", "none")], ()), id="text")
    batch = collate([[encode.encode(text)]], None, encode.config)
    plain, encode_plain = build(None)
    same_weights(plain, model)
    output = model.train()(**batch)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.abs().max() == 0 for parameter in model.model.token_selector.parameters())
    expected = plain(**collate([[encode_plain.encode(text)]], None, encode_plain.config))
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert model.eval()(**batch).loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "selector",
    [
        {"tokens": 5},
        {"tokens": 5, "gate_at_test": True},
        {"tokens": 5, "question_first": True, "indicate_tokens": True},
        {"tokens": 5, "score": "random"},
        {"tokens": ALL},
    ],
    ids=["default", "gate", "question first", "random", "all"],
)
def test_generation_is_the_definition_in_batches_and_alone(selector):
    """Left-padded rows, cached steps, and beams of one: the greedy answer by running everything anew for each token."""
    model, encode = build(selector)
    model.eval()
    items = [*examples(3), replace(example([asked("no picture", "none")], ()), id="text")]
    encoded = [encode.encode_prompt(item) for item in items]
    expected = [argmax_without_cache(model, encode, one, 8) for one in encoded]
    assert len({tuple(tokens) for tokens in expected}) > 1
    batch = collate_prompts(encoded, encode.config, encode.pad_id)
    assert generate(model, batch, 8, [511]) == expected
    single = [generate(model, collate_prompts([one], encode.config, encode.pad_id), 8, [511])[0] for one in encoded]
    assert single == expected


@torch.no_grad()
def argmax_without_cache(model, encode, encoded, steps):
    """Every step a new forward over the prompt and what was said, by the batch for training."""
    import numpy as np

    tokens = []
    for _ in range(steps):
        count = len(tokens)
        longer = replace(
            encoded,
            input_ids=np.concatenate([encoded.input_ids, tokens]).astype(np.int64),
            labels=np.full(len(encoded) + count, -100),
            loss_weights=np.zeros(len(encoded) + count, dtype=np.float32),
            position_ids=np.concatenate([encoded.position_ids, encoded.position_ids[-1] + 1 + np.arange(count)]),
            segment_ids=np.concatenate([encoded.segment_ids, np.zeros(count, dtype=np.int64)]),
            image_ids=np.concatenate([encoded.image_ids, np.zeros(count, dtype=np.int64)]),
        )
        logits = model(**without_labels(collate([[longer]], None, encode.config))).logits[0, -1]
        if (token := int(logits.argmax())) == 511:
            break
        tokens.append(token)
    return tokens


def test_beams_read_their_own_images():
    from molmo_model.config import DecodingConfig

    model, encode = build({"tokens": 5, "gate_at_test": True})
    encoded = [encode.encode_prompt(item) for item in examples(3)]
    beams = DecodingConfig(num_beams=3)
    batch = generate(model, collate_prompts(encoded, encode.config), 6, [511], beams)
    alone = [generate(model, collate_prompts([one], encode.config), 6, [511], beams)[0] for one in encoded]
    assert batch == alone


@torch.no_grad()
def test_the_question_decides_only_where_it_comes_first():
    chosen = {}
    for first in (False, True):
        model, encode = build({"tokens": 5, "question_first": first, "prior": False})
        model.eval()
        prompts = [
            encode.encode_prompt(example([asked(question, "x")], ((150, 150),))) for question in ("where?", "a b c d e")
        ]
        found = [generation_inputs(model, collate_prompts([one], encode.config))[1] for one in prompts]
        chosen[first] = [selection.choice.chosen.tolist() for selection in found]
    assert chosen[False][0] == chosen[False][1] and chosen[True][0] != chosen[True][1]


def test_saved_and_loaded_is_equal(tmp_path):
    from transformers import AutoModelForImageTextToText

    from molmo_model.preprocessing.preprocessor import Preprocessor

    model, encode = build({"tokens": 5, "query": True, "indicate_tokens": True})
    model.eval().save_pretrained(tmp_path)
    encode.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), Preprocessor.from_pretrained(tmp_path)
    assert again.config == encode.config and loaded.config.selector == model.config.selector
    batch = collate([[again.encode(item)] for item in examples(2)], None, again.config)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("selector", "language", "message"),
    [
        ({"gradient_layers": [0, 2]}, {}, "the last one among them"),
        ({"gradient_layers": [2]}, {}, r"write \[first, end\)"),
        ({"gradient_layers": [1, 5]}, {}, "within the 3 layers"),
        ({"low_res_layers": 4}, {}, "language model has 3"),
        ({"gradient_embedding": True}, {}, "no gradient gets there"),
        ({"score": "prior_only", "prior": False}, {}, "nothing would score"),
        ({}, {"family": "olmo3", "sliding_window": 8}, "window of 8"),
    ],
)
def test_contradictions_are_refused(selector, language, message):
    with pytest.raises(ConfigError, match=message):
        build_config(params({"tokens": 4, **selector}, **language))


def test_preprocessing_without_two_views_is_refused():
    made = params({"tokens": 4})
    made.preprocessing.crop_mode = type(made.preprocessing.crop_mode).resize
    with pytest.raises(ConfigError, match="crop_mode resize has no such pair"):
        preprocessor(made, 520)


def test_batches_of_another_preprocessor_are_refused():
    model, _ = build({"tokens": 4})
    _, plain = build(None)
    prompt = collate_prompts([plain.encode_prompt(examples(1)[0])], plain.config)
    with pytest.raises(DataError, match="selector_tokens"):
        generate(model, prompt, 2, [511])
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask", "pixel_values", "pooling")}
    with pytest.raises(DataError, match=r"image tokens but no selector_\* arrays"):
        model.eval()(**inputs)
    text = replace(example([asked("no picture", "none")], ()), id="text")
    empty = collate_prompts([plain.encode_prompt(text)], plain.config)
    assert len(empty["pooling"]) == 0
    model(**{name: empty[name] for name in inputs})  # nothing to select from
    several = examples(1, conversations=2)[0]
    _, first = build({"tokens": 4, "question_first": True})
    with pytest.raises(DataError, match="max_conversations: 1"):
        first.encode(several)


def test_first_weights_depend_on_the_seed_alone():
    made = params({"tokens": 4})
    one, two = build_model(made, 1), build_model(made, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@torch.no_grad()
def test_block_masks_give_the_same(monkeypatch):
    """FlexAttention, as on a GPU, in both passes and with the gate. Worst seen: 2e-6."""
    from functools import partial

    from molmo_model.nn import he_molmo, molmo

    model, encode = build({"tokens": 5, "gate_at_test": True})
    model.eval()
    batch = without_labels(
        collate([[encode.encode(item) for item in examples(2, conversations=2)]], None, encode.config)
    )
    dense = model(**batch).logits
    for module in (he_molmo, molmo):
        monkeypatch.setattr(module, "masks_for", partial(masks_for, kind="block"))
    torch.testing.assert_close(model(**batch).logits, dense, atol=2e-5, rtol=0)


def test_too_few_positions_are_refused():
    from pipelines.assemble import _check_positions

    _, encode = build({"tokens": 1})
    with pytest.raises(ConfigError, match=r"raise language\.max_position_embeddings"):
        _check_positions("m", encode.config.tiling, 28)
    _check_positions("m", encode.config.tiling, 29)
