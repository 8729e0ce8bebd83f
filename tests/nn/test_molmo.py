"""The composed model: insertion, vocabulary, loss, gradients, saving."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

from molmo_model.errors import ConfigError, DataError
from molmo_model.nn.attention import IMPLEMENTATION
from molmo_model.nn.build import build_config, build_model
from molmo_model.nn.molmo_config import MolmoConfig
from tests.nn.conftest import IM_PATCH, PREFIX, VOCAB, Conversation, lay_out, pack, random_weights, tensors

KINDS = {
    "siglip": {},
    "clip": {"encoder": "clip"},
    "qwen3": {"family": "qwen3"},
    "tied": {"language": {"tie_word_embeddings": True}},
}


@pytest.fixture
def model(make_params):
    return random_weights(build_model(make_params(), seed=1))


@pytest.fixture(params=KINDS)
def any_model(request, make_params):
    return random_weights(build_model(make_params(**KINDS[request.param]), seed=1))


def without_labels(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}


@torch.no_grad()
def test_image_tokens_are_added_at_their_places(model, batch):
    body = model.model
    tokens = body.vision_backbone(batch["pixel_values"], batch["pooling"])
    expected = body.embed(batch["input_ids"])
    places = (batch["input_ids"] == IM_PATCH).nonzero().tolist()
    assert len(places) == len(tokens) == 10
    for token, (row, column) in zip(tokens, places, strict=True):
        expected[row, column] += token
    found = body.add_image_tokens(body.embed(batch["input_ids"]), batch["input_ids"], tokens)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_extra_ids_begin_at_the_vocabulary_and_cannot_be_said(model, batch):
    embed = model.model.embed(torch.tensor([[0, VOCAB - 1, VOCAB, VOCAB + 15]]))
    base, extra = model.get_input_embeddings().weight, model.model.extra_embedding.weight
    assert torch.equal(embed[0], torch.stack([base[0], base[VOCAB - 1], extra[0], extra[15]]))
    assert model(**without_labels(batch)).logits.shape == (2, 40, VOCAB)


def test_loss_is_the_weighted_sum_over_answered_tokens(model, batch):
    logits = model(**without_labels(batch)).logits
    expected, total, squares = 0.0, 0.0, 0.0
    for row in range(2):
        for place in range(40):
            if (label := int(batch["labels"][row, place])) >= 0:
                weight = float(batch["loss_weights"][row, place])
                log_partition = logits[row, place].logsumexp(-1).item()
                expected += weight * (log_partition - logits[row, place, label].item())
                squares += weight * log_partition**2
                total += weight
    output = model(**batch)
    assert output.logits.shape == (int((batch["labels"] >= 0).sum()), VOCAB)
    assert output.weight_sum.item() == pytest.approx(total, rel=1e-6)
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    assert output.loss.item() == pytest.approx(expected / total, rel=1e-5)
    with_z = model(**batch, z_loss=0.01)
    assert with_z.loss_sum.item() == pytest.approx(expected + 0.01 * squares, rel=1e-5)
    assert with_z.cross_entropy_sum.item() == pytest.approx(expected, rel=1e-5)
    unweighted = model(**{name: value for name, value in batch.items() if name != "loss_weights"})
    assert unweighted.weight_sum.item() == int((batch["labels"] >= 0).sum())


def test_micro_batches_add_up(model, batch):
    """Gradients of the summed loss over two halves equal those of the whole."""
    whole = model(**batch)
    whole.loss_sum.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    first = int((batch["input_ids"][0] == IM_PATCH).sum())
    crops = 1  # of the first row
    halves = []
    parts = ((slice(0, crops), slice(0, first)), (slice(crops, None), slice(first, None)))
    for row, (crop, window) in enumerate(parts):
        part = {name: value[row : row + 1] for name, value in batch.items() if value.shape[:2] == (2, 40)}
        own = batch["pooling"][window]
        pooling = torch.where(own < 0, -1, own - crop.start * 16)
        halves.append(model(**part, pixel_values=batch["pixel_values"][crop], pooling=pooling))
        halves[-1].loss_sum.backward()
    assert sum(half.weight_sum for half in halves).item() == pytest.approx(whole.weight_sum.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(any_model, batch, checkpointing):
    any_model.train()
    if checkpointing:
        any_model.activation_checkpointing_enable()
    any_model(**batch).loss.backward()
    still = [name for name, parameter in any_model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert still == []


def test_checkpointing_changes_nothing(any_model, batch):
    results = []
    for enabled in (False, True):
        any_model.train().zero_grad()
        if enabled:
            any_model.activation_checkpointing_enable()
        output = any_model(**batch)
        output.loss.backward()
        results.append([output.loss.detach(), *[parameter.grad.clone() for parameter in any_model.parameters()]])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


@pytest.mark.parametrize("images", ["a dummy crop", "none at all"])
def test_text_only_batch_keeps_the_whole_graph(model, images):
    """Every parameter has a gradient, zero in the vision tower, and the loss is that of the text alone."""
    rng = torch.Generator().manual_seed(3)
    batch = tensors([pack([lay_out(Conversation([], 3, [4, 2]), rng)], 12)])
    if images == "a dummy crop":
        batch["pixel_values"] = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        batch["pooling"] = torch.zeros(0, 4, dtype=torch.long)
    model.train()
    output = model(**batch)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "vision_backbone" in name:
            assert parameter.grad.abs().max() == 0
    model.eval()
    assert torch.equal(model(**tensors_only(batch)).loss, output.loss)


def tensors_only(batch):
    return {name: value for name, value in batch.items() if name not in ("pixel_values", "pooling")}


def test_nothing_answered_is_zero_not_nan(model, batch):
    output = model(**{**batch, "labels": torch.full((2, 40), -100)})
    output.loss.backward()
    assert output.loss.item() == output.loss_sum.item() == output.weight_sum.item() == 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_empty_pack_is_finite(model):
    """A rank without packs gets padding only."""
    rng = torch.Generator().manual_seed(3)
    batch = tensors([pack([], 8), pack([lay_out(Conversation([], 2, [3]), rng)], 8)])
    output = model.train()(**batch)
    assert output.loss.isfinite() and output.last_hidden_state.isfinite().all()


@torch.no_grad()
def test_images_see_each_other_only_where_configured(make_params):
    """A later token of an image changes what an earlier one becomes; never across images."""
    rng = torch.Generator().manual_seed(3)
    row = lay_out(Conversation([3, 2], 1, [3]), rng)
    batch = without_labels(tensors([row]))
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=rng)
    pooling = torch.arange(20).view(5, 4)
    for bidirectional in (True, False):
        model = random_weights(build_model(make_params(language={"bidirectional_images": bidirectional}), seed=1))
        states = []
        for last_window in (pooling[2], torch.tensor([12, 13, 14, 15])):
            windows = torch.cat([pooling[:2], last_window[None], pooling[3:]])
            states.append(model(**batch, pixel_values=pixels, pooling=windows).last_hidden_state[0])
        changed = ((states[0] - states[1]).abs().max(-1).values > 1e-6).tolist()
        first_image = changed[:6]  # start, three patches, column, end; the third patch differs
        assert first_image == ([True] * 6 if bidirectional else [False] * 3 + [True] * 3)
        assert all(changed[6:])


def test_own_attention_is_required(model, batch):
    model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(ConfigError, match="sdpa"):
        model(**batch)


def test_wrong_batches_are_refused(model, batch):
    with pytest.raises(DataError, match="10 <im_patch> tokens but 9 image tokens"):
        model(**{**batch, "pooling": batch["pooling"][:-1]})
    with pytest.raises(DataError, match="position_ids"):
        model(**{name: value for name, value in batch.items() if name != "position_ids"})


def test_training_makes_no_cache(model, batch):
    """A cache would turn the packed mask into a plain causal one."""
    model.train()
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is None


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    rng = torch.Generator().manual_seed(3)
    row = without_labels(tensors([lay_out(Conversation([], 6, []), rng)]))["input_ids"]
    alone = model(input_ids=row).logits
    padded = F.pad(row, (3, 0))
    mask = (torch.arange(9) >= 3).long()[None]
    for cache in (None, DynamicCache(config=model.config.text_config)):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        caching = {"past_key_values": cache, "use_cache": cache is not None}
        output = model(padded, attention_mask=mask, position_ids=positions, **caching)
        torch.testing.assert_close(output.logits[:, 3:], alone, atol=2e-6, rtol=0)


@torch.no_grad()
def test_saved_and_loaded_is_bitwise_equal(any_model, batch, tmp_path):
    any_model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(any_model)
    assert loaded.model.language_model.config._attn_implementation == IMPLEMENTATION
    assert torch.equal(loaded(**batch).logits, any_model(**batch).logits)
    tied = any_model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_config_round_trip_and_checks(make_params):
    config = build_config(make_params())
    assert config.vision_feature_layers == [3, 1] and config.vision_config.num_hidden_layers == 4
    assert MolmoConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.image_token_id == IM_PATCH and PREFIX > VOCAB
    parts = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    for wrong, message in (
        ({"image_token_id": VOCAB - 1}, "no extra id; those are 60 to 75"),
        ({"image_token_id": VOCAB + 16}, "no extra id"),
        ({"pooling_num_heads": 5}, "5 does not divide the encoder's width 32"),
        ({"vision_encoder": "clip"}, "clip is a clip_vision_model"),
        ({"vision_encoder": "clop"}, "did you mean 'clip'"),
        ({"vision_feature_layers": [4]}, "layer 4 of an encoder with 4"),
        ({"pooling": "stak"}, "did you mean 'stack'"),
    ):
        with pytest.raises(ConfigError, match=message):
            MolmoConfig(**{**parts, **wrong})
    assert isinstance(AutoConfig.for_model("molmo_composed"), MolmoConfig)
