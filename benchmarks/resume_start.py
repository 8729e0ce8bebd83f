"""From a checkpoint's step number to the first pack's examples, beside the reference's replay of its draws.

A mixture of 80 datasets in a root-size group, packs of 16,384 tokens, 256 examples a step, the whole run planned. Ours
opens the mixture as a training does, from its files, and asks for the first pack of a step; the examples' own files are
read by neither side. The peer is allenai/molmo2's `IterableDatasetMixture` from its own file over datasets of the same
sizes and rates; it draws again all that was drawn before, so it is timed at early steps, and its time at the run's last
step is extrapolated along the line through them (`peer_extrapolated`). `ratio` compares both at the same early step.

Checked: a resumed stream goes on as an unbroken one, on both sides; both draw the datasets at their rates.

    python -m benchmarks.resume_start [--quick] [--peer DIR]
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.molmo2_files import COMMIT, load, molmo2
from benchmarks.packer import images
from benchmarks.side_by_side import Seconds, in_turn, milliseconds, result, timed
from molmo_model.config import MixtureEntry, PackingMethod, TrainConfig
from molmo_model.data.mixture import Draw, Entry, Mixture
from molmo_model.data.order import Schedule, key_of, mix, resolve_shares
from molmo_model.data.plan import Plan, plan_packs

SOURCES, EXAMPLES_PER_STEP = 80, 256
PACKS_PER_STEP = 18
"""Of 16,384 tokens: about 256 examples."""
PEER_STEPS = (50, 100)
"""Where the peer is timed."""


def train_config(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        packs_per_step=PACKS_PER_STEP,
        sequence_length=16384,
        crops_per_pack=128,
        packing_window=4096,
        packing=PackingMethod.balanced,
        save_every=steps,
    )


def sizes(largest: int) -> list[int]:
    """Examples of each dataset, from 2,000 to `largest`."""
    return np.geomspace(2000, largest, SOURCES).astype(int).tolist()


def entry(number: int, size: int, share: int, rng: np.random.Generator) -> Entry:
    """A dataset of examples like photos, two conversations each."""
    tokens, crops = images(1024, rng)
    chosen = rng.integers(0, 1024, size)
    return Entry(
        name=f"source{number:02}",
        config=MixtureEntry(dataset=f"dataset{number:02}"),
        share=share,
        rows=np.arange(size),
        keys=mix(np.arange(size, dtype=np.uint64) + np.uint64(key_of(number))),
        tokens=tokens[chosen] // 2,
        crops=crops[chosen],
        starts=2 * np.arange(size + 1),
        conversations=np.tile([0, 1], size),
        conversation_tokens=np.repeat(tokens[chosen] // 4, 2),
    )


def write_mixture(folder: Path, steps: int, largest: int) -> list[Fraction]:
    """The artefact of the run; returns the rates."""
    rng = np.random.default_rng(0)
    shares = resolve_shares({f"source{i:02}": size**0.5 for i, size in enumerate(sizes(largest))})
    given = zip(sizes(largest), shares.values(), strict=True)
    entries = [entry(number, size, share, rng) for number, (size, share) in enumerate(given)]
    mixture = Mixture(7, entries, Schedule(list(shares.values())))
    planned = plan_packs(Plan.of(mixture, {}, train_config(steps)), steps * PACKS_PER_STEP)
    planned.save(folder, {one.config.dataset: range_of_ids(len(one.rows)) for one in entries})
    return [Fraction(share, sum(shares.values())) for share in shares.values()]


def range_of_ids(size: int) -> Sequence[str]:
    return [f"example-{row:07}" for row in range(size)]


def ours(folder: Path, steps: int, step: int) -> list[Draw]:
    """The first pack of a step, from nothing."""
    plan = Plan.of(Mixture.load(folder), {}, train_config(steps))
    return plan.pack((step - 1) * PACKS_PER_STEP)


class Dataset:
    """What the peer's mixture asks of a dataset."""

    def __init__(self, number: int, size: int) -> None:
        self._number, self._size = number, size

    def __len__(self) -> int:
        return self._size

    def get(self, item: int, epoch: int) -> tuple[int, int, int]:
        return self._number, item, epoch


class Peer:
    """molmo2's mixture."""

    def __init__(self, folder: Path, rates: Sequence[Fraction], largest: int) -> None:
        def seeded(*seeds: int) -> np.random.RandomState:
            state = np.random.SeedSequence(seeds[0], spawn_key=seeds[1:])
            return np.random.RandomState(np.random.MT19937(state))

        self._mixture = load(
            folder,
            "olmo/data/iterable_dataset_mixture.py",
            {
                "olmo.data.dataset": {"DeterministicDataset": object},
                "olmo.data.utils": {"make_random_state": seeded},
                "olmo.torch_util": dict.fromkeys(("get_world_size", "get_global_rank", "get_rank")),
                "olmo.dist_util": dict.fromkeys(("get_dp_process_group", "get_cp_mesh")),
            },
        ).IterableDatasetMixture
        self._datasets = [Dataset(number, size) for number, size in enumerate(sizes(largest))]
        self._rates = [float(rate) for rate in rates]

    def draws(self, start: int, count: int, stratify: bool = False) -> list[tuple[int, int, int]]:
        """Dataset, example and epoch of `count` positions from `start`."""
        mixture = self._mixture(
            self._datasets,
            EXAMPLES_PER_STEP,
            mixture_rates=self._rates,
            seed=7,
            start_index=start,
            world_size=1,
            rank=0,
            stratify=stratify,
        )
        mixture.mixture_rates = np.array(self._rates) / sum(self._rates)  # float32 rates do not sum to 1 for numpy
        return list(itertools.islice(mixture, count))


def check(folder: Path, steps: int, peer: Peer, rates: Sequence[Fraction]) -> None:
    """Resumed streams go on like unbroken ones, and datasets come at their rates."""
    plan = Plan.of(Mixture.load(folder), {}, train_config(steps))
    unbroken = [plan.pack(number) for number in range(3 * PACKS_PER_STEP)]
    assert ours(folder, steps, 3) == unbroken[2 * PACKS_PER_STEP]
    forgetful = Mixture.load(folder)
    forgetful.info["packing"] = {}
    assert Plan.of(forgetful, {}, train_config(steps)).pack(PACKS_PER_STEP) == unbroken[PACKS_PER_STEP]
    count = 20 * EXAMPLES_PER_STEP
    theirs = peer.draws(0, count)
    assert peer.draws(count - 9, 9) == theirs[-9:]
    for drawn in ([number for number, _, _ in theirs], plan.mixture.order.window(0, count).entries):
        found = np.bincount(drawn, minlength=SOURCES)
        due = np.array([float(rate) for rate in rates]) * count
        assert (np.abs(found - due) < 6 * np.sqrt(due) + 1).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a run of 2,000 steps of 0.5 million examples")
    parser.add_argument("--peer", type=Path, help=f"a checkout of allenai/molmo2, commit {COMMIT[:12]}")
    args = parser.parse_args()
    steps, largest = (2000, 16_000) if args.quick else (30_000, 300_000)
    clone = molmo2(args.peer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = write_mixture(folder, steps, largest)
        peer = Peer(clone, rates, largest)
        check(folder, steps, peer, rates)
        contestants: dict[str, Callable[[], Sequence[Seconds]]] = {}
        for step in PEER_STEPS:
            start = step * EXAMPLES_PER_STEP
            contestants[f"peer {step}"] = partial(timed, partial(peer.draws, count=1), [start])
        contestants["peer stratified 5"] = partial(
            timed, partial(peer.draws, count=1, stratify=True), [5 * EXAMPLES_PER_STEP]
        )
        for step in (*PEER_STEPS, steps):
            contestants[f"ours {step}"] = partial(timed, partial(ours, folder, steps), [step])
        times = in_turn(contestants, rounds=5)
        size = sum(file.stat().st_size for file in folder.iterdir())
    report(times, steps, sum(sizes(largest)), size)


def report(times: dict[str, list[Seconds]], steps: int, examples: int, size: int) -> None:
    """The JSON object."""
    first, last = PEER_STEPS
    at = {name: milliseconds(seconds) for name, seconds in times.items()}
    per_step = (at[f"peer {last}"] - at[f"peer {first}"]) / (last - first)
    both = zip(times[f"peer {last}"], times[f"ours {last}"], strict=True)
    rounds = [peer[0] / mine[0] for peer, mine in both]
    result(
        "resume_start",
        unit=f"ms to the first pack, at step {last}",
        ours=at[f"ours {last}"],
        peer=at[f"peer {last}"],
        peer_name="allenai/molmo2 IterableDatasetMixture",
        ratio=statistics.median(rounds),
        spread=[round(min(rounds), 1), round(max(rounds), 1)],
        goal=50,
        goal_is="at most 50 ms at the last step",
        ours_at_last_step=at[f"ours {steps}"],
        ours_cpu_at_last_step=milliseconds(times[f"ours {steps}"], clock=1),
        steps=steps,
        milliseconds=at,
        peer_ms_per_step=round(per_step, 3),
        peer_stratified_ms_per_step=round(at["peer stratified 5"] / 5, 3),
        peer_extrapolated=round(at[f"peer {last}"] + per_step * (steps - last), 1),
        sources=SOURCES,
        examples=examples,
        artefact_bytes=size,
        versions={"molmo2": COMMIT[:12]},
    )


if __name__ == "__main__":
    main()
