"""From questions to answers: a checkpoint folder, its own preprocessor, left-padded generation in batches.

Kept apart from tasks, journal and metrics: the sources that this module imports are exactly those whose change can
change an answer, and their digest is part of the journal's key.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any

import torch

from molmo_model.decoding import DecodingConfig, EvalPrecision, Quantization
from molmo_model.eval.answering import Answer, Asking, Question
from molmo_model.eval.limits import limited
from molmo_model.eval.loading import computing, cost_of, load_answering, seed_of
from molmo_model.eval.measuring import measure
from molmo_model.nn.generation import finish_reason, generate
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.preprocessing.collator import collate_prompts
from molmo_model.preprocessing.preprocessor import Preprocessor


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
        return cls(*load_answering(folder, precision, device, quantization), precision)

    def cost(self, question: Question) -> tuple[int, int]:
        """Tokens and crops of a question: what batches are sorted by. No pixel is looked at."""
        return cost_of(self.preprocessor, question)

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
        shown = self.limited(questions, asking)
        for batch in batches([shown.cost(question) for question in questions], self.batch_size):
            asked = [read(index) for index in batch]
            if asking.measure:
                found = shown.measure(asked)
            else:
                found = shown.answer(asked, asking.max_new_tokens, asking.decoding, asking.keep_image_tokens)
            yield from zip(batch, found, strict=True)

    def limited(self, questions: Sequence[Question], asking: Asking) -> "Predictor":
        """This model and its cache, with the crops and frames of a task; see `limits.limited`."""
        files = max((len(question.example.files) for question in questions), default=0)
        preprocessor = limited(self.preprocessor, asking, files)
        if preprocessor is self.preprocessor:
            return self
        other = copy(self)
        other.preprocessor = preprocessor
        return other

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
                seeds=[seed_of(prompt, decoding.seed) for prompt in prompts] if decoding.do_sample else None,
                cache=self.cache,
                keep_image_tokens=keep_image_tokens,
            )
        return [
            Answer(preprocessor.decode(ids), finish_reason(ids, max_new_tokens), len(ids), len(prompt))
            for ids, prompt in zip(answers, prompts, strict=True)
        ]

    def measure(self, questions: Sequence[Question]) -> list[Answer]:
        """The loss on the reference answers of one batch, in order: all answers of each conversation, as training
        learns them."""
        encoded = [self.preprocessor.encode(one.example, [one.conversation]) for one in questions]
        with self.autocast():
            return measure(self.model, encoded, self.preprocessor)

    def autocast(self) -> AbstractContextManager[object]:
        """What computes in the predictor's precision."""
        return computing(self.model, self.precision)


def batches(costs: Sequence[tuple[int, int]], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar cost, the most expensive first: little padding, and too large a batch fails at
    once rather than at the end."""
    order = sorted(range(len(costs)), key=lambda index: (*(-part for part in costs[index]), index))
    for start in range(0, len(order), size):
        yield order[start : start + size]
