"""The table of language models: every family is built, loaded as transformers saved it, trained, saved and reloaded."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from molmo_model.errors import ConfigError
from molmo_model.model_config import LanguageConfig
from molmo_model.nn.build import build_config, build_model, component_of
from molmo_model.nn.language_model import ALIASES, LANGUAGE_MODELS, QueryKeyNorm, language_model, text_config
from tests.nn.conftest import VOCAB, random_weights
from tests.nn.families import FAMILIES

FREE = dict.fromkeys(("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_key_value_heads"))
"""Sizes left to the pretrained part."""
OWN = {"olmo": {"clip_qkv": 0.5}, "qwen3": {"head_dim": 16}, "olmo3": {"sliding_window": 4}}
"""What released models of a family have and the sizes do not say."""


def saved_by_transformers(family, tied, folder, vocab_size=VOCAB + 4):
    """A causal language model of tiny random weights in half precision, as the hub has them."""
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **OWN.get(family, {}),
        **({"num_experts": 4, "num_experts_per_tok": 2} if family == "olmoe" else {}),
    )
    torch.manual_seed(0)
    random_weights(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_family_is_tested():
    assert set(FAMILIES) == set(LANGUAGE_MODELS)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_logits_equal_transformers_own(family, tied, make_params, tmp_path):
    """Loaded from a folder that transformers wrote: on text, the logits of its own causal language model; longer than
    OLMo 3's window. Equal to the bit where this was written."""
    reference = saved_by_transformers(family, tied, tmp_path)
    model = build_model(make_params(family=family, language={**FREE, "pretrained": str(tmp_path)}), 1).eval()
    text = model.config.text_config
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied == model.config.tie_word_embeddings
    assert text.vocab_size == VOCAB + 4 and model.config.image_token_id == VOCAB + 4 + 2
    ids = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, reference(ids).logits, atol=1e-5, rtol=0)


def test_experts_are_loaded_whatever_the_layout(make_params, tmp_path):
    """Released OLMoE files hold one tensor per expert, the model fused ones; also a folder in the model's layout."""
    reference = saved_by_transformers("olmoe", False, tmp_path / "hub")
    reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = []
    for layout in ("hub", "fused"):
        from safetensors import safe_open

        with safe_open(tmp_path / layout / "model.safetensors", "pt") as file:
            names.append(sum("experts" in name for name in file.keys()))  # noqa: SIM118 - not a dict
        params = make_params(family="olmoe", language={**FREE, "pretrained": str(tmp_path / layout)})
        loaded = build_model(params, 1).model.language_model.state_dict()
        for name, tensor in reference.base_model.state_dict().items():
            assert torch.equal(loaded[name], tensor), (layout, name)
    assert names == [4 * 4 * 3, 4 * 2]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_saves_and_reloads(family, tied, make_params, batch, tmp_path):
    """One step reaches every parameter, with and without activation checkpointing to the bit; extra ids begin at the
    rows of the embedding, more than the tokenizer has, and follow the connector; the folder gives the same bits."""
    params = make_params(
        family=family, language={**FAMILIES[family], "vocab_size": VOCAB + 7, "tie_word_embeddings": tied}
    )
    model = random_weights(build_model(params, 1)).train()
    assert model.config.image_token_id == VOCAB + 9 and model.lm_head.weight.shape[0] == VOCAB + 7
    extra = batch["input_ids"] >= VOCAB
    batch["input_ids"] = torch.where(extra, batch["input_ids"] + 7, batch["input_ids"])
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert [name for name, grad in gradients[0].items() if not grad.abs().max() > 0] == []
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())
    embedding = model.model.embed(torch.arange(VOCAB + 5, VOCAB + 9)[None])[0]
    base, new = model.get_input_embeddings().weight, model.model.extra_embedding.weight
    assert torch.equal(embedding, torch.cat([base[VOCAB + 5 :], new[:2]]))
    parts = {name: component_of(name) for name in gradients[0]}
    assert parts["model.extra_embedding.weight"] == "connector"
    others = {part for name, part in parts.items() if "language_model" in name or name == "lm_head.weight"}
    assert others == {"language"} and ("lm_head.weight" in parts) != tied
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_the_table_tells_the_truth(make_params):
    """What a row says about norms, windows and experts is what transformers' modules have."""
    for family, spec in LANGUAGE_MODELS.items():
        model = build_model(make_params(family=family, language=FAMILIES[family]), 1)
        layer, text = model.model.language_model.layers[0], model.config.text_config
        norm = getattr(layer.self_attn, "q_norm", None)
        width = None if norm is None else norm.weight.numel()
        assert width == {QueryKeyNorm.none: None, QueryKeyNorm.width: 32, QueryKeyNorm.head: 8}[spec.qk_norm], family
        assert hasattr(layer, "post_feedforward_layernorm") == spec.norm_after
        assert hasattr(layer.mlp, "experts") == spec.experts
        assert ("sliding_attention" in (getattr(text, "layer_types", None) or [])) == spec.sliding
        assert spec.head_dim == (
            AutoConfig.for_model(spec.model_type, hidden_size=256).to_dict().get("head_dim") == 128
        )
        rope = AutoConfig.for_model(spec.model_type).rope_parameters
        rope = rope.get("full_attention", rope)
        assert rope["rope_theta"] == spec.from_scratch_rope_theta, family


def test_choices_reach_the_config(make_params):
    def config(family, **language):
        return build_config(make_params(family=family, language={**FAMILIES[family], **language})).text_config

    assert config("qwen2", rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    for name in ("full_attention", "sliding_attention"):
        assert config("olmo3", rope_theta=7e5).rope_parameters[name]["rope_theta"] == 7e5
    assert config("olmo3", sliding_window=None).sliding_window == 4096
    experts = config("olmoe", num_experts=6, num_experts_per_token=3)
    assert (experts.num_experts, experts.num_experts_per_tok) == (6, 3)
    assert config("olmoe", num_experts=None, num_experts_per_token=None).num_experts == 64
    assert config("llama", vocab_size=100).vocab_size == 100
    assert all(config(family).pad_token_id is None for family in FAMILIES)  # a padding row would never learn


def test_aliases():
    assert all(target in LANGUAGE_MODELS for target in ALIASES.values()) and not set(ALIASES) & set(LANGUAGE_MODELS)
    assert language_model("Qwen2.5") is LANGUAGE_MODELS["qwen2"]
    assert language_model("llama3") is LANGUAGE_MODELS["llama"]
    with pytest.raises(ConfigError, match="did you mean 'olmoe'"):
        language_model("olmoee")


@pytest.mark.parametrize(
    ("family", "language", "message"),
    [
        ("qwen2", {"sliding_window": 4}, "sliding_window must be left out; Qwen2, Qwen2.5 has no such layers"),
        ("olmo3", {"num_experts": 4}, "num_experts must be left out"),
        ("olmoe", {"num_experts": 2, "num_experts_per_token": 3}, "num_experts_per_token 3 is more than num_experts 2"),
        ("qwen3", {"head_dim": 7}, "head_dim 7 is odd"),
        ("llama", {"vocab_size": VOCAB - 1}, "has 59 embeddings, the tokenizer 60 tokens; give vocab_size"),
    ],
)
def test_what_does_not_fit_is_refused(family, language, message, make_params):
    with pytest.raises(ConfigError, match=message):
        build_config(make_params(family=family, language={**FAMILIES[family], **language}))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"num_experts": 8}, "num_experts is 8, but .* has 4"),
        ("olmoe", {"num_experts_per_token": 1}, "num_experts_per_token is 1, but .* has 2"),
        ("olmo3", {"sliding_window": 5}, "sliding_window is 5, but .* has 4"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta is 10000.0, but .* has 500000.0"),
        ("qwen2", {"vocab_size": 70}, "vocab_size is 70, but .* has 64"),
        ("qwen2", {"tie_word_embeddings": True}, "tie_word_embeddings is true, but .* has a head of its own"),
    ],
)
def test_sizes_that_a_pretrained_model_has_not(family, changes, message, tmp_path):
    saved_by_transformers(family, False, tmp_path)
    with pytest.raises(ConfigError, match=message):
        text_config(LanguageConfig(family=family, pretrained=str(tmp_path), **changes), VOCAB)
    same = copy.copy(LanguageConfig(family=family, pretrained=str(tmp_path), vocab_size=VOCAB + 4))
    assert text_config(same, VOCAB).vocab_size == VOCAB + 4
