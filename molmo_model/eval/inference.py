"""From questions to answers: a checkpoint folder, its own preprocessor, left-padded generation in batches.

Kept apart from tasks, journal and metrics: the sources that this module imports are exactly those whose change can
change an answer, and their digest is part of the journal's key.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from molmo_model.config import DecodingConfig, EvalPrecision, Quantization
from molmo_model.errors import CheckpointError
from molmo_model.eval.answering import Answer, Asking, Question
from molmo_model.nn.frame_selection import FrameScorer
from molmo_model.nn.generation import finish_reason, generate
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.pretrained import require_none_missing
from molmo_model.nn.quantization import quantized_loading
from molmo_model.preprocessing.collator import collate_prompts
from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor

AUTOCAST = {EvalPrecision.bf16: torch.bfloat16, EvalPrecision.fp16: torch.float16}
"""Weights stay in fp32; these compute in a lower precision through autocast."""
WEIGHTS = {EvalPrecision.bf16_weights: torch.bfloat16}
"""What weights are loaded in, where not in fp32."""
ONE_THREAD_PARAMETERS = 50_000_000
"""Models below this size answer on one CPU thread: a second one gains little alone, and costs ten times and more where
cells of an evaluation run side by side on few cores, because the threads then wait for each other spinning."""


class Predictor:
    """A model with its preprocessor, ready to answer.

    Attributes:
        cache: image tokens of the pictures asked about last, so that several questions about one encode it once.
        batch_size: questions of one batch.
    """

    batch_size = 64

    def __init__(
        self,
        model: MolmoForConditionalGeneration,
        preprocessor: Preprocessor,
        precision: EvalPrecision = EvalPrecision.fp32,
    ) -> None:
        self.model = model.eval()
        self.preprocessor = preprocessor
        self.precision = precision
        self.cache = ImageTokenCache()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        precision: EvalPrecision = EvalPrecision.fp32,
        device: str | torch.device | None = None,
        quantization: Quantization = Quantization.none,
    ) -> "Predictor":
        """The model of a checkpoint folder, on a GPU if there is one.

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
        return cls(model if fewer_bits else model.to(device), preprocessor, precision)

    def cost(self, question: Question) -> tuple[int, int]:
        """Tokens and crops of a question: what batches are sorted by. No pixel is looked at."""
        sizes = [(image.width, image.height) for image in question.example.images]
        conversation = question.example.conversations[question.conversation]
        videos = question.example.videos
        return self.preprocessor.cost(sizes, [conversation], id=question.example.id, videos=videos)

    @property
    def made(self) -> Mapping[str, Any]:
        return {
            "batch_size": self.batch_size,
            "device": self.model.device.type,
            "threads": torch.get_num_threads(),
        }

    def answers(
        self, questions: Sequence[Question], read: Callable[[int], Question], asking: Asking
    ) -> Iterator[tuple[int, Answer]]:
        """Batches of similar cost, the most expensive first; see `Answering`."""
        for batch in batches([self.cost(question) for question in questions], self.batch_size):
            asked = [read(index) for index in batch]
            found = self.answer(asked, asking.max_new_tokens, asking.decoding, asking.keep_image_tokens)
            yield from zip(batch, found, strict=True)

    def answer(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        decoding: DecodingConfig | None = None,
        keep_image_tokens: float = 1.0,
    ) -> list[Answer]:
        """The answers of one batch, in order; greedy without `decoding`.

        Args:
            keep_image_tokens: share of each image's tokens that the language model sees.
        """
        decoding = decoding or DecodingConfig()
        preprocessor = self.preprocessor
        prompts = [preprocessor.encode_prompt(one.example, one.conversation, length=one.length) for one in questions]
        batch = collate_prompts(prompts, preprocessor.config, preprocessor.pad_id)
        with self.autocast():
            answers = generate(
                self.model,
                batch,
                max_new_tokens,
                [preprocessor.eos_id],
                decoding,
                seeds=[_seed(prompt, decoding.seed) for prompt in prompts] if decoding.do_sample else None,
                cache=self.cache,
                keep_image_tokens=keep_image_tokens,
            )
        return [
            Answer(preprocessor.decode(ids), finish_reason(ids, max_new_tokens), len(ids), len(prompt))
            for ids, prompt in zip(answers, prompts, strict=True)
        ]

    def autocast(self) -> AbstractContextManager[object]:
        """What computes in the predictor's precision."""
        dtype = AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.model.device.type, dtype=dtype)


def _seed(prompt: Encoded, seed: int) -> int:
    """Seed of one question's generator: of its tokens and pictures, so that neither its place in a batch nor its
    neighbours change what is drawn, and the same question gets the same answer."""
    content = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for array in (prompt.input_ids, prompt.pixels):
        content.update(array.tobytes())
    return int.from_bytes(content.digest(), "big") >> 1


def batches(costs: Sequence[tuple[int, int]], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar cost, the most expensive first: little padding, and too large a batch fails at
    once rather than at the end."""
    order = sorted(range(len(costs)), key=lambda index: (*(-part for part in costs[index]), index))
    for start in range(0, len(order), size):
        yield order[start : start + size]
