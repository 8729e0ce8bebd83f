"""Tiny HeMolmos with their preprocessors, for the tests of token selection."""

from typing import Any

import torch

from molmo_model.model_config import (
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    PreprocessingConfig,
    VisionConfig,
)
from molmo_model.nn.build import build_model
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.token_selector import selector_config
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer
from tests.nn.conftest import random_weights

TOKENIZER = "molmo_model/preprocessing/tokenizers/bytes512"
QUIET = {"dropout": 0.0, "gate_dropout": 0.0}
"""No draws in training, so that two forwards agree."""


def params(
    selector: dict[str, Any] | None, family: str = "qwen2", resize: str | None = None, **language
) -> ModelConfig:
    """64-pixel crops of 4 x 4 patches, windows of 2 x 2, up to 5 crops and 12 high-resolution tokens."""
    return ModelConfig(
        vision=VisionConfig(
            encoder="siglip",
            image_size=64,
            patch_size=16,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            feature_layers=[-1],
        ),
        connector=ConnectorConfig(window_position_embedding=True),
        language=LanguageConfig(
            **{
                "family": family,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_layers": 3,
                "num_heads": 4,
                "num_key_value_heads": 2,
                **language,
            }
        ),
        preprocessing=PreprocessingConfig(max_crops=5, overlap_margins=[1, 1], resize=resize),
        selector=None if selector is None else selector_config({"hidden_size": 16, "score": "learned", **selector}),
        tokenizer=TOKENIZER,
    )


def preprocessor(model: ModelConfig, vocab_size: int) -> Preprocessor:
    config = PreprocessorConfig.build(
        model.preprocessing,
        image_size=64,
        patch_size=16,
        pooling_size=2,
        resize="siglip",
        vocab_size=vocab_size,
        selector=model.selector,
    )
    return Preprocessor(config, load_tokenizer(TOKENIZER))


def build(selector: dict[str, Any] | None, **options) -> tuple[MolmoForConditionalGeneration, Preprocessor]:
    """A model with noise on all weights, and its preprocessor."""
    made = params(selector, **options)
    model = random_weights(build_model(made, seed=1))
    with torch.no_grad():
        if model.model.token_selector is not None:  # scores that tell candidates apart
            for name, parameter in model.model.token_selector.named_parameters():
                if name.endswith("down.weight"):
                    parameter.mul_(20)
    return model, preprocessor(made, model.config.text_config.vocab_size)


def same_weights(plain: MolmoForConditionalGeneration, other: MolmoForConditionalGeneration) -> None:
    """Gives a plain model the weights of a HeMolmo, without its selector."""
    states = {name: value for name, value in other.state_dict().items() if "token_selector" not in name}
    plain.load_state_dict(states, strict=True)
