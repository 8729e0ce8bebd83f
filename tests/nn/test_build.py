"""From params to models: determinism, pretrained parts, scales, and what is refused."""

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.nn.build import build_config, build_model, component_of, parameter_counts, restore_buffers
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from tests.nn.conftest import VOCAB, random_weights

VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
TEXT = {
    "vocab_size": VOCAB + 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FREE = dict.fromkeys(("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"))
"""Sizes left to the pretrained part."""
FREE_TEXT = dict.fromkeys(("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_key_value_heads"))


def test_the_seed_decides_the_weights(make_params):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, second, third = (build_model(make_params(), seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


def test_a_model_larger_than_the_memory_is_refused(make_params):
    """From its shapes, in no time: an allocation may succeed and end the process when it is first written."""
    with pytest.raises(ConfigError, match=r"weights take [\d,]+ GB in fp32, this machine has [\d,]+ GB"):
        build_model(make_params(connector={"pooling_size": [100_000, 100_000]}), 0)


@pytest.mark.parametrize("encoder", ["siglip", "clip"])
@torch.no_grad()
def test_random_models_start_at_a_scale_that_learns(encoder, make_params):
    """Features near one and different per patch, also for noise; image tokens not buried by word embeddings and not
    burying them; a loss near that of guessing."""
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 96, "intermediate_size": 256, "num_layers": 3}
    text = {"hidden_size": 96, "intermediate_size": 256, "num_layers": 3, "num_key_value_heads": 4}
    model = build_model(make_params(encoder=encoder, vision={**sizes, "feature_layers": [-1, -2]}, language=text), 1)
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone = model.model.vision_backbone
    features = backbone.encoder(backbone.normalize(pixels))
    assert 0.3 < features.std() < 4 and features.std(1).mean() > 0.1
    tokens = backbone(pixels, torch.arange(64).view(16, 4))
    words = model.get_input_embeddings().weight.std()
    assert words < tokens.std() < 40 * words
    ids = torch.randint(0, VOCAB, (2, 50), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids.roll(-1)).loss
    assert loss < torch.tensor(float(VOCAB)).log() + 1.5


@pytest.mark.parametrize("which", ["vision", "whole"])
@pytest.mark.parametrize("encoder", ["siglip", "clip"])
def test_pretrained_encoder(encoder, which, make_params, tmp_path):
    """Folders of the vision model alone and of the whole two-tower model, cut at the last used block."""
    configs = {"siglip": (SiglipVisionConfig, SiglipConfig), "clip": (CLIPVisionConfig, CLIPConfig)}[encoder]
    models = {"siglip": (SiglipVisionModel, SiglipModel), "clip": (CLIPVisionModel, CLIPModel)}[encoder]
    vision = configs[0](**VISION)
    if which == "vision":
        source = models[0](vision)
        tower = source
    else:
        text = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        source = models[1](configs[1](vision_config=vision.to_dict(), text_config={**text, "num_hidden_layers": 1}))
        tower = source.vision_model
    random_weights(source).eval().save_pretrained(tmp_path)
    model = build_model(
        make_params(encoder=encoder, vision={**FREE, "pretrained": str(tmp_path), "feature_layers": [-2, 1]}), 1
    )
    assert model.config.vision_feature_layers == [3, 1]
    features = model.model.vision_backbone.encoder.eval()
    assert len(features.blocks) == 4
    pixels = torch.randn(2, 3, 32, 32)
    states = tower(pixels, output_hidden_states=True).hidden_states
    expected = torch.cat([states[4], states[2]], -1)[:, features.spec.prefix_tokens :]
    assert torch.equal(features(pixels), expected)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_pretrained_language_model(family, tied, make_params, tmp_path):
    """Logits of a text equal those of the causal language model that was loaded; saved in half precision."""
    config, kind = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    extra = {"head_dim": 16} if family == "qwen3" else {}
    source = random_weights(kind(config(**TEXT, tie_word_embeddings=tied, **extra))).to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    params = make_params(family=family, language={**FREE_TEXT, "pretrained": str(tmp_path)})
    model = build_model(params, 1).eval()
    assert model.config.text_config.vocab_size == VOCAB + 4 and model.config.image_token_id == VOCAB + 6
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied
    ids = torch.randint(0, VOCAB, (2, 11))
    reference = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, reference(ids).logits, atol=2e-6, rtol=1e-5)
    again = build_model(params, 2)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.model.extra_embedding.weight, model.model.extra_embedding.weight)


def test_pretrained_parts_must_fit(make_params, tmp_path):
    vision, text = tmp_path / "vision", tmp_path / "text"
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(vision)
    Qwen2ForCausalLM(Qwen2Config(**{**TEXT, "vocab_size": VOCAB - 1})).save_pretrained(text)
    for changes, message in (
        ({"vision": {**FREE, "pretrained": str(vision), "patch_size": 16}}, "patch_size is 16, but .* has 8"),
        ({"vision": {**FREE, "pretrained": str(vision), "hidden_size": 48}}, "hidden_size is 48, but .* has 32"),
        ({"vision": {**FREE, "pretrained": str(vision), "num_layers": 6}}, "num_layers 6, but .* has 5"),
        ({"encoder": "clip", "vision": {**FREE, "pretrained": str(vision)}}, "not a clip_vision_model"),
        ({"vision": {**FREE, "pretrained": str(tmp_path / "none")}}, "none is no folder here"),
        ({"language": {**FREE_TEXT, "pretrained": str(text)}}, "59 embeddings, the tokenizer 60"),
        ({"family": "qwen3", "language": {**FREE_TEXT, "pretrained": str(text)}}, "is a qwen2, not a qwen3"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_config(make_params(**changes))


def test_incomplete_weights_are_refused(make_params, tmp_path):
    source = SiglipVisionModel(SiglipVisionConfig(**VISION))
    state = {name: value for name, value in source.state_dict().items() if "layers.1.mlp.fc1" not in name}
    source.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lack 2 of the model's tensors.*layers\.1\.mlp\.fc1"):
        build_model(make_params(vision={**FREE, "pretrained": str(tmp_path), "feature_layers": [-1]}), 1)


def test_wrong_params_are_refused(make_params):
    for changes, message in (
        ({"encoder": "siglop"}, "did you mean 'siglip'"),
        ({"family": "gpt"}, "known: llama, olmo, olmo2, olmo3, olmoe, qwen2, qwen3"),
        ({"vision": {"feature_layers": [-5]}}, "layer -5 of an encoder with 4"),
        ({"vision": {"num_heads": 5}}, "num_heads 5 does not divide hidden_size 32"),
        ({"vision": {"image_size": 33}}, "image_size 33 is no multiple of patch_size 8"),
        ({"language": {"hidden_size": None, "num_layers": None}}, "hidden_size, num_layers must be given"),
        ({"language": {"num_heads": 5}}, "num_heads 5"),
        ({"language": {"extra_vocab_size": 2}}, "image_token_id 62 is no extra id.*extra_vocab_size is 2; raise it"),
        ({"language": {"one_image_block": True, "bidirectional_images": False}}, "set one_image_block: false"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_config(make_params(**changes))
    params = make_params()
    params.tokenizer = "nowhere/to/be/found"
    with pytest.raises(ConfigError, match="nowhere/to/be/found"):
        build_config(params)


def test_every_parameter_has_a_component(make_params):
    model = build_model(make_params(), 1)
    components = {name: component_of(name) for name, _ in model.named_parameters()}
    assert {name for name, part in components.items() if part == "vision"} == {
        name for name in components if "vision_backbone.encoder" in name
    }
    assert components["model.extra_embedding.weight"] == "connector"
    assert components["lm_head.weight"] == components["model.language_model.embed_tokens.weight"] == "language"
    assert component_of("model.vision_backbone._orig_mod.connector.pooling.q_proj.weight") == "connector"
    counts = parameter_counts(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters()) and min(counts.values())


@pytest.mark.parametrize("encoder", ["siglip", "clip"])
def test_buffers_are_restored_after_meta_construction(encoder, make_params, batch):
    """What a checkpoint does not hold comes back, and no parameter is drawn anew."""
    model = random_weights(build_model(make_params(encoder=encoder), 1)).eval()
    with torch.device("meta"):
        empty = MolmoForConditionalGeneration(model.config).eval()
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), strict=True)
    for buffer in empty.buffers():
        buffer.zero_()
    restore_buffers(empty)
    for (name, buffer), expected in zip(empty.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert torch.equal(empty(**batch).logits, model(**batch).logits)
    assert isinstance(AutoModel.from_config(model.config), type(model.model))
