"""How answers are computed: in which numbers, and by which decoding.

Apart from the other params on purpose: the sources that an engine imports are part of every answer's key, so an edit of
the other params' classes or of a table of presets must not be among them.
"""

from dataclasses import dataclass
from enum import StrEnum


class EvalPrecision(StrEnum):
    """In what numbers answers are computed; part of every answer's identity."""

    fp32 = "fp32"
    bf16 = "bf16"
    """fp32 weights, computation in bf16 where autocast does it."""
    fp16 = "fp16"
    """As `bf16`, in fp16."""
    bf16_weights = "bf16_weights"
    """Weights and computation in bf16: half the memory, the fast way on a GPU. Not the same answers as `bf16`."""


class Quantization(StrEnum):
    """Weights of the language model in fewer bits, through transformers; needs a GPU."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


@dataclass
class DecodingConfig:
    """How answers are generated; transformers' `GenerationConfig` has the formulas. The default is greedy."""

    num_beams: int = 1
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power."""
    do_sample: bool = False
    seed: int = 0
    """Of sampling; every question draws from a generator of its own."""
    temperature: float = 1.0
    top_k: int = 0
    """Sample among the k best tokens; 0 is all."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
