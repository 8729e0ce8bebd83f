"""Pretrained encoders: feature by feature equal to transformers' own model, at their own and at another crop size."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.model_config import VisionConfig, VisionPositions
from molmo_model.nn.build import build_model
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.positions import resize_positions
from molmo_model.nn.vision_config import load_vision, vision_config
from molmo_model.nn.vision_encoder import VISION_ENCODERS, ViTFeatures
from molmo_model.train.weights import read_shapes
from tests.nn.conftest import random_weights

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
MLP = {"intermediate_size": 48}
SOURCES = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **MLP)),
    "clip_h14": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **MLP, hidden_act="gelu")),
    "metaclip_b16": lambda: two_towers(CLIPModel, CLIPConfig, CLIPVisionConfig),
    "metaclip_l14": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, **MLP)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, **MLP)),
    "siglip2": lambda: two_towers(SiglipModel, SiglipConfig, SiglipVisionConfig),
    "dinov2_small": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2_giant": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2)),
}
FREE = dict.fromkeys(("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def two_towers(kind, config, vision):
    text = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return kind(config(vision_config=vision(**SIZES, **MLP).to_dict(), text_config={**text, "num_hidden_layers": 1}))


def save(model, folder, **kwargs):
    model = random_weights(model).eval()
    model.save_pretrained(folder, **kwargs)
    return getattr(model, "vision_model", model)


def load(encoder, folder, **params):
    config, layers = vision_config(VisionConfig(encoder=encoder, pretrained=str(folder), **params))
    positions = params.get("positions", VisionPositions.native).value
    features = ViTFeatures(config, encoder, layers, positions).eval()
    load_vision(features, str(folder))
    return features


@pytest.mark.parametrize("encoder", SOURCES)
@torch.no_grad()
def test_features_of_every_block_equal_transformers_own(encoder, tmp_path):
    """Folders of the vision model alone and of a model with a text tower. Exactly equal: the same operations."""
    source = save(SOURCES[encoder](), tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    states = source(pixels, output_hidden_states=True).hidden_states
    for layers in ([0], [1], [2], [3], [4], [-2, 1]):
        features = load(encoder, tmp_path, feature_layers=layers)
        numbers = [layer % 5 for layer in layers]
        assert len(features.blocks) == max(numbers) + 1
        expected = torch.cat([states[number + 1] for number in numbers], -1)
        assert torch.equal(features(pixels), expected[:, features.spec.prefix_tokens :])
        assert all(parameter.dtype == torch.float32 for parameter in features.parameters())


@pytest.mark.parametrize("encoder", SOURCES)
@torch.no_grad()
def test_whole_model_from_pretrained_weights(encoder, make_params, tmp_path):
    """Built, saved and loaded again: the same features, also through transformers' own loading."""
    source = save(SOURCES[encoder](), tmp_path / "vision")
    vision = {**FREE, "pretrained": str(tmp_path / "vision"), "feature_layers": [-2, 1]}
    model = build_model(make_params(encoder=encoder, vision=vision), 1).eval()
    assert model.config.vision_feature_layers == [3, 1]
    model.save_pretrained(tmp_path / "whole")
    again = MolmoForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    assert set(again.state_dict()) == set(model.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    states = source(pixels, output_hidden_states=True).hidden_states
    for built in (model, again):
        features = built.model.vision_backbone.encoder
        expected = torch.cat([states[4], states[2]], -1)[:, features.spec.prefix_tokens :]
        assert torch.equal(features(pixels), expected)


@pytest.mark.parametrize("size", [16, 24, 56, 64])
@pytest.mark.parametrize("encoder", SOURCES)
@torch.no_grad()
def test_another_crop_size_interpolates_the_positions(encoder, size, tmp_path):
    """Against the table put into transformers' own model by hand, per channel and with the class token's kept."""
    source = save(SOURCES[encoder](), tmp_path)
    features = load(encoder, tmp_path, image_size=size, feature_layers=[1])
    spec = VISION_ENCODERS[encoder]
    prefix = min(spec.prefix_tokens, 1)
    stored = dict(source.named_parameters())[spec.positions].view(-1, 32)
    expected = [stored[:prefix].T]
    for channel in range(32):
        plane = stored[prefix:, channel].view(1, 1, 4, 4)
        resized = F.interpolate(plane, size=(size // 8, size // 8), mode="bicubic", antialias=True, align_corners=False)
        expected.append(resized.flatten())
    patches = torch.stack(expected[1:]).T
    own = features.vit.state_dict()[spec.positions].view(-1, 32)
    assert torch.equal(own[:prefix], stored[:prefix])
    torch.testing.assert_close(own[prefix:], patches, atol=1e-6, rtol=0)  # worst measured: 0
    assert features.vit.config.image_size == size
    assert features(torch.randn(2, 3, size, size)).shape == (2, (size // 8) ** 2, 32)


@pytest.mark.parametrize("size", [24, 64])
@torch.no_grad()
def test_interpolation_agrees_with_transformers_model_that_antialiases(size, tmp_path):
    """DINOv2 with registers interpolates by itself, with antialiasing, at every forward."""
    source = save(SOURCES["dinov2_registers"](), tmp_path)
    features = load("dinov2_registers", tmp_path, image_size=size, feature_layers=[2])
    pixels = torch.randn(2, 3, size, size)
    expected = source(pixels, output_hidden_states=True).hidden_states[3][:, 5:]
    torch.testing.assert_close(features(pixels), expected, atol=2e-6, rtol=0)  # worst measured: 0


def test_interpolation_keeps_what_needs_no_interpolation():
    table = torch.randn(17, 6)
    assert resize_positions(table, 4, 1) is table
    flat = torch.full((17, 6), 0.3)
    torch.testing.assert_close(resize_positions(flat, 9, 1), torch.full((82, 6), 0.3))
    gradient = torch.arange(6.0).repeat(6, 1).view(36, 1)  # a plane stays one, away from the border
    resized = resize_positions(gradient, 12, 0).view(12, 12)
    inner = (torch.arange(12.0) - 0.5) / 2
    torch.testing.assert_close(resized[5, 4:8], inner[4:8], atol=1e-6, rtol=0)


def test_crop_of_a_size_that_is_no_multiple(tmp_path):
    """google/siglip-so400m-patch14-384 says 384 pixels, of which 378 are whole patches: no interpolation."""
    source = save(SiglipVisionModel(SiglipVisionConfig(**{**SIZES, "image_size": 38}, **MLP)), tmp_path)
    features = load("siglip", tmp_path, feature_layers=[1])
    assert features.vit.config.image_size == 32
    pixels = torch.randn(2, 3, 38, 38)
    expected = source(pixels, output_hidden_states=True).hidden_states[2]
    assert torch.equal(features(pixels[:, :, :32, :32].contiguous()), expected)


@pytest.mark.parametrize(
    ("encoder", "size", "patch", "message"),
    [
        ("clip", 768, 14, "image_size 768 is no multiple of patch_size 14; take 756 or 770"),
        ("siglip", 224, 14, None),
        ("siglip", 336, 14, None),
        ("metaclip_b16", 768, 16, None),
        ("dinov2_large", 518, 14, None),
        ("clip", 10, 14, "image_size 10 is no multiple of patch_size 14; take 14"),
    ],
)
def test_sizes_of_the_original_documents(encoder, size, patch, message):
    params = VisionConfig(encoder=encoder, image_size=size)
    if message is None:
        config, _ = vision_config(params)
        assert (config.image_size, config.patch_size) == (size, patch)
    else:
        with pytest.raises(ConfigError, match=message):
            vision_config(params)


@pytest.mark.parametrize("layers", [5, 6])
def test_layers_are_counted_as_molmo_counts(layers, tmp_path, monkeypatch):
    """An encoder that leaves out the last layer of the published weights does so with exactly those."""
    monkeypatch.setitem(VISION_ENCODERS, "clip", replace(VISION_ENCODERS["clip"], num_layers=5))
    save(CLIPVisionModel(CLIPVisionConfig(**{**SIZES, "num_hidden_layers": layers}, **MLP)), tmp_path)
    _, blocks = vision_config(VisionConfig(encoder="clip", pretrained=str(tmp_path), feature_layers=[-1, -2]))
    assert blocks == [4, 3]


def test_variable_resolution_is_refused_by_name(tmp_path):
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=8, num_patches=16
    )
    Siglip2VisionModel(config).save_pretrained(tmp_path / "vision")
    Siglip2Config(vision_config=config.to_dict()).save_pretrained(tmp_path / "whole")
    for folder in ("vision", "whole"):
        with pytest.raises(ConfigError, match=r"naflex.*siglip2-so400m-patch14-384"):
            vision_config(VisionConfig(encoder="siglip2", pretrained=str(tmp_path / folder)))


def test_another_family_and_other_sizes_are_refused(tmp_path):
    save(SOURCES["dinov2_small"](), tmp_path / "dino")
    save(
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=2)),
        tmp_path / "two",
    )
    for params, message in (
        ({"encoder": "clip", "pretrained": "dino"}, "is a dinov2, not a clip_vision_model"),
        ({"encoder": "dinov2_registers", "pretrained": "two"}, "has 2 register tokens, not 4"),
        ({"encoder": "dino", "pretrained": "dino", "intermediate_size": 96}, "intermediate_size is 96, but .* has 64"),
        ({"encoder": "dino", "pretrained": "dino", "hidden_size": 48}, "hidden_size is 48, but .* has 32"),
        ({"encoder": "dino", "pretrained": "dino", "image_size": 33}, "take 32 or 40"),
    ):
        source = str(tmp_path / params["pretrained"])
        with pytest.raises(ConfigError, match=message):
            vision_config(VisionConfig(**{"feature_layers": [-1], **params, "pretrained": source}))
    with pytest.raises(ConfigError, match=r"intermediate_size 48 is no multiple of hidden_size 32.*take 32"):
        vision_config(VisionConfig(encoder="dinov2_small", hidden_size=32, num_heads=4, intermediate_size=48))


@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2_small"])
def test_missing_and_left_over_weights_are_refused(encoder, tmp_path):
    model = SOURCES[encoder]()
    state = model.state_dict()
    fc1 = next(name for name in state if ".1.mlp.fc1.weight" in name)
    model.save_pretrained(tmp_path / "less", state_dict={name: value for name, value in state.items() if name != fc1})
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's tensors.*1\.mlp\.fc1"):
        load(encoder, tmp_path / "less", feature_layers=[-1])
    load(encoder, tmp_path / "less", feature_layers=[0])  # that block is not built
    more = {**state, fc1.replace("fc1", "fc3"): torch.zeros(1)}
    model.save_pretrained(tmp_path / "more", state_dict=more)
    with pytest.raises(CheckpointError, match=r"hold 1 tensors .* no place for.*1\.mlp\.fc3"):
        load(encoder, tmp_path / "more", feature_layers=[-1])
    load(encoder, tmp_path / "more", feature_layers=[0])


@pytest.mark.parametrize("damage", ["cut off", "nan", "shape", "no folder"])
def test_damaged_weights_are_refused(damage, tmp_path):
    model = SOURCES["clip"]()
    name = "encoder.layers.1.mlp.fc1.weight"
    values = {"nan": model.state_dict()[name] * torch.nan, "shape": torch.zeros(3, 32)}
    model.save_pretrained(
        tmp_path, state_dict=model.state_dict() | {name: values.get(damage, model.state_dict()[name])}
    )
    if damage == "cut off":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    message = {
        "cut off": "cannot be loaded",
        "nan": rf"1 tensors hold NaN or infinity: \['{name}'\]",
        "shape": rf"{name}.*\[3, 32\].*\[48, 32\]",
        "no folder": "nowhere is no folder here",
    }
    folder = tmp_path / "nowhere" if damage == "no folder" else tmp_path
    with pytest.raises(ConfigError if damage == "no folder" else CheckpointError, match=message[damage]):
        load("clip", folder, feature_layers=[-1])


def test_position_numbers_of_older_files_are_no_weights(tmp_path):
    """openai/clip-vit-large-patch14-336 was written when position ids were saved, below the name of the tower."""
    model = SOURCES["clip"]()
    state = {f"vision_model.{name}": value for name, value in model.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    model.save_pretrained(tmp_path, state_dict=state)
    assert "vision_model.embeddings.position_ids" in read_shapes(tmp_path)
    features = load("clip", tmp_path, feature_layers=[-1])
    assert torch.equal(features.vit.embeddings.class_embedding, model.embeddings.class_embedding)
