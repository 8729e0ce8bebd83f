"""Export to transformers' native Molmo2 and the way back, against that class itself."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.molmo2.modeling_molmo2 import Molmo2ForConditionalGeneration

from molmo_model.errors import ConfigError
from molmo_model.nn.build import build_config
from molmo_model.nn.convert_molmo2 import load_native, longest, native_state, our_config, our_state, to_native
from molmo_model.nn.generation import generate
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from tests.nn.conftest import VOCAB, Conversation, crops_and_pooling, lay_out, random_weights, tensors

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TEXTS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
    },
}


@pytest.fixture
def make_model(make_params):
    def make(text: str | dict[str, Any] = "qwen3", **changes: Any) -> MolmoForConditionalGeneration:
        config = build_config(make_params(connector={"window_position_embedding": False})).to_dict()
        named = dict(TEXTS[text] if isinstance(text, str) else text)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        text_config = AutoConfig.for_model(
            named.pop("model_type"), **{"vocab_size": VOCAB, "num_hidden_layers": 3, **sizes, **named}
        )
        config |= {"text_config": text_config, "one_image_block": True, **changes}
        config.pop("tie_word_embeddings")
        for name in ("projector_hidden_size", "image_token_id", "transformers_version", "model_type"):
            config.pop(name, None)
        config["vision_config"] = AutoConfig.for_model(**config["vision_config"])
        torch.manual_seed(3)
        return random_weights(MolmoForConditionalGeneration(MolmoConfig(**config))).eval()

    return make


def inputs() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same row with two images for ours and for the native class."""
    rng = torch.Generator().manual_seed(7)
    row = lay_out(Conversation([4, 5], 6, []), rng)
    pixels, pooling = crops_and_pooling([4, 5], rng)
    batch = tensors([row])
    ours = {
        "input_ids": batch["input_ids"],
        "image_ids": batch["image_ids"],
        "pooling": pooling,
        "pixel_values": pixels,
    }
    normalized = ((pixels.float() / 255 - 0.5) / 0.5).reshape(len(pixels), 4, 8, 4, 8, 3).permute(0, 1, 3, 2, 4, 5)
    native = {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "mm_token_type_ids": (batch["image_ids"] > 0).long(),
        "pixel_values": normalized.reshape(len(pixels), 16, 192),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[1, 2, 1, 2], [1, 2, 1, 3]]),
    }
    return ours, native


@pytest.mark.parametrize("text", list(TEXTS))
@torch.no_grad()
def test_logits_and_answers_are_the_native_class_s(make_model, text: str) -> None:
    ours = make_model(text)
    native = to_native(ours)
    mine, theirs = inputs()
    expected = native(**theirs).logits
    found = ours(**mine).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)  # measured: 0.0, of logits up to 1
    answer = native.generate(**theirs, max_new_tokens=6, do_sample=False, eos_token_id=-1)[
        0, mine["input_ids"].shape[1] :
    ]
    prompt = {**mine, "attention_mask": theirs["attention_mask"], "image_token_counts": torch.tensor([4, 5])}
    assert generate(ours, prompt, 6, [10**6]) == [answer.tolist()]


@torch.no_grad()
def test_one_block_is_what_makes_them_equal(make_model) -> None:
    """Power of the test above: with attention within each image the logits differ, so such a model is refused."""
    ours = make_model()
    native = to_native(ours)
    mine, theirs = inputs()
    ours.config.one_image_block = False
    assert (ours(**mine).logits - native(**theirs).logits).abs().max() > 0.01
    with pytest.raises(ConfigError, match="one_image_block"):
        to_native(ours)
    to_native(ours, max_images=1)  # a single image is one block either way


@pytest.mark.parametrize("text", list(TEXTS))
def test_saved_folder_comes_back_the_same(make_model, text: str, tmp_path) -> None:
    ours = make_model(text)
    native = to_native(ours)
    native.save_pretrained(tmp_path)
    back = load_native(tmp_path)
    mine = ours.state_dict()
    assert list(back.state_dict()) == list(mine)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, mine[name]), name
    rows, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(back(**rows).logits, ours(**rows).logits, atol=0, rtol=0)
    again = native_state(back.state_dict(), back.config)
    for name, tensor in native.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert our_state(native.state_dict(), back.config).keys() == mine.keys()


def test_released_names_are_what_is_written(make_model, tmp_path) -> None:
    from safetensors import safe_open

    to_native(make_model("olmo2")).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.transformer.wte.embedding", "model.transformer.blocks.0.self_attn.att_proj.weight"} <= names


@pytest.mark.slow
def test_a_fresh_process_loads_it_without_this_project(make_model, tmp_path) -> None:
    ours = make_model("olmo3")
    to_native(ours).save_pretrained(tmp_path)
    mine, theirs = inputs()
    torch.save(theirs, tmp_path / "inputs.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert not any(name.startswith("molmo_model") for name in sys.modules)
with torch.no_grad():
    inputs = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=True)
    torch.save(model(**inputs).logits, {str(tmp_path / "out.pt")!r})
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["Molmo2ForConditionalGeneration"]
    with torch.no_grad():
        expected = ours(**mine).logits
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), expected, atol=2e-6, rtol=0)


def test_olmo3_is_exported_up_to_its_window(make_model) -> None:
    ours = make_model("olmo3")
    assert longest(ours.config) == 48
    assert to_native(ours).config.text_config.max_position_embeddings == 48
    with pytest.raises(ConfigError, match="64 positions: it is equal up to 48 only"):
        to_native(ours, max_positions=64)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text": {"model_type": "qwen2"}}, "language model qwen2"),
        ({"text": {"model_type": "llama"}}, "language model llama"),
        ({"text": {"model_type": "qwen3", "attention_bias": True}}, "attention_bias"),
        ({"pooling_attention_mask": False}, "pooling_attention_mask: False"),
        ({"window_position_embedding": True}, "window_position_embedding: True"),
        ({"bidirectional_images": False, "one_image_block": False}, "bidirectional_images: false"),
    ],
)
def test_what_cannot_be_expressed_is_named(make_model, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        to_native(make_model(**changes))


def test_an_untold_vision_tower_is_refused(make_model, make_params) -> None:
    clip = MolmoForConditionalGeneration(build_config(make_params(encoder="clip", family="qwen3")))
    with pytest.raises(ConfigError, match="vision encoder clip"):
        to_native(clip, max_images=1)


def test_a_native_model_of_transformers_own_making_is_read(make_model, tmp_path) -> None:
    """The other direction from the other side: a native model that was never ours."""
    config = to_native(make_model()).config
    torch.manual_seed(11)
    native = random_weights(Molmo2ForConditionalGeneration(config)).eval()
    native.save_pretrained(tmp_path)
    ours = load_native(tmp_path)
    mine, theirs = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ours(**mine).logits, native(**theirs).logits, atol=2e-6, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**mine).logits, native(**theirs).logits, atol=2e-6, rtol=0)


def test_a_native_model_that_is_none_of_ours_is_refused(make_model) -> None:
    config = to_native(make_model()).config
    config.text_config.qk_norm_type = "olmo"
    with pytest.raises(ConfigError, match="qk_norm_type olmo with norm_after False"):
        our_config(config)
