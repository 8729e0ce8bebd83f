"""A checkpoint folder to a model and its preprocessor, in one of the precisions of an evaluation: what both of our
engines begin with."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError

from molmo_model.decoding import EvalPrecision, Quantization
from molmo_model.errors import CheckpointError
from molmo_model.eval.answering import Question
from molmo_model.nn.frame_selection import FrameScorer
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.pretrained import require_none_missing
from molmo_model.nn.quantization import quantized_loading
from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor

AUTOCAST = {EvalPrecision.bf16: torch.bfloat16, EvalPrecision.fp16: torch.float16}
"""Weights stay in fp32; these compute in a lower precision through autocast."""
WEIGHTS = {EvalPrecision.bf16_weights: torch.bfloat16}
"""What weights are loaded in, where not in fp32."""
ONE_THREAD_PARAMETERS = 50_000_000
"""Models below this size answer on one CPU thread: a second one gains little alone, and costs ten times and more where
cells of an evaluation run side by side on few cores, because the threads then wait for each other spinning."""


def load_answering(
    folder: str | Path,
    precision: EvalPrecision = EvalPrecision.fp32,
    device: str | torch.device | None = None,
    quantization: Quantization = Quantization.none,
) -> tuple[MolmoForConditionalGeneration, Preprocessor]:
    """The model of a checkpoint folder and its preprocessor, on a GPU if there is one.

    Raises:
        ConfigError: a quantisation that this machine cannot do.
        CheckpointError: the folder is missing, or no checkpoint that can be loaded.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    preprocessor = Preprocessor.from_pretrained(folder)
    fewer_bits = quantized_loading(quantization)
    try:
        model, info = MolmoForConditionalGeneration.from_pretrained(
            folder,
            dtype=WEIGHTS.get(precision, torch.float32),
            local_files_only=True,
            output_loading_info=True,
            **fewer_bits,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the model in {folder} cannot be loaded: {error}") from error
    require_none_missing(str(folder), info["missing_keys"], info)  # transformers would draw them at random
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (scorer := preprocessor.config.video.select_frames_by_query) is not None:
        preprocessor.frame_scorer = FrameScorer(scorer, device)
    if model.num_parameters() < ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
    return model if fewer_bits else model.to(device), preprocessor


def computing(model: MolmoForConditionalGeneration, precision: EvalPrecision) -> AbstractContextManager[object]:
    """What computes in a precision."""
    dtype = AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


def cost_of(preprocessor: Preprocessor, question: Question) -> tuple[int, int]:
    """Tokens and crops of a question with its reference answer: what questions are sorted by. No pixel is looked at."""
    sizes = [(image.width, image.height) for image in question.example.images]
    conversation = question.example.conversations[question.conversation]
    return preprocessor.cost(sizes, [conversation], id=question.example.id, videos=question.example.videos)


def seed_of(prompt: Encoded, seed: int) -> int:
    """Seed of one question's generator: of its tokens and pictures, so that neither its place in a batch nor its
    neighbours change what is drawn, and the same question gets the same answer."""
    content = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for array in (prompt.input_ids, prompt.pixels):
        content.update(array.tobytes())
    return int.from_bytes(content.digest(), "big") >> 1
