"""Tiny models and hand-made packs for the tests of the model's room."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molmo_model.model_config import ConnectorConfig, LanguageConfig, ModelConfig, PreprocessingConfig, VisionConfig
from molmo_model.nn.build import build_config
from molmo_model.nn.molmo import MolmoForConditionalGeneration

VOCAB = 60
IM_START, IM_END, IM_PATCH, IM_COL = range(VOCAB, VOCAB + 4)
PREFIX = 10_000
PATCHES = 16
"""Patches of one crop of the tiny models: 32 / 8 = 4 per side."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of exactly `VOCAB` ids, the last of which ends a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {chr(33 + i): i for i in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_params(tokenizer_dir: Path) -> Callable[..., ModelConfig]:
    """`make_params(encoder=..., family=..., language={...}, ...)`: the params of a tiny model."""

    def make(
        encoder: str = "siglip",
        family: str = "qwen2",
        vision: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
    ) -> ModelConfig:
        sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_layers": 4}
        text = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_key_value_heads": 2}
        mlp = {**text, **(language or {})}["intermediate_size"] or 64
        hidden = {"projector_hidden_size": mlp // 2}  # as in the demo's model
        return ModelConfig(
            vision=VisionConfig(
                **{"encoder": encoder, "num_heads": 4, "feature_layers": [-1, -3], **sizes, **(vision or {})}
            ),
            connector=ConnectorConfig(**{"window_position_embedding": True, **hidden, **(connector or {})}),
            language=LanguageConfig(**{"family": family, **text, **(language or {})}),
            preprocessing=PreprocessingConfig(max_crops=2, overlap_margins=[1, 1]),
            tokenizer=str(tokenizer_dir),
        )

    return make


def sliding_model(params: ModelConfig, window: int, seed: int = 1) -> MolmoForConditionalGeneration:
    """A model whose last text layer sees `window` positions back."""
    config = build_config(params)
    text = config.text_config
    text.use_sliding_window, text.sliding_window = True, window
    text.layer_types = ["full_attention"] * (text.num_hidden_layers - 1) + ["sliding_attention"]
    torch.manual_seed(seed)
    return MolmoForConditionalGeneration(config)


@dataclass
class Conversation:
    """One example as a message tree: shared prefix (with images), then branches."""

    image_tokens: list[int]
    """Image tokens of each image."""
    text: int
    branches: list[int]


@dataclass
class Sequence:
    """Token arrays of one row, as lists."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def add(self, token: int, label: int, weight: float, position: int, example: int, segment: int, image: int) -> None:
        values = (token, label, weight, position, example, segment, image)
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            getattr(self, name).append(value)


def lay_out(tree: Conversation, rng: torch.Generator) -> Sequence:
    """The tokens of one message tree, with random text; every branch answers with all of its tokens but the last."""

    def draw() -> int:
        return int(torch.randint(0, VOCAB - 1, (), generator=rng))

    row = Sequence()
    for number, count in enumerate(tree.image_tokens, start=1):
        for token in (IM_START, *[IM_PATCH] * count, IM_COL, IM_END):
            row.add(token, -100, 0.0, len(row.ids), 0, PREFIX, number)
    for _ in range(tree.text):
        row.add(draw(), -100, 0.0, len(row.ids), 0, PREFIX, 0)
    prefix = len(row.ids)
    for branch, length in enumerate(tree.branches):
        for step in range(length):
            weight = float(torch.rand((), generator=rng)) + 0.1
            row.add(draw(), draw() if step < length - 1 else -100, weight, prefix + step, 0, branch, 0)
    return row


def split_branches(row: Sequence) -> list[Sequence]:
    """The separate conversations of a message tree: the prefix with one branch each."""
    out = []
    for branch in sorted({segment for segment in row.segments if segment != PREFIX}):
        keep = [i for i, segment in enumerate(row.segments) if segment in (PREFIX, branch)]
        out.append(Sequence(**{name: [getattr(row, name)[i] for i in keep] for name in row.__dataclass_fields__}))
    return out


def pack(rows: list[Sequence], length: int) -> Sequence:
    """Several examples and padding in one row."""
    packed = Sequence()
    images = 0
    for number, row in enumerate(rows):
        for i in range(len(row.ids)):
            image = row.images[i] + images if row.images[i] else 0
            packed.add(row.ids[i], row.labels[i], row.weights[i], row.positions[i], number, row.segments[i], image)
        images += max(row.images, default=0)
    while len(packed.ids) < length:
        packed.add(0, -100, 0.0, 0, -1, 0, 0)
    assert len(packed.ids) == length
    return packed


def tensors(rows: list[Sequence]) -> dict[str, Tensor]:
    """Rows of one length as a batch, without pixels."""
    names = {
        "input_ids": "ids",
        "labels": "labels",
        "loss_weights": "weights",
        "position_ids": "positions",
        "example_ids": "examples",
        "segment_ids": "segments",
        "image_ids": "images",
    }
    return {name: torch.tensor([getattr(row, source) for row in rows]) for name, source in names.items()}


def crops_and_pooling(token_counts: list[int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random crop per image and windows of four of its patches, some with holes."""
    pixels = torch.randint(0, 256, (max(len(token_counts), 1), 32, 32, 3), dtype=torch.uint8, generator=rng)
    windows = []
    for crop, count in enumerate(token_counts):
        window = torch.randint(0, PATCHES, (count, 4), generator=rng) + crop * PATCHES
        holes = torch.rand(count, 4, generator=rng) < 0.2
        holes[:, 0] = False
        windows.append(torch.where(holes, -1, window))
    return pixels, torch.cat(windows) if windows else torch.zeros(0, 4, dtype=torch.long)


def random_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Noise on all parameters, norms and biases too, so that no term of a parity test is zero or one."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.05)
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two packs with images, branches and padding."""
    rng = torch.Generator().manual_seed(5)
    trees = [
        [Conversation([3], 2, [4, 3]), Conversation([], 3, [5])],
        [Conversation([2, 4], 1, [3]), Conversation([1], 0, [2, 2, 3])],
    ]
    rows = [pack([lay_out(tree, rng) for tree in row], 40) for row in trees]
    pixels, pooling = crops_and_pooling([3, 2, 4, 1], rng)
    return {**tensors(rows), "pixel_values": pixels, "pooling": pooling}
