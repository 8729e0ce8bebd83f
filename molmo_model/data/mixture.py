"""Mixtures: which examples a run draws, how often, and what each draw costs.

`resolve` joins the params of a run with its datasets' shards and the costs that the preprocessor states; `Mixture` is
the result, as the mixture stage writes it and training reads it:

- `mixture.json`: the entries with rates and sizes, the digests of the shards, the packing, the leaks that were allowed;
- `costs.parquet`: per entry and example its row, a key from its id, tokens and crops of the shared prefix, and the
  tokens of each conversation that the entry keeps;
- `schedule.parquet`: the entry of each position of one period (see `order`);
- `packs.parquet`: the number of packs of each window of the run (see `packing`).

What a rate means: entries are drawn in the ratio of their rates, counted in examples. With rates 3 and 1, of any 400
consecutive positions from the start 300 come from the first entry, whatever the datasets' sizes; a small one is gone
through more often. The key of an entry's order is its name: renaming an entry reorders it, adding another one does not.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from molmo_model.artifacts import write_text_atomic
from molmo_model.config import MixtureEntry
from molmo_model.data.example import Example
from molmo_model.data.order import Ints, Keys, Order, Schedule, Source, Window, key_of, resolve_shares, subkey
from molmo_model.data.shard_reader import ShardReader, numbers, read_columns
from molmo_model.errors import ArtifactError, ConfigError, DataError

SCHEMA = "molmo/mixture"
VERSION = 1
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class ExampleCost:
    """What one example costs, at most: prompts drawn from templates count as their longest."""

    tokens: int
    """Tokens of the prefix that all conversations share: images and what stands before them."""
    crops: int
    conversations: tuple[int, ...]
    """Tokens of each conversation of the example, in order."""


CostOf = Callable[[Example], ExampleCost]


@dataclass(frozen=True)
class Entry:
    """One entry of a mixture with the examples that it draws from."""

    name: str
    config: MixtureEntry
    share: int
    """Positions of one period of the schedule."""
    rows: Ints
    """[N] row numbers in the dataset's index."""
    keys: Keys
    """[N] a key per example, from its id."""
    tokens: Ints
    """[N] tokens of the shared prefix."""
    crops: Ints
    """[N] image crops."""
    starts: Ints
    """[N + 1] where each example's conversations begin in the two arrays below."""
    conversations: Ints
    """[M] numbers of the conversations that the entry keeps."""
    conversation_tokens: Ints
    """[M] tokens of each."""


@dataclass(frozen=True)
class Draw:
    """One example as one position of the stream asks for it."""

    position: int
    entry: str
    dataset: str
    row: int
    epoch: int
    conversations: tuple[int, ...]
    """Which conversations of the example, in the order in which they follow one another."""
    key: int
    """64-bit key of the generator that prompts and augmentations are drawn from, and that nothing else uses."""
    tokens: int
    """Cost, an upper bound."""
    crops: int


class Mixture:
    """The stream of a run: its entries, its order and its costs.

    Args:
        seed: of the experiment.
        entries: sorted by name, so that their order in a file does not matter.
        schedule: made of the entries' shares.
        info: the rest of `mixture.json`.
        pack_counts: packs of each window, for the packing that `info` describes.
    """

    def __init__(
        self,
        seed: int,
        entries: Sequence[Entry],
        schedule: Schedule,
        info: Mapping[str, Any] | None = None,
        pack_counts: Ints | None = None,
    ) -> None:
        self.seed, self.entries, self.info = seed, list(entries), dict(info or {})
        self.pack_counts: Ints = np.zeros(0, np.int64) if pack_counts is None else pack_counts
        sources = [Source(entry.name, entry.config.dataset, entry.rows, entry.keys) for entry in self.entries]
        self.order = Order(seed, sources, schedule)
        limits = [entry.config.max_conversations for entry in self.entries]
        self._limits: Ints = np.array([_NO_LIMIT if limit is None else limit for limit in limits], np.int64)
        sizes = [len(entry.rows) for entry in self.entries]
        self._bases: Ints = np.cumsum([0, *sizes])[:-1].astype(np.int64)
        self._rows, self._tokens, self._crops = (
            np.concatenate([getattr(entry, name) for entry in self.entries]) for name in ("rows", "tokens", "crops")
        )
        self._conversations = np.concatenate([entry.conversations for entry in self.entries])
        self._conversation_tokens = np.concatenate([entry.conversation_tokens for entry in self.entries])
        self._n_conversations = np.concatenate([np.diff(entry.starts) for entry in self.entries])
        self._starts: Ints = np.cumsum(np.concatenate([[0], self._n_conversations]))[:-1].astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(self._conversation_tokens)])
        self._all_tokens = self._tokens + sums[self._starts + self._n_conversations] - sums[self._starts]

    @classmethod
    def load(cls, path: str | Path) -> "Mixture":
        """Reads what `save` wrote.

        Raises:
            ArtifactError: a file is missing, unreadable or of another version.
        """
        path = Path(path)
        try:
            info = json.loads((path / "mixture.json").read_text(encoding="utf-8"))
            if info.get("version") != VERSION:
                raise ArtifactError(f"{path}/mixture.json: version {info.get('version')}, this code reads {VERSION}")
            names = ["entry", "row", "key", "tokens", "crops", "conversations", "conversation_tokens"]
            costs = read_columns(path / "costs.parquet", names)
            table = numbers(read_columns(path / "schedule.parquet")["entry"])
            counts = numbers(read_columns(path / "packs.parquet")["packs"]).astype(np.int64)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is no readable mixture ({error}); run the mixture stage") from error
        entries = [_entry_of(costs, number, raw) for number, raw in enumerate(info["entries"])]
        return cls(info["seed"], entries, Schedule([entry.share for entry in entries], table), info, counts)

    def save(self, path: str | Path, names: Mapping[str, Sequence[str]]) -> None:
        """Writes the four files; equal mixtures give equal bytes.

        Args:
            path: folder.
            names: example ids by dataset and row, for people who read `costs.parquet`.
        """
        path = Path(path)
        costs = pa.concat_tables([_cost_table(number, e, names) for number, e in enumerate(self.entries)])
        pq.write_table(costs, path / "costs.parquet", compression="zstd")
        pq.write_table(pa.table({"entry": self.order.schedule.table}), path / "schedule.parquet", compression="zstd")
        pq.write_table(
            pa.table({"packs": self.pack_counts.astype(np.int32)}), path / "packs.parquet", compression="zstd"
        )
        document = {**self.info, "version": VERSION, "seed": self.seed, "period": self.order.schedule.period}
        document["entries"] = [self._describe(entry) for entry in self.entries]
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        write_text_atomic(path / "mixture.json", text + "\n")

    def costs_at(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Tokens and crops of `count` positions from `start`."""
        window = self.order.window(start, count)
        examples = self._bases[window.entries] + window.examples
        return self._tokens_of(window, examples), self._crops[examples]

    def draws(self, positions: Sequence[int]) -> list[Draw]:
        """What stands at these positions."""
        window = self.order.at(positions)
        examples = self._bases[window.entries] + window.examples
        tokens = self._tokens_of(window, examples)
        owner, flat = self._choose(window, examples)
        chosen: list[list[int]] = [[] for _ in positions]
        for i, conversation in zip(owner.tolist(), self._conversations[flat].tolist(), strict=True):
            chosen[i].append(conversation)
        entries = [self.entries[number] for number in window.entries]
        return [
            Draw(
                position=position,
                entry=entries[i].name,
                dataset=entries[i].config.dataset,
                row=int(self._rows[examples[i]]),
                epoch=int(window.epochs[i]),
                conversations=tuple(chosen[i]),
                key=int(window.draws[i]),
                tokens=int(tokens[i]),
                crops=int(self._crops[examples[i]]),
            )
            for i, position in enumerate(positions)
        ]

    def _tokens_of(self, window: Window, examples: Ints) -> Ints:
        tokens = self._all_tokens[examples]
        over = np.flatnonzero(self._n_conversations[examples] > self._limits[window.entries])
        if len(over):
            owner, flat = self._choose(window.take(over), examples[over])
            drawn = np.bincount(owner, self._conversation_tokens[flat], minlength=len(over)).astype(np.int64)
            tokens[over] = self._tokens[examples[over]] + drawn
        return tokens

    def _choose(self, window: Window, examples: Ints) -> tuple[Ints, Ints]:
        """The conversations that each position draws: its number in the window, and the conversation's place in
        `_conversations`. They are those with the smallest scores, in the order of their scores."""
        counts = self._n_conversations[examples]
        owner = np.repeat(np.arange(len(examples)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        inner = np.arange(len(owner)) - first
        flat = np.repeat(self._starts[examples], counts) + inner
        order = np.lexsort((subkey(window.draws[owner], self._conversations[flat]), owner))
        keep = inner < self._limits[window.entries][owner]  # after sorting, `inner` is the rank among one owner's
        return owner[keep], flat[order][keep]

    def _describe(self, entry: Entry) -> dict[str, Any]:
        return {
            "name": entry.name,
            "dataset": entry.config.dataset,
            "styles": list(entry.config.styles),
            "max_conversations": entry.config.max_conversations,
            "requested_rate": entry.config.rate,
            "share": entry.share,
            "rate": entry.share / self.order.schedule.period,
            "examples": len(entry.rows),
            "conversations": len(entry.conversations),
        }


def resolve(
    mixture: Mapping[str, MixtureEntry], seed: int, readers: Mapping[str, ShardReader], cost_of: CostOf
) -> Mixture:
    """The mixture of a run.

    Args:
        mixture: `runs.<run>.mixture` of the params.
        seed: of the experiment.
        readers: shards by dataset.
        cost_of: what an example costs; gets it without its pictures' bytes (`ShardReader.facts`).

    Raises:
        ConfigError: an entry has a setting that is not supported or out of range.
        DataError: no training example of a dataset has a conversation that the entry keeps.
    """
    for name, config in mixture.items():
        if config.size is not None:
            raise ConfigError(
                f"mixture entry {name!r}: size is {config.size}, but there is no root-size rule yet; use rate"
            )
        if config.max_conversations is not None and config.max_conversations < 1:
            raise ConfigError(
                f"mixture entry {name!r}: max_conversations is {config.max_conversations}; at least 1, or null"
            )
    shares = resolve_shares({name: config.rate for name, config in sorted(mixture.items())})
    costs: dict[tuple[str, int], ExampleCost] = {}

    def cost_at(dataset: str, row: int) -> ExampleCost:
        if (dataset, row) not in costs:  # entries may share a dataset
            costs[dataset, row] = cost_of(readers[dataset].facts(row))
        return costs[dataset, row]

    entries = [_resolve_entry(name, mixture[name], share, readers, cost_at) for name, share in shares.items()]
    return Mixture(seed, entries, Schedule([entry.share for entry in entries]))


def _resolve_entry(
    name: str,
    config: MixtureEntry,
    share: int,
    readers: Mapping[str, ShardReader],
    cost_at: Callable[[str, int], ExampleCost],
) -> Entry:
    reader = readers[config.dataset]
    ids, styles = reader.index["id"], reader.index["styles"]
    rows, keys, tokens, crops, starts = [], [], [], [], [0]
    conversations: list[int] = []
    conversation_tokens: list[int] = []
    seen: set[str] = set()
    for row in reader.rows("train"):
        of_row = styles[row].as_py()
        seen.update(of_row)
        kept = [i for i, style in enumerate(of_row) if not config.styles or style in config.styles]
        if not kept:
            continue
        cost = cost_at(config.dataset, row)
        rows.append(row)
        keys.append(key_of(ids[row].as_py()))
        tokens.append(cost.tokens)
        crops.append(cost.crops)
        conversations += kept
        conversation_tokens += [cost.conversations[i] for i in kept]
        starts.append(len(conversations))
    if unknown := sorted(set(config.styles) - seen) or ([] if rows else ["any"]):
        raise DataError(
            f"mixture entry {name!r}: no training example of dataset {config.dataset!r} has a conversation of style "
            f"{', '.join(unknown)}; it has {', '.join(sorted(seen)) or 'none'}"
        )
    arrays = (np.array(a, np.int64) for a in (tokens, crops, starts, conversations, conversation_tokens))
    return Entry(name, config, share, np.array(rows, np.int64), np.array(keys, np.uint64), *arrays)


def _cost_table(number: int, entry: Entry, names: Mapping[str, Sequence[str]]) -> pa.Table:
    ids = names[entry.config.dataset]
    starts = pa.array(entry.starts, pa.int32())
    lists = [pa.ListArray.from_arrays(starts, pa.array(values, pa.int32())) for values in _lists(entry)]
    return pa.table(
        {
            "entry": np.full(len(entry.rows), number, np.int16),
            "id": pa.array([ids[row] for row in entry.rows], pa.string()),
            "row": entry.rows,
            "key": entry.keys,
            "tokens": entry.tokens.astype(np.int32),
            "crops": entry.crops.astype(np.int32),
            "conversations": lists[0],
            "conversation_tokens": lists[1],
        }
    )


def _lists(entry: Entry) -> tuple[Ints, Ints]:
    return entry.conversations, entry.conversation_tokens


def _entry_of(costs: pa.Table, number: int, raw: Mapping[str, Any]) -> Entry:
    first, last = np.searchsorted(numbers(costs["entry"]), [number, number + 1])
    rows = costs.slice(first, last - first)
    fields = ("dataset", "styles", "max_conversations")
    config = MixtureEntry(rate=raw["requested_rate"], **{name: raw[name] for name in fields})
    conversations, tokens = (rows[name].combine_chunks() for name in ("conversations", "conversation_tokens"))
    starts = numbers(conversations.offsets).astype(np.int64)
    return Entry(
        name=raw["name"],
        config=config,
        share=raw["share"],
        rows=numbers(rows["row"]),
        keys=numbers(rows["key"]),
        tokens=numbers(rows["tokens"]).astype(np.int64),
        crops=numbers(rows["crops"]).astype(np.int64),
        starts=starts - starts[0],
        # not `flatten`, which imports all of arrow's compute functions
        conversations=numbers(conversations.values)[starts[0] : starts[-1]].astype(np.int64),
        conversation_tokens=numbers(tokens.values)[starts[0] : starts[-1]].astype(np.int64),
    )


@dataclass(frozen=True)
class Leak:
    """One picture that stands both among the training and the evaluation rows."""

    image_sha256: str
    train: tuple[str, str]
    """Dataset and example id."""
    eval: tuple[str, str]


def image_leaks(
    train: Iterable[tuple[str, str, list[str]]], held_out: Iterable[tuple[str, str, list[str]]]
) -> list[Leak]:
    """Pictures, by content, that both sides hold; one entry per training example and evaluation picture.

    Args:
        train: (dataset, example id, SHA-256 of its image files) of the rows that are trained on.
        held_out: the same of the evaluation rows.
    """
    seen: dict[str, tuple[str, str]] = {}
    for dataset, name, hashes in held_out:
        for value in hashes:
            seen.setdefault(value, (dataset, name))
    return [
        Leak(value, (dataset, name), seen[value])
        for dataset, name, hashes in train
        for value in dict.fromkeys(hashes)
        if value in seen
    ]


def check_leaks(mixture: Mixture, readers: Mapping[str, ShardReader], allowed: Iterable[str] = ()) -> list[Leak]:
    """Evaluation pictures among the examples that the mixture draws.

    Args:
        mixture: what is trained on.
        readers: shards by dataset; the evaluation rows of all of them count.
        allowed: ids of training examples whose leak is accepted and only noted.

    Returns:
        The accepted leaks.

    Raises:
        DataError: there are others; names the first of them.
    """
    trained = {(entry.config.dataset, row) for entry in mixture.entries for row in entry.rows.tolist()}
    held_out = {(name, row) for name, reader in readers.items() for row in reader.rows("eval")}

    def images(rows: set[tuple[str, int]]) -> Iterable[tuple[str, str, list[str]]]:
        columns = {name: (r.index["id"].to_pylist(), r.files()) for name, r in readers.items()}
        return ((name, columns[name][0][row], columns[name][1][row]) for name, row in sorted(rows))

    leaks = image_leaks(images(trained), images(held_out))
    refused = [leak for leak in leaks if leak.train[1] not in set(allowed)]
    if refused:
        lines = [f"train {leak.train} = eval {leak.eval}" for leak in refused[:10]]
        raise DataError(
            f"{len(refused)} training examples show an evaluation picture, so scores would count memory: "
            f"{'; '.join(lines)}{'; ...' if len(refused) > 10 else ''}; take them out of one of the two splits"
        )
    return leaks
