"""Answers in batches through transformers' `generate`: greedy, sampled or by beam search, as a `DecodingConfig` says.

Images are encoded once, in front of the prefill, for all beams, and with an `ImageTokenCache` for all questions about
them; rows are padded on the left; an image's tokens see each other in both directions there, as in training.

A batch answers as its rows would alone. In floating point this holds as far as the numbers do: a row of a batch and
the same row alone are computed with other shapes and may differ in the last bits, so where the two best tokens are
nearly equal the other one may win. `greedy` records by how much each token won, `differences` lists where answers part.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from molmo_model.decoding import DecodingConfig
from molmo_model.errors import ConfigError
from molmo_model.nn.he_molmo import generation_inputs
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.token_pruning import ENCODED, prune_image_tokens

NEAR_TIE = 1e-3
"""Logits: where the best token wins by less, another order of summing floats may let the second best win."""


@dataclass(frozen=True)
class Said:
    """A greedy answer and how sure it was."""

    tokens: list[int]
    """Without the end token."""
    margins: list[float] = field(default_factory=list)
    """Logit of the best token minus that of the second best, for every token and the end token if it was said."""


@dataclass(frozen=True)
class Difference:
    """The first place where two answers to one question part."""

    row: int
    place: int
    """Number of the token in the answer, from 0."""
    tokens: tuple[int | None, int | None]
    """What either answer has there; None where it has ended."""
    margin: float
    """The smaller of the two margins there."""

    @property
    def near_tie(self) -> bool:
        return self.margin <= NEAR_TIE


def generate(
    model: MolmoForConditionalGeneration,
    batch: Mapping[str, Any],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    decoding: DecodingConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    cache: ImageTokenCache | None = None,
    keep_image_tokens: float = 1.0,
) -> list[list[int]]:
    """The answer of every row, without the end token: shorter than `max_new_tokens` exactly if it was said.

    Args:
        batch: `input_ids` and `attention_mask` [B, S], padded on the left; `image_ids` [B, S]; `pixel_values`,
            `pooling` and `image_token_counts` (tokens of each image, in the order of the rows), and whatever else
            `get_image_features` takes. All but the first three may be empty or left out where no row has an image.
        eos_token_ids: tokens that end an answer.
        decoding: None is greedy.
        seeds: one per row, with `do_sample`: each row draws from a generator of its own, whatever stands beside it.
        cache: image tokens of earlier batches; only for one model in one precision.
        keep_image_tokens: share of each image's tokens that the language model sees; see `nn.token_pruning`.

    Raises:
        ConfigError: sampling without seeds, or together with beams.
    """
    decoding = decoding or DecodingConfig()
    with _answering(model):
        batch = _with_images(model, batch, cache, keep_image_tokens, eos_token_ids[0])
        length = int(batch["input_ids"].shape[1])
        processors = _processors(decoding, length, seeds)
        sequences = _run(model, batch, _config(decoding, max_new_tokens, eos_token_ids), processors)
    return [_until(row, set(eos_token_ids)) for row in sequences[:, length:].tolist()]


def greedy(
    model: MolmoForConditionalGeneration,
    batch: Mapping[str, Any],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> list[Said]:
    """Greedy answers with the margin of every token; see `generate`."""
    length, margins = int(batch["input_ids"].shape[1]), _Margins()
    config = _config(DecodingConfig(), max_new_tokens, eos_token_ids)
    with _answering(model):
        batch = _with_images(model, batch, None, 1.0, eos_token_ids[0])
        sequences = _run(model, batch, config, LogitsProcessorList([margins]))
    answers = [_until(row, set(eos_token_ids)) for row in sequences[:, length:].tolist()]
    found = torch.stack(margins.steps, dim=1).tolist()
    return [Said(tokens, row[: len(tokens) + 1]) for tokens, row in zip(answers, found, strict=True)]


def differences(one: Sequence[Said], other: Sequence[Said]) -> list[Difference]:
    """Where answers to the same questions part: what must be near-ties between two batchings of one fp32 model, and
    what a lower precision costs between two precisions."""
    found = []
    for row, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.tokens == b.tokens:
            continue
        pairs = enumerate(zip([*a.tokens, None], [*b.tokens, None], strict=False))
        place, tokens = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        found.append(Difference(row, place, tokens, min(a.margins[place], b.margins[place])))
    return found


def finish_reason(tokens: Sequence[int], max_new_tokens: int) -> str:
    """`stop` if the model ended its answer, `length` if it was cut off."""
    return "stop" if len(tokens) < max_new_tokens else "length"


@contextmanager
def _answering(model: MolmoForConditionalGeneration) -> Iterator[None]:
    """No gradients, no dropout; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _with_images(
    model: MolmoForConditionalGeneration,
    batch: Mapping[str, Any],
    cache: ImageTokenCache | None,
    keep: float,
    pad_id: int,
) -> Mapping[str, Any]:
    """The batch with image tokens instead of crops: those that a HeMolmo selects, that a cache knows, or the share that
    is asked for. Otherwise as it is, and transformers encodes the images."""
    if not len(batch.get("pooling", ())):
        return batch
    if model.config.selector is not None and keep == 1:
        moved = {name: value.to(model.device) for name, value in batch.items()}
        return moved | generation_inputs(model, moved)[0]
    tokens = None if cache is None else cache.encode(model, batch)
    if keep != 1:
        return prune_image_tokens(model, batch, keep, pad_id=pad_id, tokens=tokens)
    if tokens is None:
        return batch
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=tuple(tokens))}
    return {name: value for name, value in batch.items() if name not in ENCODED} | {"mm_encoder_outputs": encoded}


def _run(
    model: MolmoForConditionalGeneration,
    batch: Mapping[str, Any],
    config: GenerationConfig,
    processors: LogitsProcessorList,
) -> Tensor:
    """Prompts and answers [B, S + new]."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    inputs["mm_token_type_ids"] = batch["image_ids"].to(model.device)
    for name in ("position_ids", "value_gate"):  # selected tokens keep the positions they had among all
        if name in batch:
            inputs[name] = batch[name].to(model.device)
    if "mm_encoder_outputs" in batch:
        inputs["mm_encoder_outputs"] = {  # copies: beams multiply the tokens in place
            name: BaseModelOutputWithPooling(pooler_output=tuple(one.pooler_output))
            for name, one in batch["mm_encoder_outputs"].items()
        }
    elif len(batch.get("pooling", ())):
        names = inspect.signature(model.model.get_image_features).parameters
        inputs |= {name: batch[name].to(model.device) for name in names if name in batch}
    sequences: Tensor = model.generate(**inputs, generation_config=config, logits_processor=processors)
    return sequences


def _config(decoding: DecodingConfig, max_new_tokens: int, eos_token_ids: Sequence[int]) -> GenerationConfig:
    """Beams, lengths and repetition; sampling is done by `_processors`, so that `do_sample` is off here."""
    beams: dict[str, Any] = {"length_penalty": decoding.length_penalty} if decoding.num_beams > 1 else {}
    return GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        max_new_tokens=max_new_tokens,
        min_new_tokens=decoding.min_new_tokens or None,
        # transformers leaves out padding, and ids beyond the head, which image tokens are
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=list(eos_token_ids),
        pad_token_id=eos_token_ids[0],
        use_cache=True,
        **beams,
    )


def _processors(decoding: DecodingConfig, prompt_length: int, seeds: Sequence[int] | None) -> LogitsProcessorList:
    """What stands between logits and the choice of a token, in the order that transformers has."""
    chain = LogitsProcessorList()
    if decoding.no_repeat_ngram_size:
        chain.append(_AnswerNGrams(decoding.no_repeat_ngram_size, prompt_length))
    if not decoding.do_sample:
        return chain
    if decoding.num_beams > 1:
        raise ConfigError(f"decoding.do_sample with num_beams {decoding.num_beams}: sampling has one beam; choose one")
    if seeds is None:
        raise ConfigError("decoding.do_sample needs a seed for every row")
    if decoding.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        chain.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        chain.append(TopPLogitsWarper(decoding.top_p))
    chain.append(_Draw(seeds))
    return chain


class _AnswerNGrams(LogitsProcessor):
    """No n-gram twice within an answer. transformers' own looks at the prompt too, where padding would count."""

    def __init__(self, size: int, prompt_length: int) -> None:
        self.inner, self.start = NoRepeatNGramLogitsProcessor(size), prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = self.inner(input_ids[:, self.start :], scores)
        return found


class _Draw(LogitsProcessor):
    """Leaves the one token of each row that the row's own generator draws, so that the argmax is a sample.

    transformers' `do_sample` draws from one generator for the whole batch, and an answer would depend on its
    neighbours. Here every row takes one uniform number per step and reads off its own cumulative distribution.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = [torch.rand((), generator=one, dtype=torch.float64) for one in self.generators]
        # just below 1, so that rounding in the sum cannot push the place beyond the last token
        uniform = torch.stack(drawn).clamp(max=1 - 2**-40).to(scores.device)
        cumulative = scores.double().softmax(-1).cumsum(-1)
        place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, place, 0.0)


class _Margins(LogitsProcessor):
    """Changes nothing; keeps best minus second best of every row and step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(2, dim=-1).values
        self.steps.append((best[:, 0] - best[:, 1]).float().cpu())
        return scores


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[:index]
    return tokens
