"""Chosen layers, without norm and prefix tokens, equal what transformers' full encoders record."""

import pytest
import torch
from transformers import AutoModel, CLIPVisionModel, Dinov2Model, SiglipVisionModel

from molmo_model.errors import ConfigError
from molmo_model.model_config import VisionConfig
from molmo_model.nn.vision_backbone import PixelNormalize
from molmo_model.nn.vision_config import vision_config
from molmo_model.nn.vision_encoder import ENCODER_ALIASES, VISION_ENCODERS, ViTFeatures, encoder_name, resolve_layers
from molmo_model.preprocessing.image import RESIZE_METHODS
from tests.nn.conftest import random_weights

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 5,
    "num_heads": 4,
}


def tiny(encoder, layers):
    return vision_config(VisionConfig(encoder=encoder, feature_layers=layers, **SIZES))


@pytest.mark.parametrize("encoder", VISION_ENCODERS)
@pytest.mark.parametrize("layers", [[3], [3, 1], [0, 2]])
def test_features_equal_hidden_states_of_the_full_model(encoder, layers):
    spec = VISION_ENCODERS[encoder]
    full = random_weights(AutoModel.from_config(tiny(encoder, [4])[0]).eval())
    features = ViTFeatures(tiny(encoder, layers)[0], encoder, layers).eval()
    missing, unexpected = features.vit.load_state_dict(full.state_dict(), strict=False)
    behind = ("layers.", "layer.", "post_layernorm", "layernorm.", "embeddings.mask_token")
    assert missing == [] and all(any(part in name for part in behind) for name in unexpected)
    assert len(features.blocks) == max(layers) + 1
    pixels = torch.randn(3, 3, 32, 32)
    states = full(pixels, output_hidden_states=True).hidden_states  # embeddings first
    expected = torch.cat([states[layer + 1] for layer in layers], -1)[:, spec.prefix_tokens :]
    assert features(pixels).shape == (3, 16, 32 * len(layers))
    assert torch.equal(features(pixels), expected)


@pytest.mark.parametrize("positions", ["native", "learned_2d", "rope_2d"])
@pytest.mark.parametrize("encoder", VISION_ENCODERS)
def test_every_parameter_is_used(encoder, positions):
    config, layers = tiny(encoder, [4, 1])
    features = ViTFeatures(config, encoder, layers, positions)
    features(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert [name for name, parameter in features.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("positions", ["native", "rope_2d"])
@pytest.mark.parametrize("encoder", VISION_ENCODERS)
@torch.no_grad()
def test_a_built_encoder_starts_at_a_scale_that_learns(encoder, positions):
    """Features near one and different per patch, also for noise: no norm stands behind them to repair it."""
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 96, "intermediate_size": 192}
    params = VisionConfig(encoder=encoder, num_layers=3, num_heads=4, feature_layers=[-1, -2], **sizes)
    config, layers = vision_config(params)
    spec = VISION_ENCODERS[encoder]
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    normalised = PixelNormalize(list(spec.mean), list(spec.std))(pixels)
    features = ViTFeatures(config, encoder, layers, positions).eval()(normalised)
    assert 0.3 < features.std() < 4 and features.std(1).mean() > 0.1  # measured: 0.7 to 1.4


def test_default_sizes_are_those_of_the_papers():
    """Positions: 27 * 27 of SigLIP so400m at 378 pixels, 24 * 24 + 1 of CLIP L at 336. CLIP counts from 23 layers."""
    for encoder, positions, blocks in (
        ("siglip", 729, [24, 18]),
        ("clip", 577, [21, 14]),
        ("dinov2_large", 577, [21, 15]),
        ("dinov2_registers", 576 + 5, [21, 15]),
        ("metaclip_l14", 577, [21, 15]),
        ("metaclip_b16", 197, [9, 3]),
    ):
        spec = VISION_ENCODERS[encoder]
        assert (spec.image_size // spec.patch_size) ** 2 + spec.prefix_tokens == positions
        assert resolve_layers(spec.feature_layers, spec.num_layers, "") == blocks


@pytest.mark.parametrize(
    ("encoder", "kind", "parameters"),
    [
        ("clip", CLIPVisionModel, 303_507_456),
        ("clip_h14", CLIPVisionModel, 630_766_080),
        ("siglip", SiglipVisionModel, 428_225_600),
        ("dinov2_small", Dinov2Model, 22_056_576),
        ("dinov2_base", Dinov2Model, 86_580_480),
        ("dinov2_large", Dinov2Model, 304_368_640),
        ("dinov2_giant", Dinov2Model, 1_136_480_768),
        ("metaclip_b16", CLIPVisionModel, 85_799_424),
    ],
)
def test_published_sizes(encoder, kind, parameters):
    """Parameters of the published vision models, from their papers' and model cards' sizes: 304M of CLIP L, 632M of
    H, 428M of so400m with its head, 22M, 86M, 304M and 1.1B of DINOv2."""
    spec = VISION_ENCODERS[encoder]
    config, _ = vision_config(
        VisionConfig(
            encoder=encoder,
            image_size=spec.stored_size // spec.patch_size * spec.patch_size,
            num_layers=spec.stored_layers,
            feature_layers=[-1],
        )
    )
    if encoder == "siglip":
        config.vision_use_head = True
    if kind is Dinov2Model:
        config.use_mask_token = True
    with torch.device("meta"):
        model = kind(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_activation_and_epsilon_of_a_built_model_are_the_published_ones():
    """OpenCLIP's H/14 has the exact gelu, OpenAI's and MetaCLIP's the quick one; transformers' default is the latter,
    and DINOv2's giant has a SwiGLU."""
    found = {name: tiny(name, [0])[0] for name in VISION_ENCODERS}
    assert {name: config.hidden_act for name, config in found.items() if "lip" in name} == {
        "clip": "quick_gelu",
        "clip_h14": "gelu",
        "siglip": "gelu_pytorch_tanh",
        "siglip2": "gelu_pytorch_tanh",
        "metaclip_b16": "quick_gelu",
        "metaclip_l14": "quick_gelu",
        "metaclip_h14": "quick_gelu",
    }
    assert all(config.layer_norm_eps == VISION_ENCODERS[name].eps for name, config in found.items())
    assert [name for name, config in found.items() if getattr(config, "use_swiglu_ffn", False)] == ["dinov2_giant"]


def test_names_of_the_original_documents():
    for alias, name in ENCODER_ALIASES.items():
        assert encoder_name(alias) == name and alias not in VISION_ENCODERS
    assert encoder_name("openai") == "clip" and encoder_name("dino") == encoder_name("dinov2") == "dinov2_large"
    with pytest.raises(ConfigError, match="did you mean 'dinov2_large'"):
        encoder_name("dinov2_larg")


@pytest.mark.parametrize("encoder", VISION_ENCODERS)
def test_every_encoder_resizes_by_a_known_method(encoder):
    assert VISION_ENCODERS[encoder].resize in RESIZE_METHODS


@pytest.mark.parametrize("layers", [[5], [-6], [], [1, -4]])
def test_wrong_layers_are_refused(layers):
    with pytest.raises(ConfigError, match=r"here: .*of (an encoder with )?5"):
        resolve_layers(layers, 5, "here")


@pytest.mark.parametrize("encoder", VISION_ENCODERS)
def test_normalisation_is_exact(encoder):
    """Every value of every channel, against the same formula in double precision and, bit by bit, in single."""
    spec = VISION_ENCODERS[encoder]
    values = torch.arange(256, dtype=torch.uint8)
    pixels = values.view(1, 16, 16, 1).expand(1, 16, 16, 3)
    out = PixelNormalize(list(spec.mean), list(spec.std))(pixels)
    assert out.shape == (1, 3, 16, 16) and out.dtype == torch.float32
    for channel in range(3):
        single = (values.float() / 255 - torch.tensor(spec.mean[channel])) / torch.tensor(spec.std[channel])
        assert torch.equal(out[0, channel].flatten(), single)
        double = (values.double() / 255 - spec.mean[channel]) / spec.std[channel]
        torch.testing.assert_close(single.double(), double, atol=4e-7, rtol=0)
