"""Where a training's batches come from: the plan of its mixture, read by the loader, encoded by the preprocessor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molmo_model.config import TrainConfig
from molmo_model.data.example import Example
from molmo_model.data.loader import Loader, generator
from molmo_model.data.mixture import Draw
from molmo_model.data.plan import Plan
from molmo_model.data.range_cache import RangeCache
from molmo_model.nn.frame_selection import FrameScorer
from molmo_model.preprocessing.collator import collate
from molmo_model.preprocessing.preprocessor import Encoded, Preprocessor
from molmo_model.train.distributed import Ranks

if TYPE_CHECKING:
    import torch

FLEX_BLOCK = 128
"""Tokens per side of a block of FlexAttention."""
SHARDS = "shards/"
"""Prefix of the inputs of a training that are shards; the dataset's name follows."""


@dataclass(frozen=True)
class Encoder:
    """Encodes one draw of the plan; a class, so that worker processes can be handed it."""

    preprocessor: Preprocessor

    def __call__(self, example: Example, draw: Draw, key: int) -> Encoded:
        return self.preprocessor.encode(example, draw.conversations, generator(key), weight=draw.weight)


@dataclass(frozen=True)
class Collator:
    """Packs to tensors. Rows have `sequence_length` tokens, or where that is None as many as the longest of them."""

    preprocessor: Preprocessor
    sequence_length: int | None

    def __call__(self, packs: list[list[Encoded]]) -> "dict[str, torch.Tensor]":
        return collate(packs, self.sequence_length, self.preprocessor.config, self.preprocessor.pad_id)


def build_loader(
    inputs: Mapping[str, str],
    start: Path,
    train: TrainConfig,
    ranks: Ranks,
    workers: int,
    cache: RangeCache | None = None,
) -> Loader:
    """The loader of one rank.

    Args:
        inputs: paths of `mixture` and of `shards/<dataset>`; these may be URLs.
        start: checkpoint folder with the preprocessor.
        cache: keeps what comes from shards in a bucket.
    """
    shards = {name.removeprefix(SHARDS): path for name, path in inputs.items() if name.startswith(SHARDS)}
    preprocessor = Preprocessor.from_pretrained(start)
    if (scorer := preprocessor.config.video.select_frames_by_query) is not None:
        preprocessor.frame_scorer = FrameScorer(scorer)  # each worker loads it for itself
    # a GPU wants equal shapes in every step, in whole blocks of FlexAttention; a CPU no padding
    length = -(-train.sequence_length // FLEX_BLOCK) * FLEX_BLOCK if ranks.device.type == "cuda" else None
    return Loader(
        Plan.load(inputs["mixture"], shards, train, cache),
        Encoder(preprocessor),
        Collator(preprocessor, length),
        rank=ranks.rank,
        world=ranks.world,
        packs_per_step=train.packs_per_step,
        packs_per_microbatch=train.packs_per_microbatch,
        workers=workers,
        pin_memory=ranks.device.type == "cuda",
        skip_bad=train.bad_examples > 0,
    )
