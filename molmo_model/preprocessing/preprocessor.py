"""From an example to tokens, positions, labels and crops: the one way, for training, evaluation and generation.

A sequence is a shared prefix (begin of text, then every image's tokens) followed by branches, one per conversation:

    <bos> <im_start> ... <im_end>   question 1  answer 1    question 2  answer 2
    segment  10_000 ...             0 ...                   1 ...
    position 0 ... P-1              P ...                   P ...

Branches see the prefix and themselves, not each other (`segment of query <= segment of key`, and causal), so a tree of
k conversations computes what k separate sequences would, with the image's tokens once. Positions restart per branch.
Labels are already shifted: the label of place i is the token that place i predicts. Only answers have labels, each
ending with the end-of-text token; the last one of a branch is predicted there but not fed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from molmo_model.data.example import Conversation, Example
from molmo_model.errors import CheckpointError, ConfigError, DataError
from molmo_model.preprocessing import prompts
from molmo_model.preprocessing.image import Pixels, decode_image, resize
from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, LossWeighting, PreprocessorConfig
from molmo_model.preprocessing.tiling import Layout, cut_crops, layout
from molmo_model.preprocessing.tokenizer import Vocabulary, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IntArray = npt.NDArray[np.int64]

PREFIX_SEGMENT = 10_000
"""Segment of what all branches see; above the number of any branch."""
IGNORE = -100
"""The label of a place that predicts nothing."""


@dataclass
class Encoded:
    """One example as arrays. S tokens, C crops, T image tokens (`<im_patch>`), W patches per pooling window."""

    input_ids: IntArray
    """[S]"""
    labels: IntArray
    """[S] the token that this place must predict; `IGNORE` where there is none."""
    loss_weights: npt.NDArray[np.float32]
    """[S] factor of the loss at this place; 0 where there is no label."""
    position_ids: IntArray
    """[S]"""
    segment_ids: IntArray
    """[S] `PREFIX_SEGMENT` in the shared prefix, k in branch k."""
    image_ids: IntArray
    """[S] k >= 1 on every token of the k-th image, start, end and column tokens included; 0 on text."""
    pixels: Pixels
    """[C, H, W, 3]"""
    pooling: IntArray
    """[T, W] flat patch number into C * patches per crop; -1 outside the image."""
    image_token_counts: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[images] how many of the T image tokens belong to each image."""
    id: str = ""
    """The example's id, for errors and records."""
    prompt_text: str = ""
    """In prompts for generation: the text of the prompt, without image tokens."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Cost:
    """The most tokens and exactly the crops that an example takes, whatever prompts are drawn."""

    prefix: int
    """Tokens that all conversations share: begin of text and images."""
    branches: tuple[int, ...]
    """Tokens of each conversation with its longest prompts."""
    crops: int

    @property
    def tokens(self) -> int:
        """Tokens with all conversations."""
        return self.prefix + sum(self.branches)


@dataclass(frozen=True)
class _Branch:
    """A conversation as tokens, before it has a place in a sequence."""

    input_ids: IntArray
    labels: IntArray
    weight: float


class Preprocessor:
    """Examples to arrays by one config and one tokenizer. Holds no state that an example changes, apart from caches."""

    def __init__(self, config: PreprocessorConfig, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        self._tiling = config.tiling
        if self.vocabulary.size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has ids up to {self.vocabulary.size - 1}, the language model {config.vocab_size} "
                "embedding rows; give the language model at least as many rows as the tokenizer has tokens"
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Preprocessor":
        """What `save_pretrained` wrote.

        Raises:
            CheckpointError: the folder lacks the config, or it cannot be read.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls(PreprocessorConfig.from_json(raw, str(path)), load_tokenizer(str(folder), own=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `molmo_preprocessor.json` and the tokenizer's files."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(self.config.to_json(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / CONFIG_FILE).write_text(text, encoding="utf-8")

    @property
    def eos_id(self) -> int:
        """The token that ends every answer."""
        return self.vocabulary.eos_id

    @property
    def pad_id(self) -> int:
        """The token that fills up rows of a batch."""
        return self.vocabulary.pad_id

    def encode(
        self,
        example: Example,
        conversations: Sequence[int] | None = None,
        rng: np.random.Generator | None = None,
        max_tokens: int | None = None,
    ) -> Encoded:
        """An example for training.

        Args:
            conversations: which of them, in this order; None is all.
            rng: draws prompts and shuffles the branches; without it the first template of each style and the given
                order. Draws depend on the example's conversations alone, not on its pixels.
            max_tokens: conversations that no longer fit are left out, in the order after shuffling. Images are never
                cut.

        Raises:
            DataError: naming the example, if the images alone or with the shortest conversation are too long, an
                image cannot be decoded, or a message cannot be written.
        """
        layouts = self._layouts(example.id, [(image.width, image.height) for image in example.images])
        prefix_ids, image_ids = self._prefix(layouts)
        branches = self._branches(example.id, self._chosen(example, conversations), rng, len(prefix_ids), max_tokens)
        pixels, pooling = self._pixels(example, layouts)
        prefix, lengths = len(prefix_ids), [len(branch.input_ids) for branch in branches]
        input_ids = np.concatenate([prefix_ids, *(branch.input_ids for branch in branches)])
        labels = np.concatenate([np.full(prefix, IGNORE), *(branch.labels for branch in branches)])
        starts = np.cumsum([prefix, *lengths])[:-1]  # of the branches; the place at which each has position `prefix`
        weights = np.repeat([0.0, *self._weights(branches)], [prefix, *lengths])
        return Encoded(
            input_ids=input_ids,
            labels=labels,
            loss_weights=np.where(labels == IGNORE, 0.0, weights).astype(np.float32),
            position_ids=np.arange(len(input_ids)) - np.repeat([0, *(starts - prefix)], [prefix, *lengths]),
            segment_ids=np.repeat([PREFIX_SEGMENT, *range(len(branches))], [prefix, *lengths]),
            image_ids=np.concatenate([image_ids, np.zeros(sum(lengths), dtype=np.int64)]),
            pixels=pixels,
            pooling=pooling,
            image_token_counts=_token_counts(layouts),
            id=example.id,
        )

    def encode_prompt(self, example: Example, conversation: int = 0, max_tokens: int | None = None) -> Encoded:
        """The sequence that the model continues with its answer to the last question of a conversation.

        Exactly what `encode` without a generator feeds before that answer; earlier answers of the conversation stand
        in it as given. `prompt_text` is its text.

        Raises:
            DataError: as `encode`, or the prompt has more than `max_tokens` tokens.
        """
        layouts = self._layouts(example.id, [(image.width, image.height) for image in example.images])
        prefix_ids, image_ids = self._prefix(layouts)
        (chosen,) = self._chosen(example, [conversation])
        texts = prompts.draw(self._texts(example.id, chosen), None)
        answered = self._branch(texts, chosen.weight).input_ids
        question = answered[: len(answered) - len(self.vocabulary.encode(texts[-1]))]
        input_ids = np.concatenate([prefix_ids, question])
        if max_tokens is not None and len(input_ids) > max_tokens:
            raise DataError(
                f"example {example.id}#{conversation}: the prompt has {len(input_ids)} tokens, more than {max_tokens}"
            )
        pixels, pooling = self._pixels(example, layouts)
        length, prefix = len(input_ids), len(prefix_ids)
        return Encoded(
            input_ids=input_ids,
            labels=np.full(length, IGNORE),
            loss_weights=np.zeros(length, dtype=np.float32),
            position_ids=np.arange(length),
            segment_ids=np.concatenate([np.full(prefix, PREFIX_SEGMENT), np.zeros(length - prefix, dtype=np.int64)]),
            image_ids=np.concatenate([image_ids, np.zeros(length - prefix, dtype=np.int64)]),
            pixels=pixels,
            pooling=pooling,
            image_token_counts=_token_counts(layouts),
            id=example.id,
            prompt_text="".join(texts[:-1]),
        )

    def cost(
        self,
        sizes: Sequence[tuple[int, int]],
        conversations: Sequence[Conversation],
        rng: np.random.Generator | None = None,
        max_tokens: int | None = None,
        id: str = "example",
    ) -> tuple[int, int]:
        """(tokens, crops) of what `encode` would return, without looking at a pixel.

        Args:
            sizes: width and height of every image.
            conversations: those that would be encoded.
            rng, max_tokens: as for `encode`; the generator must be in the same state. `cost_parts` bounds every draw.
            id: what to call the example in errors.

        Raises:
            DataError: as `encode`.
        """
        layouts = self._layouts(id, sizes)
        prefix = self._prefix_length(layouts)
        branches = self._branches(id, conversations, rng, prefix, max_tokens)
        return prefix + sum(len(branch.input_ids) for branch in branches), sum(one.crops for one in layouts)

    def cost_parts(
        self, sizes: Sequence[tuple[int, int]], conversations: Sequence[Conversation], id: str = "example"
    ) -> Cost:
        """The cost by parts, with the longest prompt wherever one is drawn: what packs can be planned from.

        No draw costs more: `encode` of some of the conversations takes at most `prefix` and the sum of their
        `branches`, and exactly that where nothing is drawn.

        Raises:
            DataError: as `encode`.
        """
        layouts = self._layouts(id, sizes)
        branches = tuple(
            sum(max(len(self.vocabulary.encode(text)) for text in texts) for texts in messages) + len(messages) // 2 - 1
            for messages in (self._texts(id, conversation) for conversation in conversations)
        )
        return Cost(self._prefix_length(layouts), branches, sum(one.crops for one in layouts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids: without special and image tokens and without blanks around it."""
        return self.vocabulary.decode([int(i) for i in ids if 0 <= i < self.config.vocab_size]).strip()

    def _chosen(self, example: Example, conversations: Sequence[int] | None) -> list[Conversation]:
        """The conversations at the given places."""
        count = len(example.conversations)
        places = range(count) if conversations is None else conversations
        if not places or not all(0 <= place < count for place in places):
            raise DataError(f"example {example.id}: has {count} conversations, asked for {list(places)}")
        return [example.conversations[place] for place in places]

    def _layouts(self, name: str, sizes: Sequence[tuple[int, int]]) -> list[Layout]:
        """The geometry of every image."""
        if len(sizes) > self.config.max_images:
            raise DataError(f"example {name}: has {len(sizes)} images, more than max_images {self.config.max_images}")
        return [layout(height, width, self._tiling) for width, height in sizes]

    def _prefix(self, layouts: Sequence[Layout]) -> tuple[IntArray, IntArray]:
        """Ids and image numbers [P] of the shared prefix: begin of text, and every image, announced if several."""
        ids, images = [np.array([self.vocabulary.bos_id])], [np.zeros(1, dtype=np.int64)]
        for number, one in enumerate(layouts, start=1):
            if len(layouts) > 1:
                ids.append(self.vocabulary.encode(prompts.image_prefix(number)))
                images.append(np.zeros(len(ids[-1]), dtype=np.int64))
            ids.append(one.tokens + self.config.vocab_size)
            images.append(np.full(len(one.tokens), number))
        return np.concatenate(ids), np.concatenate(images)

    def _prefix_length(self, layouts: Sequence[Layout]) -> int:
        return len(self._prefix(layouts)[0])

    def _texts(self, name: str, conversation: Conversation) -> list[tuple[str, ...]]:
        """Every text that every message may get."""
        try:
            return prompts.choices(conversation, self.config.system_prompt, self.config.message_format)
        except DataError as error:
            raise DataError(f"example {name}: {error}") from error

    def _branches(
        self,
        name: str,
        conversations: Sequence[Conversation],
        rng: np.random.Generator | None,
        prefix: int,
        max_tokens: int | None,
    ) -> list[_Branch]:
        """The conversations that fit, in the order of the sequence."""
        order = list(range(len(conversations))) if rng is None else rng.permutation(len(conversations)).tolist()
        if max_tokens is not None and prefix > max_tokens:
            raise DataError(f"example {name}: its images take {prefix} tokens, more than {max_tokens}")
        room = float("inf") if max_tokens is None else max_tokens - prefix
        kept, lengths = [], []
        for place in order:
            texts = prompts.draw(self._texts(name, conversations[place]), rng)
            branch = self._branch(texts, conversations[place].weight)
            lengths.append(len(branch.input_ids))
            if lengths[-1] <= room:
                kept.append(branch)
                room -= lengths[-1]
        if not kept and lengths:
            raise DataError(
                f"example {name}: its images take {prefix} tokens and its shortest conversation {min(lengths)}, "
                f"together more than {max_tokens}"
            )
        return kept

    def _weights(self, branches: Sequence[_Branch]) -> list[float]:
        """The factor of the loss of each branch that is in the sequence."""
        share = 1 / sqrt(len(branches)) if self.config.loss_weighting is LossWeighting.root_subsegments else 1.0
        return [branch.weight * share for branch in branches]

    def _branch(self, texts: Sequence[str], weight: float) -> _Branch:
        """A conversation as tokens. Labels are shifted: the last token of a question predicts the first of its answer,
        and the last of an answer predicts the end of text, which is fed only where another question follows."""
        end = np.array([self.eos_id])
        ids: list[IntArray] = []
        targets: list[IntArray] = []
        for turn, text in enumerate(texts):
            tokens = self.vocabulary.encode(text)
            ids += [tokens, end] if turn % 2 else [tokens]
            targets += [tokens, end] if turn % 2 else [np.full(len(tokens), IGNORE)]
        return _Branch(np.concatenate(ids)[:-1], np.concatenate(targets)[1:], weight)

    def _pixels(self, example: Example, layouts: Sequence[Layout]) -> tuple[Pixels, IntArray]:
        """Crops [C, H, W, 3] and pooling windows [T, W] of all images of an example."""
        size, patches = self.config.image_size, self._tiling.crop_patches**2
        pixels = np.empty((sum(one.crops for one in layouts), size, size, 3), dtype=np.uint8)
        pooling, start = [], 0
        for number, (image, one) in enumerate(zip(example.images, layouts, strict=True), start=1):
            name = f"example {example.id}, image {number}"
            picture = decode_image(image.data, name=name, max_pixels=image.width * image.height)
            if picture.shape[:2] != (image.height, image.width):
                raise DataError(
                    f"{name}: has {picture.shape[1]} x {picture.shape[0]} pixels, but is recorded as "
                    f"{image.width} x {image.height}; build the shards again"
                )
            end = start + one.crops
            self._fill_crops(pixels[start:end], picture, one)
            pooling.append(np.where(one.pooling >= 0, one.pooling + start * patches, one.pooling))
            start = end
        if not pooling:
            pooling.append(np.zeros((0, self.config.pooling_size[0] * self.config.pooling_size[1]), dtype=np.int64))
        return pixels, np.concatenate(pooling)

    def _fill_crops(self, crops: Pixels, picture: Pixels, one: Layout) -> None:
        """Writes the global crop, then the high-resolution ones."""
        method, size = self.config.resize, self.config.image_size
        if self._tiling.low:
            crops[0] = resize(picture, size, size, method)
        if self._tiling.high:
            cut_crops(resize(picture, *one.canvas, method), one.tiling, self._tiling, crops[int(self._tiling.low) :])


def _token_counts(layouts: Sequence[Layout]) -> IntArray:
    return np.array([len(one.pooling) for one in layouts], dtype=np.int64)
