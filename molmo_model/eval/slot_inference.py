"""From questions to answers by our own decoder (`nn.slots`): the engine `slots`.

Questions go in by cost, the most expensive first, those about one example side by side; other threads decode and crop
the pictures of the next ones while the device answers. The sources that this module imports are part of the journal's
key, as those of `eval.inference` are for the engine `generate`. `eval.engines` says which questions this engine takes.
"""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any
from warnings import warn

import torch
from torch import nn

from molmo_model.decoding import EvalPrecision, Quantization
from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Answer, Asking, Question
from molmo_model.eval.limits import limited
from molmo_model.eval.loading import AUTOCAST, cost_of, load_answering
from molmo_model.nn.generation import Said, finish_reason
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.slots import More, Prompts, SlotDecoder
from molmo_model.nn.static_cache import cache_bytes
from molmo_model.preprocessing.collator import collate_prompts
from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor

REFILLED_AT_ONCE = {"cuda": 4, "cpu": 2}
"""One of so many parts of the slots is refilled at a time: few large prefills, few slots that wait for one."""
PACKED_TOKENS = 16_384
"""Most tokens of prompts that are read together, if one alone has not more."""
CONTEXT_MULTIPLE = 128
"""Slots are this long or a multiple of it."""
LONGER_BY = 32
"""Tokens by which a prompt may be longer than its question costs with the reference answer."""
MEMORY_SHARE = 0.7
"""Of the GPU's free memory that the cache may take; the rest is for prefills, crops and captured steps."""
MOST_READERS = 8
"""Threads that make prompts."""


class SlotPredictor:
    """A model with its preprocessor, ready to answer.

    Attributes:
        cache: image tokens of the pictures asked about last, so that several questions about one encode it once.
        batch_size: slots, at most; fewer where the GPU's memory ends.
        steps, compiled: see `nn.slots.SlotDecoder`.
    """

    batch_size = 64
    steps: int | None = None
    compiled: bool | None = None

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
        self._decoder: SlotDecoder | None = None
        self._made_for = 0
        if (dtype := AUTOCAST.get(precision)) is not None:
            _cast_once(model, dtype)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        precision: EvalPrecision = EvalPrecision.fp32,
        device: str | torch.device | None = None,
        quantization: Quantization = Quantization.none,
    ) -> "SlotPredictor":
        """The model of a checkpoint folder, on a GPU if there is one.

        Raises:
            ConfigError: quantised weights, which the engine `generate` has.
            CheckpointError: the folder is missing, or no checkpoint that can be loaded.
        """
        if quantization is not Quantization.none:
            raise ConfigError(f"eval.quantization {quantization.value} is answered by eval.engine generate")
        return cls(*load_answering(folder, precision, device), precision)

    @property
    def made(self) -> Mapping[str, Any]:
        """`batch_size` is the number of slots that answered."""
        return {
            "batch_size": self.batch_size if self._decoder is None else self._decoder.slots,
            "device": self.model.device.type,
            "threads": torch.get_num_threads(),
        }

    def answers(
        self, questions: Sequence[Question], read: Callable[[int], Question], asking: Asking
    ) -> Iterator[tuple[int, Answer]]:
        """See `Answering`; an answer comes as soon as it ends."""
        for index, said, prompt_tokens in self.said(questions, read, asking):
            text = self.preprocessor.decode(said.tokens)
            reason = finish_reason(said.tokens, asking.max_new_tokens)
            yield index, Answer(text, reason, len(said.tokens), prompt_tokens)

    def said(
        self, questions: Sequence[Question], read: Callable[[int], Question], asking: Asking, margins: bool = False
    ) -> Iterator[tuple[int, Said, int]]:
        """Answers as tokens, with the numbers of their questions and the lengths of their prompts.

        Args:
            margins: also by how much every token won.

        Raises:
            ConfigError: what only the engine `generate` does.
        """
        if asking.measure or asking.keep_image_tokens != 1:
            raise ConfigError("losses and pruned image tokens are the engine generate's; set eval.engine to generate")
        if not questions:
            return
        files = max(len(question.example.files) for question in questions)
        preprocessor = limited(self.preprocessor, asking, files)
        costs = [cost_of(preprocessor, question) for question in questions]
        longest = max(tokens for tokens, _ in costs) + LONGER_BY + asking.max_new_tokens
        decoder = self._decoder_for(longest, min(self.batch_size, len(questions)), margins)
        batches = _batches(questions, costs, -(-decoder.slots // REFILLED_AT_ONCE.get(self.model.device.type, 2)))
        lengths: dict[int, int] = {}
        gpu = self.model.device.type == "cuda"
        with _Prompting(preprocessor, read, asking.max_new_tokens, self._readers(), gpu) as prompting:
            for index, said in decoder.run(prompting.start(batches, lengths)):
                yield index, said, lengths.pop(index)

    def _decoder_for(self, longest: int, slots: int, margins: bool) -> SlotDecoder:
        """The decoder of the task before where it fits: on a GPU it is compiled and captured."""
        context = -(-longest // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        kept, gpu = self._decoder, self.model.device.type == "cuda"
        fits = kept is not None and context <= kept.context <= 4 * context and self._made_for >= slots
        if gpu and fits and kept is not None and kept.margins == margins:
            return kept
        self._decoder = kept = None
        if gpu:  # its memory first; a compiled decoder refers to itself
            gc.collect()
            torch.cuda.empty_cache()
        self._made_for = self.batch_size if gpu else slots
        slots = self._fitting(self._made_for, context)
        self._decoder = SlotDecoder(
            self.model,
            slots,
            context,
            [self.preprocessor.eos_id],
            autocast=AUTOCAST.get(self.precision),
            steps=self.steps,
            compiled=self.compiled,
            margins=margins,
            cache=self.cache,
        )
        return self._decoder

    def _fitting(self, slots: int, context: int) -> int:
        """As many of the slots as the GPU's memory has room for.

        Raises:
            ConfigError: not one.
        """
        if self.model.device.type != "cuda":
            return slots
        config, dtype = self.model.config.text_config, AUTOCAST.get(self.precision, self.model.dtype)
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        room = int((torch.cuda.mem_get_info()[0] + unused) * MEMORY_SHARE)
        each = cache_bytes(config, 1, context, dtype)
        if (fit := room // each) >= slots:
            return slots
        sizes = f"one of {context} tokens takes {each / 2**20:,.0f} MiB, and {room / 2**20:,.0f} MiB are left for them"
        if fit < 1:
            raise ConfigError(f"no slot fits into the GPU's memory: {sizes}; use a larger GPU or bf16_weights")
        warn(f"{fit} slots instead of {slots}: {sizes}", stacklevel=2)
        return int(fit)

    def _readers(self) -> int:
        """Threads that make prompts: the answering one needs a core of its own, on a CPU most of them."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(MOST_READERS, cores - 1)) if self.model.device.type == "cuda" else 1


class _Prompting:
    """Prompts made by other threads, a few batches ahead."""

    def __init__(
        self,
        preprocessor: Preprocessor,
        read: Callable[[int], Question],
        max_new_tokens: int,
        threads: int,
        pinned: bool = False,
    ) -> None:
        self.pinned = pinned
        self.preprocessor, self.read, self.max_new_tokens = preprocessor, read, max_new_tokens
        self.threads, self.pool, self.reading = threads, ThreadPoolExecutor(threads, "prompts"), Lock()
        self.ahead: deque[Future[Prompts]] = deque()

    def __enter__(self) -> "_Prompting":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, batches: Iterator[list[int]], lengths: dict[int, int]) -> More:
        """What `SlotDecoder.run` is given.

        Args:
            lengths: gets the length of every prompt.
        """

        def more(wait: bool) -> Prompts | None:
            while len(self.ahead) <= self.threads and (batch := next(batches, None)) is not None:
                self.ahead.append(self.pool.submit(self._made, batch))
            if not self.ahead or not (wait or self.ahead[0].done()):
                return None
            prompts = self.ahead.popleft().result()
            counts = prompts.batch["attention_mask"].sum(1).tolist()
            lengths.update(zip(prompts.numbers, counts, strict=True))
            return prompts

        return more

    def _made(self, numbers: list[int]) -> Prompts:
        encoded: list[Encoded] = []
        for number in numbers:
            with self.reading:
                one = self.read(number)
            before = encoded[-1] if encoded and encoded[-1].id == one.example.id else None
            encoded.append(
                self.preprocessor.encode_prompt(one.example, one.conversation, length=one.length, seen=before)
            )
        batch = collate_prompts(encoded, self.preprocessor.config, self.preprocessor.pad_id)
        if self.pinned:
            batch["pixel_values"] = batch["pixel_values"].pin_memory()
        return Prompts(numbers, batch, [self.max_new_tokens] * len(numbers))


def _batches(questions: Sequence[Question], costs: Sequence[tuple[int, int]], rows: int) -> Iterator[list[int]]:
    """Questions that are read together, the most expensive first; those of one example follow each other.

    Args:
        rows: most questions at once.
    """
    examples: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        examples.setdefault(question.example.id, []).append(index)
    groups = [sorted(group, key=lambda index: costs[index], reverse=True) for group in examples.values()]
    groups.sort(key=lambda group: (-costs[group[0]][0], -costs[group[0]][1], group[0]))
    batch: list[int] = []
    tokens = 0
    for index in (index for group in groups for index in group):
        if batch and (len(batch) == rows or tokens + costs[index][0] > PACKED_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += costs[index][0]
    if batch:
        yield batch


def _cast_once(model: MolmoForConditionalGeneration, dtype: torch.dtype) -> None:
    """The language model's matrices in the dtype that autocast would give them again for every token: the same numbers
    from half the memory. Embeddings and norms stay, a head that is tied to the embedding gets its own copy."""
    language_model: nn.Module = model.model.language_model
    for module in [*language_model.get_submodule("layers").modules(), model.lm_head]:
        if type(module) is nn.Linear:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
