"""From an example to tokens, positions, labels and crops: the one way, for training, evaluation and generation.

A sequence is a shared prefix (begin of text, then every image's tokens) followed by branches, one per conversation:

    <bos> <im_start> ... <im_end>   question 1  answer 1    question 2  answer 2
    segment  10_000 ...             0 ...                   1 ...
    position 0 ... P-1              P ...                   P ...

Branches see the prefix and themselves, not each other (`segment of query <= segment of key`, and causal), so a tree of
k conversations computes what k separate sequences would, with the image's tokens once. Positions restart per branch.
Labels are already shifted: the label of place i is the token that place i predicts. Only answers have labels, each
ending with the token that ends an answer; the last one of a branch is predicted there but not fed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from molmo_model.data.example import Conversation, Example, Video
from molmo_model.errors import CheckpointError, ConfigError, DataError
from molmo_model.model_config import LossWeighting
from molmo_model.preprocessing import prompts
from molmo_model.preprocessing.augmentation import Change, apply, moved, pixel_generator, plan_changes, widest
from molmo_model.preprocessing.crops import FloatArray, fill_crops, patch_masks
from molmo_model.preprocessing.films import FrameScorer, decode_film, film_masks, plan_film
from molmo_model.preprocessing.image import Pixels, decode_image
from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig
from molmo_model.preprocessing.selection import ImageSlots, image_slots, slot_tokens
from molmo_model.preprocessing.tiling import Layout, layout
from molmo_model.preprocessing.tokenizer import Vocabulary, load_tokenizer
from molmo_model.preprocessing.video import Film, possible_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IntArray = npt.NDArray[np.int64]

PREFIX_SEGMENT = 10_000
"""Segment of what all branches see; above the number of any branch."""
IGNORE = -100
"""The label of a place that predicts nothing."""
_SHARED = (LossWeighting.root_subsegments, LossWeighting.root_subsegments_root_length)
_BY_LENGTH = (LossWeighting.root_length, LossWeighting.root_subsegments_root_length)


@dataclass
class Encoded:
    """One example as arrays. S tokens, C crops, T pooling windows, W patches of each; a window
    becomes `tokens_per_window` image tokens (`<im_patch>`)."""

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
    """[S] k >= 1 on every token of the k-th image, start, end and column tokens included; 0 on text. A frame of a film
    is an image."""
    pixels: Pixels
    """[C, H, W, 3]"""
    pooling: IntArray
    """[windows, W] flat patch number into C * patches per crop; -1 outside the image. Each window becomes
    `tokens_per_window` of the T tokens."""
    image_token_counts: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[images] how many of the T image tokens belong to each image. With `config.selector_tokens` those are all that
    could be selected, and there are fewer `<im_patch>`."""
    patch_masks: FloatArray | None = None
    """[C, N] share of each patch that is picture; only with `config.patch_masks`."""
    slots: tuple[ImageSlots, ...] = ()
    """Where the selected tokens of each image stand; only with `config.selector_tokens`."""
    crop_frames: IntArray | None = None
    """[C] of a film's frames: the number within its clip, from 0; None where the crops are those of images."""
    crop_videos: IntArray | None = None
    """[C] of a film's frames: the number of the clip within the example, from 0."""
    id: str = ""
    """The example's id, for errors and records."""
    prompt_text: str = ""
    """In prompts for generation: the text of the prompt, without image tokens."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Cost:
    """The most tokens and crops that an example takes, whatever is drawn; exactly those crops unless their number is
    drawn (`augmentation.p_high_res`)."""

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
class _Prefix:
    """The shared beginning of a sequence, P tokens."""

    input_ids: IntArray
    image_ids: IntArray
    position_ids: IntArray
    slots: tuple[ImageSlots, ...] = ()

    @property
    def end(self) -> int:
        """The first position behind it."""
        return int(self.position_ids[-1]) + 1


@dataclass(frozen=True)
class _Branch:
    """A conversation as tokens, before it has a place in a sequence."""

    input_ids: IntArray
    labels: IntArray
    weight: float
    asked: int
    """Tokens of the first question."""


class Preprocessor:
    """Examples to arrays by one config and one tokenizer. Holds no state that an example changes, apart from caches."""

    def __init__(
        self,
        config: PreprocessorConfig,
        tokenizer: "PreTrainedTokenizerFast",
        frame_scorer: FrameScorer | None = None,
    ) -> None:
        self.config = config
        self.frame_scorer = frame_scorer
        """Chooses the high-resolution frames of films, with `config.video.select_frames_by_query`."""
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer, prompts.end_of_answer(config.message_format))
        self._tiling = config.tiling
        self._high_res_tiling = replace(self._tiling, max_crops=config.augmentation.high_res_max_crops)
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
        weight: float = 1.0,
    ) -> Encoded:
        """An example for training.

        Args:
            conversations: which of them, in this order; None is all.
            rng: draws prompts, shuffles the branches and augments; without it the first template of each style, the
                given order and the pixels as they are. Draws depend on the example's sizes and conversations alone, not
                on its pixels.
            max_tokens: conversations that no longer fit are left out, in the order after shuffling. Images are never
                cut off.
            weight: factor on the loss of all conversations, besides their own: that of the mixture's entry.

        Raises:
            DataError: naming the example, if the images alone or with the shortest conversation are too long, an
                image cannot be decoded, or a message cannot be written.
        """
        sizes = [(image.width, image.height) for image in example.images]
        film = plan_film(self.config, example.id, example.videos, rng)
        chosen, changes = self._augmented(example.id, sizes, self._chosen(example, conversations), rng)
        layouts = self._layouts(example.id, sizes, changes) if film is None else list(film.layouts)
        keep = self._keep(rng)
        branches = self._branches(example.id, chosen, rng, self._prefix_length(layouts, keep, film), max_tokens)
        branches = [replace(branch, weight=branch.weight * weight) for branch in branches]
        if self.config.question_first:
            return self._question_first(example, layouts, branches, keep, changes)
        film = decode_film(self.config, example, film, chosen, self.frame_scorer)
        layouts = layouts if film is None else list(film.layouts)
        first = self._prefix(layouts, sizes, keep, film=film)
        pixels, pooling = self._pixels(example, layouts, film, changes)
        prefix, lengths = len(first.input_ids), [len(branch.input_ids) for branch in branches]
        input_ids = np.concatenate([first.input_ids, *(branch.input_ids for branch in branches)])
        labels = np.concatenate([np.full(prefix, IGNORE), *(branch.labels for branch in branches)])
        weights = np.repeat([0.0, *self._weights(branches)], [prefix, *lengths])
        return Encoded(
            input_ids=input_ids,
            labels=labels,
            loss_weights=np.where(labels == IGNORE, 0.0, weights).astype(np.float32),
            position_ids=np.concatenate([first.position_ids, *(first.end + np.arange(length) for length in lengths)]),
            segment_ids=np.repeat([PREFIX_SEGMENT, *range(len(branches))], [prefix, *lengths]),
            image_ids=np.concatenate([first.image_ids, np.zeros(sum(lengths), dtype=np.int64)]),
            pixels=pixels,
            pooling=pooling,
            image_token_counts=_token_counts(layouts, self.config),
            patch_masks=self._patch_masks(example, layouts, film),
            slots=first.slots,
            crop_frames=None if film is None else film.crop_frames,
            crop_videos=None if film is None else film.crop_videos,
            id=example.id,
        )

    def _question_first(
        self,
        example: Example,
        layouts: list[Layout],
        branches: Sequence[_Branch],
        keep: int | None,
        changes: Sequence[Change],
    ) -> Encoded:
        """One conversation whose first question stands in the prefix, in front of the images."""
        if len(branches) != 1:
            raise DataError(
                f"example {example.id}: the question stands before the images, so a sequence has one conversation, "
                f"not {len(branches)}; set max_conversations: 1 in the mixture entry"
            )
        (branch,) = branches
        asked = branch.asked  # the last of these tokens predicts the answer's first
        sizes = [(image.width, image.height) for image in example.images]
        first = self._prefix(layouts, sizes, keep, branch.input_ids[:asked])
        pixels, pooling = self._pixels(example, layouts, None, changes)
        prefix, rest = len(first.input_ids), len(branch.input_ids) - asked
        labels = np.concatenate([np.full(prefix - 1, IGNORE), branch.labels[asked - 1 :]])
        return Encoded(
            input_ids=np.concatenate([first.input_ids, branch.input_ids[asked:]]),
            labels=labels,
            loss_weights=np.where(labels == IGNORE, 0.0, self._weights(branches)[0]).astype(np.float32),
            position_ids=np.concatenate([first.position_ids, first.end + np.arange(rest)]),
            segment_ids=np.repeat([PREFIX_SEGMENT, 0], [prefix, rest]),
            image_ids=np.concatenate([first.image_ids, np.zeros(rest, dtype=np.int64)]),
            pixels=pixels,
            pooling=pooling,
            image_token_counts=_token_counts(layouts, self.config),
            patch_masks=self._patch_masks(example, layouts),
            slots=first.slots,
            id=example.id,
        )

    def encode_prompt(
        self,
        example: Example,
        conversation: int = 0,
        max_tokens: int | None = None,
        length: int | None = None,
        seen: Encoded | None = None,
    ) -> Encoded:
        """The sequence that the model continues with its answer to the last question of a conversation.

        Exactly what `encode` without a generator feeds before that answer, which is not looked at; earlier answers of
        the conversation stand in it as given. `prompt_text` is its text.

        Args:
            length: what is said of a caption's length in place of `config.caption_length`; 0 says nothing.
            seen: another prompt of the same example and preprocessor: its crops are taken, no picture is decoded again.
                Not for films.

        Raises:
            DataError: as `encode`, or the prompt has more than `max_tokens` tokens.
        """
        sizes = [(image.width, image.height) for image in example.images]
        (chosen,) = self._chosen(example, [conversation])
        film = plan_film(self.config, example.id, example.videos, None)
        film = decode_film(self.config, example, film, [chosen], self.frame_scorer)
        layouts = self._layouts(example.id, sizes) if film is None else list(film.layouts)
        form = self.config.prompts if length is None else replace(self.config.prompts, length=length)
        try:
            texts = prompts.asked(chosen, form)
        except DataError as error:
            raise DataError(f"example {example.id}: {error}") from error
        first_asked = self._branch([*texts, ""], 1.0)
        question = first_asked.input_ids
        asked = first_asked.asked if self.config.question_first else 0
        first = self._prefix(layouts, sizes, self._keep(None), question[:asked], film)
        input_ids = np.concatenate([first.input_ids, question[asked:]])
        if max_tokens is not None and len(input_ids) > max_tokens:
            raise DataError(
                f"example {example.id}#{conversation}: the prompt has {len(input_ids)} tokens, more than {max_tokens}"
            )
        if seen is not None and film is None and seen.id == example.id:
            pixels, pooling = seen.pixels, seen.pooling
        else:
            pixels, pooling = self._pixels(example, layouts, film)
        length, prefix = len(input_ids), len(first.input_ids)
        return Encoded(
            input_ids=input_ids,
            labels=np.full(length, IGNORE),
            loss_weights=np.zeros(length, dtype=np.float32),
            position_ids=np.concatenate([first.position_ids, first.end + np.arange(length - prefix)]),
            segment_ids=np.concatenate([np.full(prefix, PREFIX_SEGMENT), np.zeros(length - prefix, dtype=np.int64)]),
            image_ids=np.concatenate([first.image_ids, np.zeros(length - prefix, dtype=np.int64)]),
            pixels=pixels,
            pooling=pooling,
            image_token_counts=_token_counts(layouts, self.config),
            patch_masks=self._patch_masks(example, layouts, film),
            slots=first.slots,
            crop_frames=None if film is None else film.crop_frames,
            crop_videos=None if film is None else film.crop_videos,
            id=example.id,
            prompt_text="".join(texts),
        )

    def cost(
        self,
        sizes: Sequence[tuple[int, int]],
        conversations: Sequence[Conversation],
        rng: np.random.Generator | None = None,
        max_tokens: int | None = None,
        id: str = "example",
        videos: Sequence[Video] = (),
    ) -> tuple[int, int]:
        """(tokens, crops) of what `encode` would return, without looking at a pixel.

        Args:
            sizes: width and height of every image.
            conversations: those that would be encoded.
            rng, max_tokens: as for `encode`; the generator must be in the same state. `cost_parts` bounds every draw.
            id: what to call the example in errors.
            videos: the example's films; their bytes are not looked at.

        Raises:
            DataError: as `encode`.
        """
        film = plan_film(self.config, id, videos, rng)
        conversations, changes = self._augmented(id, sizes, conversations, rng)
        layouts = self._layouts(id, sizes, changes) if film is None else list(film.layouts)
        prefix = self._prefix_length(layouts, self._keep(rng), film)
        branches = self._branches(id, conversations, rng, prefix, max_tokens)
        return prefix + sum(len(branch.input_ids) for branch in branches), sum(one.crops for one in layouts)

    def cost_parts(
        self,
        sizes: Sequence[tuple[int, int]],
        conversations: Sequence[Conversation],
        id: str = "example",
        videos: Sequence[Video] = (),
    ) -> Cost:
        """The cost by parts, with the longest prompt wherever one is drawn: what packs can be planned from.

        No draw costs more: `encode` of some of the conversations takes at most `prefix` and the sum of their
        `branches`, and exactly that where nothing is drawn.

        Raises:
            DataError: as `encode`.
        """
        film = plan_film(self.config, id, videos, None)
        layouts = self._layouts(id, sizes) if film is None else list(film.layouts)
        branches = tuple(
            self._longest_questions(texts) + self._longest_answers(id, conversation, texts) + len(texts) // 2 - 1
            for conversation in conversations
            for texts in [self._texts(id, conversation)]
        )
        if film is not None:
            return Cost(self._longest_film(film, videos), branches, sum(one.crops for one in layouts))
        either = [layouts]
        if self.config.augmentation.may_be_finer(conversations):
            either.append(self._layouts(id, sizes, [Change(high_res=True)] * len(sizes)))
        longest = [max(pair, key=lambda one: len(one.tokens)) for pair in zip(*either, strict=True)]
        crops = sum(max(one.crops for one in pair) for pair in zip(*either, strict=True))
        return Cost(self._longest_prefix(longest), branches, crops)

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

    def _layouts(self, name: str, sizes: Sequence[tuple[int, int]], changes: Sequence[Change] = ()) -> list[Layout]:
        """The geometry of every image, after its change if there is one."""
        if len(sizes) > self.config.max_images:
            raise DataError(
                f"example {name}: has {len(sizes)} images, more than max_images {self.config.max_images}; raise the "
                "model's preprocessing.max_images"
            )
        finer = [change.high_res for change in changes] or [False] * len(sizes)
        return [
            layout(height, width, self._high_res_tiling if fine else self._tiling)
            for (width, height), fine in zip(sizes, finer, strict=True)
        ]

    def _augmented(
        self,
        name: str,
        sizes: Sequence[tuple[int, int]],
        conversations: Sequence[Conversation],
        rng: np.random.Generator | None,
    ) -> tuple[list[Conversation], list[Change]]:
        """The conversations with their points where the drawn window shows them, and what happens to each image; no
        change where nothing is drawn."""
        spec = self.config.augmentation
        if rng is None or not spec.changes_pixels:
            return list(conversations), []
        changes = plan_changes(spec, sizes, conversations, pixel_generator(rng))
        if len(changes) != 1 or (window := changes[0].window) is None:
            return list(conversations), changes
        shown = [moved(conversation, sizes[0], window) for conversation in conversations]
        for before, after in zip(conversations, shown, strict=True):
            planned = self._longest_answers(name, before, self._texts(name, before))
            if sum(max(map(self.vocabulary.length, said)) for said in self._texts(name, after)[1::2]) > planned:
                return list(conversations), [replace(changes[0], window=None)]
        return shown, changes

    def _keep(self, rng: np.random.Generator | None) -> int | None:
        """High-resolution tokens to keep of every image; None without a selector. Drawn where the params say so."""
        config = self.config
        if not config.selector_tokens:
            return None
        if rng is None or not config.selector_min_tokens:
            return config.selector_tokens
        return int(rng.integers(config.selector_min_tokens, config.selector_tokens + 1))

    def _prefix(
        self,
        layouts: Sequence[Layout],
        sizes: Sequence[tuple[int, int]] | None,
        keep: int | None = None,
        question: IntArray | None = None,
        film: Film | None = None,
    ) -> _Prefix:
        """The shared prefix: begin of text, a question that comes first, and every image, announced if several.

        Args:
            sizes: width and height of every image; None leaves the slots out.
            keep: see `_keep`.
            film: whose frames the images are; brings the text in front of each.
        """
        ids = [np.array([self.vocabulary.bos_id]), np.zeros(0, dtype=np.int64) if question is None else question]
        images = [np.zeros(1 + len(ids[-1]), dtype=np.int64)]
        positions, slots = [np.arange(len(images[0]))], []
        for number, one in enumerate(layouts, start=1):
            if film is None:
                announced = self._announcement(number, len(layouts), keep)
            else:
                announced = self._encoded(film.texts[number - 1])
            tokens, places = one.tokens, np.arange(len(one.tokens))
            if keep is not None:
                tokens, places = slot_tokens(one, self._tiling, keep)
            begin, end = sum(map(len, ids)) + len(announced), int(positions[-1][-1]) + 1 + len(announced)
            if keep is not None and sizes is not None:
                width, height = sizes[number - 1]
                slots.append(image_slots(one, self._tiling, keep, (height, width), begin, end))
            ids += [announced, tokens + self.config.vocab_size]
            images += [np.zeros(len(announced), dtype=np.int64), np.full(len(tokens), number)]
            positions += [end - len(announced) + np.arange(len(announced)), end + places]
        return _Prefix(np.concatenate(ids), np.concatenate(images), np.concatenate(positions), tuple(slots))

    def _announcement(self, number: int, count: int, keep: int | None) -> IntArray:
        """The text in front of image `number` of `count`."""
        text = prompts.image_prefix(number) if count > 1 else ""
        if keep is not None and self.config.indicate_tokens:
            text = f"{text} K={keep}".lstrip()
        return self._encoded(text)

    def _encoded(self, text: str) -> IntArray:
        return self.vocabulary.encode(text) if text else np.zeros(0, dtype=np.int64)

    def _prefix_length(self, layouts: Sequence[Layout], keep: int | None = None, film: Film | None = None) -> int:
        """Tokens of the prefix, without a question that comes first."""
        return len(self._prefix(layouts, None, keep, film=film).input_ids)

    def _longest_prefix(self, layouts: Sequence[Layout]) -> int:
        """The same with as many selected tokens as are ever drawn, and their longest announcement."""
        config, keep = self.config, self._keep(None)
        length = self._prefix_length(layouts, keep)
        if keep is None or not (config.indicate_tokens and config.selector_min_tokens and layouts):
            return length
        several = len(layouts) > 1
        drawn = range(config.selector_min_tokens, keep + 1)
        longest = [max(len(self._announcement(n, 1 + several, k)) for k in drawn) for n in range(1, len(layouts) + 1)]
        said = [len(self._announcement(n, 1 + several, keep)) for n in range(1, len(layouts) + 1)]
        return length + sum(longest) - sum(said)

    def _texts(self, name: str, conversation: Conversation) -> list[tuple[str, ...]]:
        """Every text that every message may get."""
        try:
            return prompts.choices(conversation, self.config.prompts)
        except DataError as error:
            raise DataError(f"example {name}: {error}") from error

    def _longest_questions(self, texts: Sequence[tuple[str, ...]]) -> int:
        """Tokens of the questions of a conversation, with the longest of their texts."""
        return sum(max(map(self.vocabulary.length, asked)) for asked in texts[::2])

    def _longest_answers(self, name: str, conversation: Conversation, texts: Sequence[tuple[str, ...]]) -> int:
        """The same of the answers; their points may be moved where a window of the image is shown."""
        longest = sum(max(map(self.vocabulary.length, said)) for said in texts[1::2])
        if not (self.config.augmentation.crop and any(one.points or one.inline for one in conversation.messages)):
            return longest
        wide = self._texts(name, widest(conversation))
        return max(longest, sum(max(map(self.vocabulary.length, said)) for said in wide[1::2]))

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
            try:
                texts = prompts.write(conversations[place], self.config.prompts, rng)
            except DataError as error:
                raise DataError(f"example {name}: {error}") from error
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
        weighting = self.config.loss_weighting
        share = 1 / sqrt(len(branches)) if weighting in _SHARED else 1.0
        if weighting not in _BY_LENGTH:
            return [branch.weight * share for branch in branches]
        return [branch.weight * share * 2 / sqrt((branch.labels != IGNORE).sum()) for branch in branches]

    def _branch(self, texts: Sequence[str], weight: float) -> _Branch:
        """A conversation as tokens. Labels are shifted: the last token of a question predicts the first of its answer,
        and the last of an answer predicts the token that ends it, which is fed only where another question follows."""
        end = np.array([self.eos_id])
        ids: list[IntArray] = []
        targets: list[IntArray] = []
        for turn, text in enumerate(texts):
            tokens = self.vocabulary.encode(text) if text else np.zeros(0, dtype=np.int64)
            whole = np.concatenate([tokens, end]) if turn % 2 else tokens
            learned = turn % 2 and (turn == len(texts) - 1 or not self.config.last_message_loss_only)
            ids.append(whole)
            targets.append(whole if learned else np.full(len(whole), IGNORE))
        return _Branch(np.concatenate(ids)[:-1], np.concatenate(targets)[1:], weight, len(ids[0]))

    def _longest_film(self, film: Film, videos: Sequence[Video]) -> int:
        """Tokens of a prefix with films, with the longest texts that may be drawn."""
        length = self._prefix_length(film.layouts, None, film)
        if not self.config.video.random_sampling:
            return length
        drawn = [texts for video in videos for texts in possible_texts(video, self.config.video)]
        written = [text for clip in film.clips for text in clip.texts]
        for said, own, texts in zip(film.texts, written, drawn, strict=True):
            front = said.removesuffix(own)
            length += max(len(self._encoded(front + text)) for text in texts) - len(self._encoded(said))
        return length

    def _pixels(
        self,
        example: Example,
        layouts: Sequence[Layout],
        film: Film | None = None,
        changes: Sequence[Change] = (),
    ) -> tuple[Pixels, IntArray]:
        """Crops [C, H, W, 3] and pooling windows [T, W] of all images of an example, or of the frames of its films."""
        size, patches = self.config.image_size, self._tiling.crop_patches**2
        if film is not None and film.crops is not None:
            windows = [
                np.where(one.pooling >= 0, one.pooling + place * patches, one.pooling)
                for place, one in enumerate(layouts)
            ]
            return film.crops, np.concatenate(windows)
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
            if changes:
                picture = apply(picture, changes[number - 1])
            end = start + one.crops
            fill_crops(
                picture, one, self._tiling, self.config.resize, pixels[start:end], exact=self.config.exact_resize
            )
            pooling.append(np.where(one.pooling >= 0, one.pooling + start * patches, one.pooling))
            start = end
        if not pooling:
            pooling.append(np.zeros((0, self._tiling.window_columns), dtype=np.int64))
        return pixels, np.concatenate(pooling)

    def _patch_masks(self, example: Example, layouts: Sequence[Layout], film: Film | None = None) -> FloatArray | None:
        """[C, N] share of every patch that is picture, where the model needs it."""
        if not self.config.patch_masks:
            return None
        if film is not None:
            return film_masks(self.config, example, film)
        masks = [
            patch_masks(image.height, image.width, one, self._tiling, shifted=self.config.shifted_patch_masks)
            for image, one in zip(example.images, layouts, strict=True)
        ]
        return np.concatenate([np.zeros((0, self._tiling.crop_patches**2), dtype=np.float32), *masks])


def _token_counts(layouts: Sequence[Layout], config: PreprocessorConfig) -> IntArray:
    return np.array([len(one.pooling) * config.tokens_per_window for one in layouts], dtype=np.int64)
