"""Chosen layers, without norm and class token, equal what transformers' full encoders record."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from molmo_model.errors import ConfigError
from molmo_model.nn.vision_backbone import PixelNormalize
from molmo_model.nn.vision_encoder import VISION_ENCODERS, ViTFeatures, resolve_layers
from tests.nn.conftest import random_weights

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("encoder", VISION_ENCODERS)
@pytest.mark.parametrize("layers", [[3], [3, 1], [0, 2]])
def test_features_equal_hidden_states_of_the_full_model(encoder, layers):
    spec = VISION_ENCODERS[encoder]
    full = random_weights(AutoModel.from_config(AutoConfig.for_model(spec.model_type, **SIZES)).eval())
    trimmed = AutoConfig.for_model(spec.model_type, **{**SIZES, "num_hidden_layers": max(layers) + 1})
    for name, value in spec.extra_config:
        setattr(trimmed, name, value)
    features = ViTFeatures(trimmed, encoder, layers).eval()
    _, unexpected = features.vit.load_state_dict(full.state_dict(), strict=False)
    assert all("layers." in name or "post_layernorm" in name or name.startswith("head.") for name in unexpected)
    assert len(features.blocks) == max(layers) + 1
    pixels = torch.randn(3, 3, 32, 32)
    states = full(pixels, output_hidden_states=True).hidden_states  # embeddings first
    expected = torch.cat([states[layer + 1] for layer in layers], -1)[:, spec.prefix_tokens :]
    assert features(pixels).shape == (3, 16, 32 * len(layers))
    assert torch.equal(features(pixels), expected)


@pytest.mark.parametrize("encoder", VISION_ENCODERS)
def test_every_parameter_is_used(encoder):
    spec = VISION_ENCODERS[encoder]
    config = AutoConfig.for_model(spec.model_type, **SIZES, **dict(spec.extra_config))
    features = ViTFeatures(config, encoder, [4, 1])
    features(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert [name for name, parameter in features.named_parameters() if parameter.grad is None] == []


def test_default_sizes_are_those_of_the_papers():
    """Positions: 27 * 27 of SigLIP so400m at 378 pixels, 24 * 24 + 1 of CLIP L at 336."""
    for encoder, positions, blocks in (("siglip", 729, [24, 18]), ("clip", 577, [21, 14])):
        spec = VISION_ENCODERS[encoder]
        assert (spec.image_size // spec.patch_size) ** 2 + spec.prefix_tokens == positions
        assert resolve_layers(spec.feature_layers, spec.num_layers, "") == blocks


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
