"""Small examples and plans that several tests of this room use."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image as PilImage

from molmo_model.config import MixtureEntry, PackingMethod, TrainConfig
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.data.mixture import ExampleCost, Mixture, resolve
from molmo_model.data.plan import Plan
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards

STYLES = ("caption", "qa", "count")


def picture(number: int, width: int = 9, height: int = 7) -> Image:
    buffer = io.BytesIO()
    colour = (number % 256, number // 256 % 256, number // 65536 % 256)
    PilImage.new("RGB", (width, height), colour).save(buffer, "PNG")
    return Image(buffer.getvalue(), width, height, "PNG")


def talk(style: str, answer: str) -> Conversation:
    return Conversation(style, (Message("user", "what?"), Message("assistant", answer)))


def example(number: int, name: str = "e", images: int = 1, text: int | None = None) -> Example:
    """Number decides everything: pictures, 1 to 4 conversations of three styles, answers of 1 to 20 letters."""
    size = number % 20 + 1 if text is None else text
    talks = tuple(talk(STYLES[(number + k) % 3], "a" * (size + k)) for k in range(number % 4 + 1))
    pictures = tuple(picture(1000 * number + k, 5 + number % 30) for k in range(images))
    return Example(f"{name}-{number}", pictures, talks, {"number": number})


def rows(numbers: Iterable[int], name: str = "e") -> list[tuple[str, Example]]:
    """Every tenth number is held out."""
    return [("train" if number % 10 else "eval", example(number, name)) for number in numbers]


def cost_of(facts: Example) -> ExampleCost:
    """A stand-in for the preprocessor that depends on sizes and texts alone."""
    tokens = tuple(len(talk.messages[1].text or "") + 5 for talk in facts.conversations)
    return ExampleCost(3 + sum(image.width for image in facts.images), 2 * len(facts.images), tokens)


def train_config(**changes: int) -> TrainConfig:
    numbers = {
        "steps": 10,
        "packs_per_step": 5,
        "sequence_length": 160,
        "crops_per_pack": 12,
        "packing_window": 32,
        "packing": PackingMethod.best_fit,
    }
    return TrainConfig(**{**numbers, "save_every": 5, **changes})


def make_plan(folder: Path, sizes: Sequence[int] = (40, 25), seed: int = 7, **changes: int) -> Plan:
    """Two datasets `d0`, `d1` and three entries: all of d0, two styles of d1, and one conversation each of d0."""
    readers = {}
    for number, size in enumerate(sizes):
        path = folder / f"d{number}"
        if not path.exists():
            write_shards(rows(range(100 * number, 100 * number + size), f"d{number}"), path, 20_000)
        readers[f"d{number}"] = ShardReader(path)
    return Plan.of(make_mixture(readers, seed), readers, train_config(**changes))


def make_mixture(readers: dict[str, ShardReader], seed: int = 7) -> Mixture:
    entries = {
        "whole": MixtureEntry(dataset="d0", rate=0.5),
        "styled": MixtureEntry(dataset="d1", rate=0.3, styles=["qa", "count"]),
        "single": MixtureEntry(dataset="d0", rate=0.2, max_conversations=1),
    }
    return resolve(entries, seed, readers, cost_of)
