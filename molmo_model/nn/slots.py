"""Answers by a decoder of our own: slots of a static cache that advance together and are refilled as answers end.

    prompts -> packed row -> keys and values into free slots, first tokens
    all slots -> one more token each -> ... -> an answer ends -> its slot is free for the next prompt

On a GPU the layers are compiled, a whole step is one CUDA graph, and tokens are read a few steps behind, so that the
device waits for nobody; on a CPU the same functions run as they are. Every slot is computed by itself: an answer does
not depend on what stands in the others, and nor do answers on the order of questions, as far as floating point goes
(see `nn.generation`). Beams, HeMolmo's selection and pruned image tokens are `nn.generation`'s.

Shape suffixes: N slots, R prompts of a batch, S tokens of a padded row, T tokens of a packed one, V vocabulary.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_model.errors import ConfigError, DataError
from molmo_model.nn.generation import Said
from molmo_model.nn.image_token_cache import ImageTokenCache
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.static_cache import Packed, StaticCache, advance, read_prompts, step_layer

if TYPE_CHECKING:
    from molmo_model.nn.decode_kernels import OneSlotStep

STEPS = {"cuda": 4, "cpu": 1}
"""Steps between two looks at what was said."""
PACKED_MULTIPLE = {"cuda": 512, "cpu": 1}
"""Packed rows are filled up to a multiple of this: few shapes for what is compiled."""
LEAST_SHARED = 16
"""Tokens at the beginning of neighbours that are worth a tree."""
EXTENT_MULTIPLE = 64
"""On a CPU a step looks at so many places at a time as some slot needs; a captured step looks at all."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts that are read together."""

    numbers: Sequence[int]
    """What the answers are called."""
    batch: Mapping[str, Tensor]
    """As `preprocessing.collator.collate_prompts` makes it: `input_ids`, `attention_mask`, `image_ids` [R, S], padded
    on either side, and what `get_image_features` takes."""
    max_new_tokens: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)


More = Callable[[bool], Prompts | None]
"""`more(wait)`: the next prompts; None where there are none yet (without `wait`) or none left (with it)."""


@dataclass
class _Asked:
    """A question that is being answered."""

    number: int
    limit: int
    """Tokens that it may have."""
    place: int
    """Where its next token will stand in the slot."""
    left: int
    """Tokens that may still be asked of the device."""
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    done: bool = False


@dataclass
class _Pending:
    """Tokens that the device computes or has computed, [steps, columns], and who said them."""

    asked: Sequence[_Asked | None]
    tokens: Tensor
    margins: Tensor | None
    event: Any = None


@dataclass(frozen=True)
class Layout:
    """Prompts one behind the other; what neighbours share at their beginning comes once. See `static_cache.Packed`."""

    input_ids: Tensor
    image_ids: Tensor
    places: Tensor
    example_ids: Tensor
    segment_ids: Tensor
    lengths: tuple[int, ...]
    written: Tensor
    """[2, W] tokens and the slots that they are written to."""
    last: Tensor
    """[R] where each prompt ends."""
    images: list[Tensor]
    """Image tokens in the order of their places."""

    def columns(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.image_ids, self.places, self.example_ids, self.segment_ids

    @property
    def shares(self) -> bool:
        return self.written.shape[1] > len(self.input_ids)


def lay_out(
    batch: Mapping[str, Tensor],
    counts: Sequence[int],
    rows: Sequence[int],
    images: Sequence[Sequence[Tensor]],
    one_image_block: bool = False,
) -> Layout:
    """Lays the prompts of a padded batch out as trees.

    Args:
        counts: tokens of each prompt.
        rows: the slot of each.
        images: image tokens of each; a picture is the same as another one if its tensor is.
        one_image_block: images of a prompt see each other too.
    """
    present = batch["attention_mask"].bool()
    ids = batch["input_ids"][present].split(list(counts))
    pictures = batch["image_ids"][present].split(list(counts))
    pieces: list[tuple[Tensor, ...]] = []
    written: list[Tensor] = []
    last, lengths, tokens, total = [], [], list[Tensor](), 0
    for tree, (group, shared) in enumerate(_trees(ids, pictures, images, one_image_block)):
        begin, first = total, group[0]
        inside = int(pictures[first][:shared].amax()) if shared else 0
        parts = [(first, 0, shared, len(group))] if shared else []
        parts += [(row, shared, counts[row], branch) for branch, row in enumerate(group)]
        tokens += images[first][:inside]
        for row, start, stop, segment in parts:
            length = stop - start
            pieces.append(
                (
                    ids[row][start:stop],
                    pictures[row][start:stop],
                    torch.arange(start, stop),
                    torch.full((length,), tree),
                    torch.full((length,), segment),
                )
            )
            own = torch.arange(total, total + length)
            total += length
            if segment == len(group):  # what is shared
                continue
            source = torch.cat([torch.arange(begin, begin + shared), own]) if shared else own
            written.append(torch.stack([source, torch.full_like(source, rows[row])]))
            last.append(total - 1)
            tokens += images[row][inside:]
        lengths.append(total - begin)
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    return Layout(
        input_ids=columns[0],
        image_ids=columns[1],
        places=columns[2],
        example_ids=columns[3],
        segment_ids=columns[4],
        lengths=tuple(lengths),
        written=torch.cat(written, dim=1),
        last=torch.tensor(last),
        images=tokens,
    )


def _trees(
    ids: Sequence[Tensor], pictures: Sequence[Tensor], images: Sequence[Sequence[Tensor]], one_image_block: bool
) -> Iterator[tuple[range, int]]:
    """Runs of prompts with the same pictures, and how many tokens at their beginning they share."""
    start = 0
    while start < len(ids):
        stop, shared = start + 1, 0
        while stop < len(ids) and [*map(id, images[stop])] == [*map(id, images[start])]:
            common = (
                _common(ids[start], ids[stop]) if stop == start + 1 else min(shared, _common(ids[start], ids[stop]))
            )
            common = _whole_images(pictures[start], common, one_image_block)
            if common < LEAST_SHARED:
                break
            stop, shared = stop + 1, common
        yield range(start, stop), shared
        start = stop


def _common(one: Tensor, other: Tensor) -> int:
    """Tokens at the beginning that are the same; each keeps its last one for itself."""
    length = min(len(one), len(other)) - 1
    apart = (one[:length] != other[:length]).nonzero()
    return int(apart[0]) if len(apart) else length


def _whole_images(pictures: Tensor, shared: int, one_image_block: bool) -> int:
    """So many tokens or fewer, that no image (or block of images) is cut apart, whose tokens all see each other."""
    blocks = pictures.clamp(max=1) if one_image_block else pictures
    while 0 < shared < len(blocks) and blocks[shared - 1] > 0 and (blocks[shared:] == blocks[shared - 1]).any():
        shared = int((blocks == blocks[shared - 1]).nonzero()[0])
    return shared


class SlotDecoder:
    """Greedy answers of one model.

    Args:
        slots: answers that are written at a time.
        context: places of a slot: no prompt with its answer may be longer.
        end_ids: tokens that end an answer.
        autocast: compute in this dtype where autocast does; None computes in that of the weights.
        steps: steps between two looks at what was said; None takes `STEPS`.
        compiled: compile the layers and capture a step as one CUDA graph; None does on a GPU.
        margins: note by how much every token won; see `generation.Said`.
        cache: image tokens of earlier prompts; only for one model in one precision.
    """

    def __init__(
        self,
        model: MolmoForConditionalGeneration,
        slots: int,
        context: int,
        end_ids: Sequence[int],
        *,
        autocast: torch.dtype | None = None,
        steps: int | None = None,
        compiled: bool | None = None,
        margins: bool = False,
        cache: ImageTokenCache | None = None,
    ) -> None:
        if model.config.selector is not None:
            raise ConfigError("a model that selects image tokens (HeMolmo) is answered by generation.generate")
        self.model, self.slots, self.context, self.ends = model.eval(), slots, context, frozenset(end_ids)
        self.device, self.autocast, self.margins = model.device, autocast, margins
        kind = self.device.type
        self.steps = steps or STEPS.get(kind, 1)
        self.compiled = kind == "cuda" if compiled is None else compiled
        self.image_cache = cache
        self.text: Any = model.model.language_model
        dtype = autocast or self.text.embed_tokens.weight.dtype
        with torch.inference_mode():
            self.cache = StaticCache(model.config.text_config, slots, context, dtype, self.device)
            self.tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
            self.positions = torch.zeros(slots, dtype=torch.long, device=self.device)
            self.won = torch.zeros(slots, device=self.device)
        self._asked: list[_Asked | None] = [None] * slots
        self._pending: deque[_Pending] = deque()
        self._graphs: dict[int, Any] = {}
        if self.compiled:
            torch._dynamo.reset()  # shapes of an earlier decoder count against a limit
        self._kernels = self._one_slot_step() if kind == "cuda" and self.compiled and autocast is None else None
        self._layer = torch.compile(step_layer, dynamic=False) if self.compiled else step_layer
        self._head = torch.compile(self._choose, dynamic=False) if self.compiled else self._choose

    def run(self, more: More) -> Iterator[tuple[int, Said]]:
        """The answers, with the numbers of their prompts, as they end.

        Args:
            more: asked for prompts whenever slots are free.

        Raises:
            ConfigError: a batch has more prompts than there are slots, or a prompt with its answer is too long.
        """
        self._asked = [None] * self.slots  # what an earlier run left when nobody took its answers any more
        self._pending.clear()
        waiting: Prompts | None = None
        while True:
            idle = not any(self._asked) and not self._pending
            if waiting is None:
                waiting = more(idle)
            if waiting is None and idle:
                return
            if waiting is not None and len(waiting) > self.slots:
                raise ConfigError(f"{len(waiting)} prompts at once for {self.slots} slots; read fewer at a time")
            if waiting is not None and self._free() >= len(waiting):
                self._read(waiting)
                waiting = None
                continue  # as many as fit
            if any(self._asked):
                self._launch()
            behind = 1 if self.device.type == "cuda" and any(self._asked) else 0
            while len(self._pending) > behind:
                yield from self._look(self._pending.popleft())

    # --- scheduling

    def _free(self) -> int:
        return sum(one is None for one in self._asked)

    def _launch(self) -> None:
        """Some steps for all slots; nothing is waited for."""
        steps = min(self.steps, max(one.left for one in self._asked if one is not None))
        with self._computing():
            extent = self._extent(steps)
            said = [self._step(extent) for _ in range(steps)]
            self._note(list(self._asked), torch.stack([one[0] for one in said]), [one[1] for one in said])
        for slot, one in enumerate(self._asked):
            if one is not None:
                one.left -= steps
                one.place += steps
                if one.left <= 0:  # its last tokens are under way
                    self._asked[slot] = None

    def _note(self, asked: Sequence[_Asked | None], tokens: Tensor, margins: Sequence[Tensor]) -> None:
        """Remembers to look at some tokens, and starts their way to the host."""
        found = torch.stack(list(margins)) if self.margins else None
        if self.device.type != "cuda":
            self._pending.append(_Pending(asked, tokens, found))
            return
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        if found is not None:
            found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append(_Pending(asked, host, found, event))

    def _look(self, pending: _Pending) -> Iterator[tuple[int, Said]]:
        """The answers that have ended with these tokens."""
        if pending.event is not None:
            pending.event.synchronize()
        margins = pending.margins.tolist() if pending.margins is not None else None
        live = [(slot, one) for slot, one in enumerate(pending.asked) if one is not None and not one.done]
        for step, row in enumerate(pending.tokens.tolist()):
            for slot, one in live:
                if one.done:
                    continue
                ended = row[slot] in self.ends
                if margins is not None:
                    one.margins.append(margins[step][slot])
                if not ended:
                    one.tokens.append(row[slot])
                if ended or len(one.tokens) == one.limit:
                    one.done = True
                    yield one.number, Said(one.tokens, one.margins)
        self._asked = [None if busy is None or busy.done else busy for busy in self._asked]

    # --- prompts

    def _read(self, prompts: Prompts) -> None:
        """Reads prompts into free slots, and has their first tokens under way."""
        counts = self._lengths(prompts)
        rows = [slot for slot, one in enumerate(self._asked) if one is None][: len(prompts)]
        asked = [
            _Asked(number, limit, place=count, left=limit - 1)
            for number, limit, count in zip(prompts.numbers, prompts.max_new_tokens, counts, strict=True)
        ]
        with self._computing():
            states = self._states(prompts.batch, counts, rows)
            tokens, margins = self._choose(states)
            places = self._put(torch.tensor([rows, counts]))
            self.tokens[places[0]] = tokens
            self.positions[places[0]] = places[1]
            self._note(asked, tokens[None], [margins])
        for slot, one in zip(rows, asked, strict=True):
            self._asked[slot] = one if one.left > 0 else None

    def _lengths(self, prompts: Prompts) -> list[int]:
        """Tokens of every prompt.

        Raises:
            ConfigError: one does not fit.
            DataError: positions are not those of whole prompts.
        """
        present = prompts.batch["attention_mask"].bool()
        counts: list[int] = present.sum(1).tolist()
        for number, count, limit in zip(prompts.numbers, counts, prompts.max_new_tokens, strict=True):
            if limit < 1:
                raise ConfigError(f"question {number}: max_new_tokens is {limit}; ask for at least one")
            if count + limit - 1 > self.context:
                raise ConfigError(
                    f"question {number}: a prompt of {count} tokens with an answer of up to {limit} does not fit into "
                    f"a slot of {self.context}; make the slots longer or max_new_tokens smaller"
                )
        positions = prompts.batch.get("position_ids")
        if positions is not None and not torch.equal(positions[present], (present.long().cumsum(1) - 1)[present]):
            raise DataError("positions with gaps (selected or pruned image tokens) are answered by generation.generate")
        return counts

    def _states(self, batch: Mapping[str, Tensor], counts: Sequence[int], rows: Sequence[int]) -> Tensor:
        """States [R, E] of the last tokens of all prompts, before the norm."""
        body = self.model.model
        images = self._images(batch, len(counts))
        layout = lay_out(batch, counts, rows, images, self.model.config.one_image_block)
        filled = (-len(layout.input_ids)) % PACKED_MULTIPLE.get(self.device.type, 1)
        columns = self._put(torch.stack([F.pad(one, (0, filled), value=-1) for one in layout.columns()]))
        input_ids, image_ids, places = (one.clamp(min=0) for one in columns[:3])
        sources, slots = self._put(layout.written)
        embeddings = body.embed(input_ids[None])
        if layout.images:
            embeddings = body.add_image_tokens(embeddings, input_ids[None], torch.cat(layout.images))
        seen_both_ways = body.attended_images(image_ids)
        packed = Packed(
            example_ids=columns[3],
            segment_ids=columns[4] if layout.shares else None,
            image_ids=seen_both_ways,
            places=places,
            lengths=(*layout.lengths, filled) if filled else layout.lengths,
            sources=sources,
            rows=slots,
        )
        states = read_prompts(self.text, embeddings, self.cache, packed)
        return states[0].index_select(0, self._put(layout.last))

    def _images(self, batch: Mapping[str, Tensor], rows: int) -> list[list[Tensor]]:
        """The tokens of the images of every row; of one picture the same tensor, where the cache is asked."""
        if not len(batch.get("pooling", ())):
            return [[] for _ in range(rows)]
        found: Any = None if self.image_cache is None else self.image_cache.encode(self.model, batch)
        if found is None:
            names = inspect.signature(self.model.model.get_image_features).parameters
            images = {name: self._put(batch[name]) for name in names if name in batch}
            images["image_token_counts"] = batch["image_token_counts"]  # read on the host
            found = self.model.get_image_features(**images).pooler_output
        tokens = iter(found)
        return [[next(tokens) for _ in range(count)] for count in batch["image_ids"].amax(1).tolist()]

    def _put(self, values: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    # --- a step

    def _step(self, extent: int) -> tuple[Tensor, Tensor]:
        """One more token for every slot [N], and its margin."""
        if self.compiled and self.device.type == "cuda":
            self._captured(extent).replay()
        else:
            self._advance(extent)
        return self.tokens.clone(), self.won.clone() if self.margins else self.won

    def _advance(self, extent: int) -> None:
        """The step itself: fixed shapes, everything in place, nothing read."""
        embeddings = self.text.embed_tokens(self.tokens[:, None])
        if self._kernels is not None:
            turns = self.text.rotary_emb(embeddings, self.positions[:, None])
            tokens, margins = self._best(self._kernels(embeddings, self.positions, *turns))
        else:
            states = advance(self.text, embeddings, self.positions, self.cache, extent, self._layer)
            tokens, margins = self._head(states[:, 0])
        self.tokens.copy_(tokens)
        self.won.copy_(margins)
        self.positions.add_(1).clamp_(max=self.context - 1)  # free slots go on by themselves

    def _choose(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The best tokens [R] after states [R, E], and by how much they win (0 where that is not asked)."""
        return self._best(self.model.lm_head(self.text.norm(states)))

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not self.margins:
            return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
        best = logits.float().topk(2, dim=-1)
        return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]

    def _one_slot_step(self) -> "OneSlotStep | None":
        """The kernels of one sequence, where they can compute this model's step."""
        if self.slots > 1 or not find_spec("triton"):
            return None
        from molmo_model.nn.decode_kernels import SPLIT, OneSlotStep, unsupported

        if self.context % SPLIT or unsupported(self.text, self.model.lm_head):
            return None
        return OneSlotStep(self.text, self.model.lm_head, self.cache.keys, self.cache.values)

    def _extent(self, steps: int) -> int:
        """Places that the next steps must look at."""
        if self.compiled:
            return self.context
        reach = max(one.place for one in self._asked if one is not None) + steps
        return min(self.context, -(-reach // EXTENT_MULTIPLE) * EXTENT_MULTIPLE)

    def _captured(self, extent: int) -> Any:
        """The CUDA graph of a step, captured at its first use; what the trial runs change is put back. The keys and
        values that they write stand behind every slot's position and are written again before they are seen."""
        if extent not in self._graphs:
            state = [one.clone() for one in (self.tokens, self.positions, self.won)]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._advance(extent)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._advance(extent)
            self._graphs[extent] = graph
            for one, before in zip((self.tokens, self.positions, self.won), state, strict=True):
                one.copy_(before)
        return self._graphs[extent]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """No gradients, in the decoder's precision. Around each piece of work, never around a `yield` to whoever takes
        the answers, who would go on without gradients."""
        cast: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False)
        with torch.inference_mode(), cast:
            yield
