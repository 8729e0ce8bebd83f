"""The plan of a run's data: mixture, packs and shards joined. What training reads its examples from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from molmo_model.config import PackingMethod, TrainConfig
from molmo_model.data.example import Example
from molmo_model.data.mixture import Draw, Mixture
from molmo_model.data.order import Ints
from molmo_model.data.packing import NOTHING_KNOWN, Capacity, Known, Packing
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ArtifactError

if TYPE_CHECKING:
    from molmo_model.data.range_cache import RangeCache


@dataclass(frozen=True)
class Plan:
    """Everything that training needs to know about its data: the packs, what is in them, and where it lies."""

    mixture: Mixture
    packing: Packing
    readers: Mapping[str, ShardReader]

    @classmethod
    def load(
        cls,
        mixture: str | Path,
        shards: Mapping[str, str | Path],
        train: TrainConfig,
        cache: "RangeCache | None" = None,
    ) -> "Plan":
        """The plan of a run.

        Args:
            mixture: folder of the mixture artefact.
            shards: folder or URL of the shards artefact by dataset.
            train: capacities of a pack and the packing window.
            cache: keeps what comes from a bucket on a local disk.

        Raises:
            ArtifactError: a folder is unfinished, or the shards are not those that the mixture was made from.
        """
        made = Mixture.load(mixture)
        readers = {name: ShardReader(path, cache) for name, path in shards.items()}
        for name, digest in made.info.get("shards", {}).items():
            if name not in readers:
                raise ArtifactError(f"{mixture} needs the shards of dataset {name!r}; given are {sorted(readers)}")
            if readers[name].digest != digest:
                raise ArtifactError(
                    f"{mixture} was made from shards {digest} of dataset {name!r}, {readers[name].place} holds "
                    f"{readers[name].digest}; run the mixture stage again"
                )
        return cls.of(made, readers, train)

    @classmethod
    def of(cls, mixture: Mixture, readers: Mapping[str, ShardReader], train: TrainConfig) -> "Plan":
        """The plan of a mixture at hand; its pack counts are used if they were made for these capacities."""
        capacity = Capacity(train.sequence_length, train.crops_per_pack)
        planned = mixture.info.get("packing", {})
        same = all(planned.get(name) == value for name, value in packing_of(train).items())
        packing = Packing(
            mixture.costs_at,
            capacity,
            train.packing_window,
            mixture.planned if same else NOTHING_KNOWN,
            partial(_name_at, mixture, readers),
            train.packing,
            train.packs_per_step,
        )
        return cls(mixture, packing, readers)

    def pack(self, number: int) -> list[Draw]:
        """The draws of a pack."""
        return self.mixture.draws(self.packing.pack(number))

    def cost(self, number: int) -> float:
        """What a pack costs to compute; ranks are levelled by it."""
        return self.packing.cost(number)

    def read(self, draw: Draw) -> Example:
        """The example of a draw, verified."""
        return self.readers[draw.dataset].read(draw.row)

    def ahead(self, draws: Iterable[Draw]) -> None:
        """Says which draws will be read soon; does not wait for them."""
        rows: dict[str, list[int]] = {}
        for draw in draws:
            rows.setdefault(draw.dataset, []).append(draw.row)
        for dataset, mine in rows.items():
            self.readers[dataset].ahead(mine)

    def id(self, draw: Draw) -> str:
        """The id of a draw's example."""
        return self.readers[draw.dataset].id(draw.row)

    def close(self) -> None:
        """Gives up what is on its way."""
        for reader in self.readers.values():
            reader.close()

    def name(self, draw: Draw) -> str:
        """What to call a draw in an error."""
        return f"example {self.id(draw)!r} of dataset {draw.dataset!r} (row {draw.row})"


def _name_at(mixture: Mixture, readers: Mapping[str, ShardReader], position: int) -> str:
    """What to call a position in an error."""
    (draw,) = mixture.draws([position])
    return f"example {readers[draw.dataset].id(draw.row)!r} of dataset {draw.dataset!r}"


def packing_of(train: TrainConfig) -> dict[str, int | str]:
    """The settings that decide the packs and their order."""
    balanced = {"packs_per_step": train.packs_per_step} if train.packing is PackingMethod.balanced else {}
    return {
        "sequence_length": train.sequence_length,
        "crops_per_pack": train.crops_per_pack,
        "packing_window": train.packing_window,
        "packing": str(train.packing),
        **balanced,
    }


def plan_packs(plan: Plan, packs: int, report: Callable[[int], object] = lambda done: None) -> Mixture:
    """The plan's mixture with the packs of each window counted for a whole run: training then starts anywhere at once.

    Windows are packed whole, so more packs are planned than the run has. `info["packing"]` speaks of the run's own:
    how many examples they hold and how many of each entry, how full they are, how far each entry gets. Only
    `longest_example`, the least that a pack must hold, is that of all planned windows.

    Args:
        plan: what to count.
        packs: packs of the run: steps times packs per step.
        report: called now and then with the number of packs counted so far.

    Raises:
        DataError: an example that the run draws is larger than a pack.
    """
    packing, mixture = plan.packing, plan.mixture
    counts: list[int] = []
    places: list[Ints] = []
    drawn = np.zeros(len(mixture.entries), np.int64)
    examples = tokens = crops = done = longest = 0
    while done < packs:
        start = len(counts) * packing.window
        of_tokens, of_crops = mixture.costs_at(start, packing.window)
        window = packing.packs_of(len(counts))
        places.append(_places(window, start, packing.window))
        counts.append(len(window))
        mine = places[-1] < packs - done  # the last window may have packs after the run's last
        drawn += np.bincount(mixture.order.schedule.entries(start + np.flatnonzero(mine)), minlength=len(drawn))
        examples += int(mine.sum())
        tokens, crops, done = tokens + int(of_tokens[mine].sum()), crops + int(of_crops[mine].sum()), done + counts[-1]
        longest = max(longest, int(of_tokens.max()))
        report(done)
    by_entry = {entry.name: int(count) for entry, count in zip(mixture.entries, drawn, strict=True)}
    capacity = packing.capacity
    settings = {
        "sequence_length": capacity.tokens,
        "crops_per_pack": capacity.crops,
        "packing_window": packing.window,
        "packing": str(packing.method),
    }
    if packing.method is PackingMethod.balanced:
        settings["packs_per_step"] = packing.step
    info = {
        **mixture.info,
        "packing": {
            **settings,
            "packs": packs,
            "planned_packs": done,
            "examples": examples,
            "drawn": by_entry,
            "examples_per_pack": round(examples / max(packs, 1), 4),
            "token_fill": round(tokens / max(packs * capacity.tokens, 1), 6),
            "longest_example": longest,
            "crop_fill": round(crops / max(packs * capacity.crops, 1), 6),
            "epochs": {entry.name: round(by_entry[entry.name] / len(entry.rows), 4) for entry in mixture.entries},
        },
    }
    known = Known(np.array(counts, np.int64), np.concatenate(places) if places else None)
    return Mixture(mixture.seed, mixture.entries, mixture.order.schedule, info, known)


def _places(packs: Sequence[Sequence[int]], start: int, window: int) -> Ints:
    """[window] number of each position's pack within its window."""
    places = np.empty(window, np.min_scalar_type(max(len(packs), 256)))
    for number, pack in enumerate(packs):
        places[np.asarray(pack) - start] = number
    return places
