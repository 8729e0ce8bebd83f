"""Which layers quantisation touches, and how it refuses where it cannot be."""

import pytest
import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from molmo_model.config import Quantization
from molmo_model.errors import ConfigError
from molmo_model.nn import quantization
from molmo_model.nn.build import build_model
from molmo_model.nn.quantization import quantization_config, quantized_loading


def test_without_it_nothing_changes() -> None:
    assert quantized_loading(Quantization.none) == {}


@pytest.mark.parametrize("kind", [Quantization.int8, Quantization.int4])
def test_only_the_language_model_s_layers_are_touched(make_params, kind: Quantization) -> None:
    """transformers' own decision, module by module."""
    config = quantization_config(kind)
    assert (config.load_in_8bit, config.load_in_4bit) == (kind is Quantization.int8, kind is Quantization.int4)
    model = build_model(make_params(), seed=1)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
    assert chosen == {name for name in linear if name.startswith("model.language_model.")}
    assert len(chosen) == 2 * 7 and "lm_head" in linear


def test_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"eval\.quantization int4 needs a GPU"):
        quantized_loading(Quantization.int4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantization, "PACKAGE", "no-such-package-here")
    with pytest.raises(ConfigError, match=r"int8 needs no-such-package-here: pip install '\.\[gpu\]'"):
        quantized_loading(Quantization.int8)
