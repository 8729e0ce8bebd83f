"""Mixtures: which examples a run draws, how often, and what each draw costs.

`resolve` joins the params of a run with its datasets' shards and the costs that the preprocessor states; `Mixture` is
the result, as the mixture stage writes it and training reads it:

- `mixture.json`: the tree of groups and entries with rates, sizes, expected examples and epochs, the digests of the
  shards, the packing, the leaks that were allowed and the examples that were left out for theirs;
- `costs.arrow`: per entry and example its row, a key from its id, tokens and crops of the shared prefix, and the
  tokens of each conversation that the entry keeps;
- `schedule.parquet`: the entry of each position of one period, or what a sampled schedule has counted (see `order`);
- `packs.parquet` and `packs.arrow`: the number of packs of each window of the run, and the pack of each position in
  its window (see `packing`).

The two `.arrow` files (Arrow IPC, uncompressed) are mapped, not read: with 80 datasets and millions of examples a
training still finds its place within milliseconds.

What a rate means: entries are drawn in the ratio of their rates, counted in examples. With rates 3 and 1, of any 400
consecutive positions from the start 300 come from the first entry, whatever the datasets' sizes; a small one is gone
through more often. `rates` has the groups. The key of an entry's order is its name: renaming an entry reorders it,
adding another one does not, nor does moving it between groups.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from molmo_model.artifacts import write_text_atomic
from molmo_model.config import MixtureEntry, MixtureSchedule, mixture_sources
from molmo_model.data.example import Example
from molmo_model.data.order import (
    Ints,
    Keys,
    Order,
    SampledSchedule,
    Schedule,
    Source,
    Window,
    key_of,
    resolve_shares,
    subkey,
)
from molmo_model.data.packing import NOTHING_KNOWN, Known
from molmo_model.data.rates import resolve_rates, tree
from molmo_model.data.shard_reader import ShardReader, numbers, read_columns
from molmo_model.errors import ArtifactError, ConfigError, DataError

SCHEMA = "molmo/mixture"
VERSION = 2
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
    """[N + 1] where each example's conversations begin in the two arrays below, counted from the first of these."""
    conversations: Ints
    """[M] numbers of the conversations that the entry keeps."""
    conversation_tokens: Ints
    """[M] tokens of each."""
    groups: tuple[str, ...] = ()
    """Names of the groups that it stands in, from the outermost."""
    size: float = 0
    """What the root-size rule takes for its size."""


@dataclass(frozen=True)
class _Costs:
    """The arrays of all entries, one entry after the other; those of a file are mapped."""

    rows: Ints
    keys: Keys
    tokens: NDArray[Any]
    crops: NDArray[Any]
    starts: NDArray[Any]
    """[N + 1] where each example's conversations begin."""
    conversations: NDArray[Any]
    conversation_tokens: NDArray[Any]

    @classmethod
    def of(cls, entries: "Sequence[Entry]") -> "_Costs":
        names = ("rows", "keys", "tokens", "crops", "conversations", "conversation_tokens")
        joined = {name: np.concatenate([getattr(entry, name) for entry in entries]) for name in names}
        counts = np.concatenate([np.diff(entry.starts) for entry in entries])
        return cls(**joined, starts=np.cumsum(np.concatenate([[0], counts])).astype(np.int64))


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
    weight: float = 1.0
    """Factor on the loss of these conversations: that of the entry."""


class Mixture:
    """The stream of a run: its entries, its order and its costs.

    Args:
        seed: of the experiment.
        entries: sorted by name, so that their order in a file does not matter.
        schedule: made of the entries' shares.
        info: the rest of `mixture.json`.
        planned: packs of each window, for the packing that `info` describes.
        costs: the entries' arrays, joined, where they are at hand.
    """

    def __init__(
        self,
        seed: int,
        entries: Sequence[Entry],
        schedule: Schedule | SampledSchedule,
        info: Mapping[str, Any] | None = None,
        planned: Known = NOTHING_KNOWN,
        costs: _Costs | None = None,
    ) -> None:
        self.seed, self.entries, self.info, self.planned = seed, list(entries), dict(info or {}), planned
        self._costs = costs or _Costs.of(self.entries)
        sources = [Source(entry.name, entry.config.dataset, entry.rows, entry.keys) for entry in self.entries]
        self.order = Order(seed, sources, schedule, self._costs.keys)
        limits = [entry.config.max_conversations for entry in self.entries]
        self._limits: Ints = np.array([_NO_LIMIT if limit is None else limit for limit in limits], np.int64)
        sizes = [len(entry.rows) for entry in self.entries]
        self._bases: Ints = np.cumsum([0, *sizes])[:-1].astype(np.int64)

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
            costs, names = map_table(path / "costs.arrow"), [raw["name"] for raw in info["entries"]]
            shares = [raw["share"] for raw in info["entries"]]
            known = numbers(read_columns(path / "schedule.parquet")["entry"])
            counts = numbers(read_columns(path / "packs.parquet")["packs"]).astype(np.int64)
            packs = numbers(map_table(path / "packs.arrow")["pack"])
            joined = _joined(costs)
            edges = np.cumsum([0, *(raw["examples"] for raw in info["entries"])])
            if edges[-1] != len(joined.rows):
                raise ArtifactError(f"{path}/costs.arrow has {len(joined.rows)} examples, mixture.json {edges[-1]}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is no readable mixture ({error}); run the mixture stage") from error
        entries = [_entry_of(joined, raw, *edges[i : i + 2]) for i, raw in enumerate(info["entries"])]
        kind = MixtureSchedule(info["schedule"])
        schedule = _schedule(kind, info["seed"], dict(zip(names, shares, strict=True)), known)
        return cls(info["seed"], entries, schedule, info, Known(counts, packs), joined)

    def save(self, path: str | Path, names: Mapping[str, Sequence[str]]) -> None:
        """Writes the files; equal mixtures give equal bytes.

        Args:
            path: folder.
            names: example ids by dataset and row, for people who read `costs.arrow`.
        """
        path = Path(path)
        _write(pa.concat_tables([_cost_table(i, e, names) for i, e in enumerate(self.entries)]), path / "costs.arrow")
        planned = 0 if self.planned.packs is None else len(self.planned.packs)
        schedule = self.order.schedule
        known = schedule.table if isinstance(schedule, Schedule) else schedule.known(planned).ravel()
        pq.write_table(pa.table({"entry": known}), path / "schedule.parquet", compression="zstd")
        counts = np.asarray(self.planned.counts, np.int32)
        pq.write_table(pa.table({"packs": counts}), path / "packs.parquet", compression="zstd")
        packs = np.zeros(0, np.uint16) if self.planned.packs is None else self.planned.packs
        _write(pa.table({"pack": packs}), path / "packs.arrow")
        document = {**self.info, "version": VERSION, "seed": self.seed, "period": schedule.period}
        document["schedule"] = "sampled" if isinstance(schedule, SampledSchedule) else "stratified"
        document["entries"] = [self._describe(entry) for entry in self.entries]
        document["mixture"] = self.tree()
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        write_text_atomic(path / "mixture.json", text + "\n")

    def tree(self) -> dict[str, Any]:
        """Groups and entries as resolved: rate, size, and of each entry the examples that the planned run is expected
        to draw, those that it draws, and how often it goes through its data."""
        packing = self.info.get("packing", {})
        examples, drawn = packing.get("examples", 0), packing.get("drawn", {})
        shown: dict[str, Any] = {}
        for entry in self.entries:
            rate, count = entry.share / self.order.schedule.period, drawn.get(entry.name, 0)
            shown[entry.name] = {
                "rate": round(rate, 9),
                "size": round(entry.size, 3),
                "examples": len(entry.rows),
                "expected_examples": round(rate * examples, 3),
                "drawn_examples": count,
                "epochs": round(count / len(entry.rows), 4),
            }
        return tree(self.info.get("groups", {}), {entry.name: entry.groups for entry in self.entries}, shown)

    def costs_at(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Tokens and crops of `count` positions from `start`."""
        window = self.order.window(start, count)
        examples = self._bases[window.entries] + window.examples
        return self._tokens_of(window, examples), self._costs.crops[examples].astype(np.int64)

    def draws(self, positions: Sequence[int]) -> list[Draw]:
        """What stands at these positions."""
        window = self.order.at(positions)
        examples = self._bases[window.entries] + window.examples
        tokens, crops = self._tokens_of(window, examples), self._costs.crops[examples]
        owner, flat = self._choose(window, examples)
        chosen: list[list[int]] = [[] for _ in positions]
        for i, conversation in zip(owner.tolist(), self._costs.conversations[flat].tolist(), strict=True):
            chosen[i].append(conversation)
        entries = [self.entries[number] for number in window.entries]
        return [
            Draw(
                position=position,
                entry=entries[i].name,
                dataset=entries[i].config.dataset,
                row=int(self._costs.rows[examples[i]]),
                epoch=int(window.epochs[i]),
                conversations=tuple(chosen[i]),
                key=int(window.draws[i]),
                tokens=int(tokens[i]),
                crops=int(crops[i]),
                weight=entries[i].config.weight,
            )
            for i, position in enumerate(positions)
        ]

    def _tokens_of(self, window: Window, examples: Ints) -> Ints:
        owner, _, flat = self._all(examples)
        sums = np.bincount(owner, self._costs.conversation_tokens[flat], minlength=len(examples))
        counts = np.bincount(owner, minlength=len(examples))
        over = np.flatnonzero(counts > self._limits[window.entries])
        if len(over):
            owner, flat = self._choose(window.take(over), examples[over])
            sums[over] = np.bincount(owner, self._costs.conversation_tokens[flat], minlength=len(over))
        return self._costs.tokens[examples] + sums.astype(np.int64)

    def _all(self, examples: Ints) -> tuple[Ints, Ints, Ints]:
        """All conversations of the examples: whose each is, the how manieth of its own, and its place in `_costs`."""
        starts = self._costs.starts[examples].astype(np.int64)
        counts = self._costs.starts[examples + 1] - starts
        owner = np.repeat(np.arange(len(examples)), counts)
        inner = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return owner, inner, np.repeat(starts, counts) + inner

    def _choose(self, window: Window, examples: Ints) -> tuple[Ints, Ints]:
        """The conversations that each position draws: its number in the window, and the conversation's place in
        `_costs`. They are those with the smallest scores, in the order of their scores."""
        owner, inner, flat = self._all(examples)
        order = np.lexsort((subkey(window.draws[owner], self._costs.conversations[flat]), owner))
        keep = inner < self._limits[window.entries][owner]  # after sorting, `inner` is the rank among one owner's
        return owner[keep], flat[order][keep]

    def _describe(self, entry: Entry) -> dict[str, Any]:
        return {
            "name": entry.name,
            "group": "/".join(entry.groups),
            "dataset": entry.config.dataset,
            "styles": list(entry.config.styles),
            "max_conversations": entry.config.max_conversations,
            "weight": entry.config.weight,
            "requested_rate": entry.config.rate,
            "requested_size": entry.config.size,
            "size": entry.size,
            "share": entry.share,
            "rate": entry.share / self.order.schedule.period,
            "examples": len(entry.rows),
            "conversations": len(entry.conversations),
        }


def resolve(
    mixture: Mapping[str, MixtureEntry],
    seed: int,
    readers: Mapping[str, ShardReader],
    cost_of: CostOf,
    schedule: MixtureSchedule = MixtureSchedule.stratified,
    left_out: Collection[tuple[str, str]] = (),
) -> Mixture:
    """The mixture of a run.

    Args:
        mixture: `runs.<run>.mixture` of the params.
        seed: of the experiment.
        readers: shards by dataset.
        cost_of: what an example costs; gets it without its pictures' bytes (`ShardReader.facts`).
        schedule: how positions are dealt to the entries.
        left_out: dataset and id of training examples that no entry draws, whatever its styles.

    Raises:
        ConfigError: an entry has a setting that is out of range.
        DataError: no training example of a dataset has a conversation that the entry keeps, or all that do are left
            out.
    """
    sources = mixture_sources(mixture)
    for name, config in sources.items():
        if config.max_conversations is not None and config.max_conversations < 1:
            raise ConfigError(
                f"mixture entry {name!r}: max_conversations is {config.max_conversations}; at least 1, or null"
            )
    costs: dict[tuple[str, int], ExampleCost] = {}

    def cost_at(dataset: str, row: int) -> ExampleCost:
        if (dataset, row) not in costs:  # entries may share a dataset
            costs[dataset, row] = cost_of(readers[dataset].facts(row))
        return costs[dataset, row]

    without = set(left_out)
    found = {name: _resolve_entry(name, sources[name], readers, cost_at, without) for name in sorted(sources)}
    nodes = resolve_rates(mixture, {name: len(entry.rows) for name, entry in found.items()})
    by_name = {node.name: node for group in nodes for node in group.sources()}
    shares = resolve_shares({name: by_name[name].rate for name in found})
    entries = [
        replace(entry, share=shares[name], groups=by_name[name].groups, size=by_name[name].size)
        for name, entry in found.items()
    ]
    info = {"groups": {group.path: group.described() for node in nodes for group in node.groups_in_it()}}
    return Mixture(seed, entries, _schedule(schedule, seed, shares), info if info["groups"] else {})


def _schedule(
    kind: MixtureSchedule, seed: int, shares: Mapping[str, int], known: NDArray[Any] | None = None
) -> Schedule | SampledSchedule:
    """Args:
    known: what a saved mixture keeps of its schedule.
    """
    if kind is MixtureSchedule.stratified:
        return Schedule(list(shares.values()), known)
    counted = None if known is None else known.astype(np.int64).reshape(-1, len(shares))
    return SampledSchedule(list(shares.values()), key_of("schedule", seed), counted)


def _resolve_entry(
    name: str,
    config: MixtureEntry,
    readers: Mapping[str, ShardReader],
    cost_at: Callable[[str, int], ExampleCost],
    left_out: Collection[tuple[str, str]],
) -> Entry:
    reader = readers[config.dataset]
    ids, styles = reader.index["id"], reader.index["styles"]
    rows, keys, tokens, crops, starts = [], [], [], [], [0]
    conversations: list[int] = []
    conversation_tokens: list[int] = []
    seen: set[str] = set()
    without = 0
    for row in reader.rows("train"):
        of_row, one = styles[row].as_py(), ids[row].as_py()
        seen.update(of_row)
        kept = _kept(config, of_row)
        if not kept:
            continue
        if (config.dataset, one) in left_out:
            without += 1
            continue
        cost = cost_at(config.dataset, row)
        rows.append(row)
        keys.append(key_of(one))
        tokens.append(cost.tokens)
        crops.append(cost.crops)
        conversations += kept
        conversation_tokens += [cost.conversations[i] for i in kept]
        starts.append(len(conversations))
    if without and not rows:
        raise DataError(
            f"mixture entry {name!r}: nothing is left to draw; all its {without} examples of dataset "
            f"{config.dataset!r} show an evaluation picture and runs.<run>.leaks leaves such out; take the entry out, "
            "or the evaluation pictures"
        )
    if unknown := sorted(set(config.styles) - seen) or ([] if rows else ["any"]):
        raise DataError(
            f"mixture entry {name!r}: no training example of dataset {config.dataset!r} has a conversation of style "
            f"{', '.join(unknown)}; it has {', '.join(sorted(seen)) or 'none'}"
        )
    return Entry(
        name=name,
        config=config,
        share=0,
        rows=np.array(rows, np.int64),
        keys=np.array(keys, np.uint64),
        tokens=np.array(tokens, np.int64),
        crops=np.array(crops, np.int64),
        starts=np.array(starts, np.int64),
        conversations=np.array(conversations, np.int64),
        conversation_tokens=np.array(conversation_tokens, np.int64),
    )


def _kept(config: MixtureEntry, styles: Sequence[str]) -> list[int]:
    """Which conversations of an example an entry keeps, by their styles."""
    return [i for i, style in enumerate(styles) if not config.styles or style in config.styles]


def _cost_table(number: int, entry: Entry, names: Mapping[str, Sequence[str]]) -> pa.Table:
    ids = names[entry.config.dataset]
    starts = pa.array(entry.starts - entry.starts[0], pa.int32())
    lists = [
        pa.ListArray.from_arrays(starts, pa.array(values, pa.int32()))
        for values in (entry.conversations, entry.conversation_tokens)
    ]
    return pa.table(
        {
            "entry": np.full(len(entry.rows), number, np.int16),
            "id": pa.array([ids[row] for row in entry.rows], pa.large_string()),
            "row": entry.rows,
            "key": entry.keys,
            "tokens": entry.tokens.astype(np.int32),
            "crops": entry.crops.astype(np.int32),
            "conversations": lists[0],
            "conversation_tokens": lists[1],
        }
    )


def _write(table: pa.Table, path: Path) -> None:
    """As one uncompressed batch, which can be mapped."""
    table = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(table.num_rows, 1))


def map_table(path: Path) -> pa.Table:
    """An `.arrow` file of a mixture: mapped, so that nothing is read before it is used."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _joined(costs: pa.Table) -> _Costs:
    conversations, tokens = (costs[name].chunk(0) for name in ("conversations", "conversation_tokens"))
    return _Costs(
        rows=numbers(costs["row"]),
        keys=numbers(costs["key"]),
        tokens=numbers(costs["tokens"]),
        crops=numbers(costs["crops"]),
        starts=numbers(conversations.offsets),
        # not `flatten`, which imports all of arrow's compute functions
        conversations=numbers(conversations.values),
        conversation_tokens=numbers(tokens.values),
    )


def _entry_of(costs: _Costs, raw: Mapping[str, Any], first: int, last: int) -> Entry:
    fields = ("dataset", "styles", "max_conversations", "weight")
    config = MixtureEntry(
        rate=raw["requested_rate"], size=raw["requested_size"], **{name: raw[name] for name in fields}
    )
    starts = costs.starts[first : last + 1]
    kept = slice(starts[0], starts[-1])
    return Entry(
        name=raw["name"],
        config=config,
        share=raw["share"],
        rows=costs.rows[first:last],
        keys=costs.keys[first:last],
        tokens=costs.tokens[first:last],
        crops=costs.crops[first:last],
        starts=starts,
        conversations=costs.conversations[kept],
        conversation_tokens=costs.conversation_tokens[kept],
        groups=tuple(filter(None, raw["group"].split("/"))),
        size=raw["size"],
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


Files = tuple[str, str, list[str]]
"""Dataset, example id, and the SHA-256 of its pictures and films."""


def two_sides(mixture: Mixture, readers: Mapping[str, ShardReader]) -> tuple[list[Files], list[Files]]:
    """The examples that the mixture draws, and the evaluation examples of all datasets, with their files."""
    trained = {(entry.config.dataset, row) for entry in mixture.entries for row in entry.rows.tolist()}
    return _files_of(trained, readers)


def _files_of(
    trained: Collection[tuple[str, int]], readers: Mapping[str, ShardReader]
) -> tuple[list[Files], list[Files]]:
    held_out = {(name, row) for name, reader in readers.items() for row in reader.rows("eval")}
    columns = {name: (reader.index["id"].to_pylist(), reader.files()) for name, reader in readers.items()}
    sides = (
        [(name, columns[name][0][row], columns[name][1][row]) for name, row in sorted(rows)]
        for rows in (trained, held_out)
    )
    train, evaluation = sides
    return train, evaluation


def check_leaks(mixture: Mixture, readers: Mapping[str, ShardReader], allowed: Iterable[str] = ()) -> list[Leak]:
    """Evaluation pictures among the examples that the mixture draws.

    Args:
        mixture: what is trained on.
        readers: shards by dataset, those that tasks ask among them; the evaluation rows of all of them count.
        allowed: ids of training examples whose leak is accepted and only noted.

    Returns:
        The accepted leaks.

    Raises:
        DataError: there are others; names the first of them.
    """
    leaks = image_leaks(*two_sides(mixture, readers))
    refused = [leak for leak in leaks if leak.train[1] not in set(allowed)]
    if refused:
        lines = [f"train {leak.train} = eval {leak.eval}" for leak in refused[:10]]
        raise DataError(
            f"{len(refused)} training examples show an evaluation picture, so scores would count memory: "
            f"{'; '.join(lines)}{'; ...' if len(refused) > 10 else ''}; take them out of one of the two splits, or "
            "accept them by id in runs.<run>.allow_leaks, or leave all of them out with runs.<run>.leaks: drop"
        )
    return leaks


def leaks_to_drop(
    mixture: Mapping[str, MixtureEntry], readers: Mapping[str, ShardReader], allowed: Iterable[str] = ()
) -> list[Leak]:
    """The leaks of the examples that `resolve` must leave out, for no other than the allowed ones to remain.

    Args:
        mixture: `runs.<run>.mixture` of the params.
        readers: as `check_leaks`.
        allowed: ids of training examples whose leak is accepted; they stay.
    """
    drawn: set[tuple[str, int]] = set()
    for entry in mixture_sources(mixture).values():
        reader = readers[entry.dataset]
        styles = reader.index["styles"]
        drawn |= {(entry.dataset, row) for row in reader.rows("train") if _kept(entry, styles[row].as_py())}
    accepted = set(allowed)
    return [leak for leak in image_leaks(*_files_of(drawn, readers)) if leak.train[1] not in accepted]


def described_leaks(leaks: Iterable[Leak]) -> list[dict[str, Any]]:
    """The examples that were left out for their leaks, for `mixture.json`: each with the evaluation examples whose
    pictures it shows (of a picture that several of them ask about, one)."""
    shown: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for leak in leaks:
        shown.setdefault(leak.train, {})[leak.eval] = None
    return [
        {"dataset": dataset, "id": one, "shows": [{"dataset": of, "id": name} for of, name in held_out]}
        for (dataset, one), held_out in shown.items()
    ]
