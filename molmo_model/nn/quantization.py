"""The language model's weights in 8 or 4 bits for inference, through transformers and bitsandbytes, on a GPU.

Only linear layers of the language model's blocks change; encoder, connector, embeddings and head stay as they are. Int8
is LLM.int8() (arXiv 2208.07339), with columns of large activations in 16 bits; int4 is NF4 with doubly quantised scales
(QLoRA, arXiv 2305.14314).
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from molmo_model.decoding import Quantization
from molmo_model.errors import ConfigError

PACKAGE = "bitsandbytes"
UNTOUCHED = ["lm_head", r"model\.(?!language_model)\w+"]
"""Patterns, from the start of a module's name, of what keeps its weights."""


def quantized_loading(quantization: Quantization) -> dict[str, Any]:
    """What `from_pretrained` is given beside the folder; nothing without quantisation.

    Raises:
        ConfigError: there is no GPU here, or the package is missing.
    """
    if quantization is Quantization.none:
        return {}
    if not torch.cuda.is_available():
        raise ConfigError(f"eval.quantization {quantization.value} needs a GPU and there is none here; set it to none")
    try:
        version(PACKAGE)
    except PackageNotFoundError as error:
        raise ConfigError(
            f"eval.quantization {quantization.value} needs {PACKAGE}: pip install '.[gpu]', or pip install {PACKAGE}"
        ) from error
    return {"quantization_config": quantization_config(quantization), "device_map": {"": torch.cuda.current_device()}}


def quantization_config(quantization: Quantization) -> Any:
    """transformers' configuration of one kind."""
    from transformers import BitsAndBytesConfig

    if quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNTOUCHED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=UNTOUCHED,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
