"""Packing of image and video traces beside Molmo2's packer: how full, how much CPU, how level over ranks.

A trace is the tokens and crops of a stream of examples: images at the sizes of photos with up to eight crops of SigLIP
and a text; mixed with them films of up to 128 frames (35%) and texts (10%). Ours packs windows of 4,096 examples; every
example stands in a pack. The peer is allenai/molmo2's `DynamicSolver` from its own file, 48 examples buffered, its
image weight 1 or 30 (its default, and that of its fine-tuning), whichever fills better; the examples that stay in its
buffer do not count. Only its choosing is timed: packs are lists of numbers, no arrays are joined.

Both sides are checked: each example in one pack, no pack above its tokens or crops.

    python -m benchmarks.packer [--quick] [--peer DIR]
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.molmo2_files import COMMIT, load, molmo2
from benchmarks.side_by_side import Sizes, in_turn, result, timed
from molmo_model.config import PackingMethod
from molmo_model.data.packing import Capacity, Packing, assign, full_packs
from molmo_model.model_config import CropMode
from molmo_model.preprocessing.tiling import TilingSpec, layout

Ints = NDArray[np.int64]
Trace = tuple[Ints, Ints]
"""Tokens and crops of each example."""
Packs = list[list[int]]

SPEC = TilingSpec(378, 14, (2, 2), (4, 4), max_crops=8, mode=CropMode.overlap_and_resize_c2)
WINDOW = 4096
QUICK = 1024
"""Examples that are timed with --quick."""
STEP = 32
"""Packs of an optimizer step, as ranks share them."""
WORLDS = (2, 4, 8)
BUFFER, WEIGHTS = 48, (1.0, 30.0)
"""Of the peer."""


def images(count: int, rng: np.random.Generator) -> Trace:
    """Photos of about 800 x 600 pixels with a text of about 120 tokens."""
    area, aspect = np.exp(rng.normal(np.log(800 * 600), 0.8, count)), np.exp(rng.normal(0.15, 0.35, count))
    sides = np.maximum(np.sqrt([area / aspect, area * aspect]), 32).astype(int)
    layouts = [layout(height, width, SPEC) for height, width in sides.T.tolist()]
    tokens = np.array([len(one.tokens) for one in layouts]) + _text(count, 120, 0.9, rng)
    return tokens, np.array([one.crops for one in layouts])


def mixed(count: int, rng: np.random.Generator) -> Trace:
    """Images, films at two frames a second (each a crop, 81 tokens and its time), and texts."""
    tokens, crops = images(count, rng)
    kind = rng.random(count)
    film, text = kind < 0.35, kind > 0.9
    frames = np.clip(np.ceil(np.exp(rng.normal(np.log(70), 0.8, count))), 8, 128).astype(np.int64)
    tokens = np.where(film, frames * 90 + _text(count, 150, 0.8, rng), tokens)
    tokens = np.where(text, _text(count, 600, 0.9, rng), tokens)
    return tokens, np.where(film, frames, np.where(text, 0, crops))


def _text(count: int, median: float, spread: float, rng: np.random.Generator) -> Ints:
    return np.clip(np.exp(rng.normal(np.log(median), spread, count)), 12, 1500).astype(np.int64)


def ours(trace: Trace, capacity: Capacity) -> Packs:
    """The packs of all windows."""
    starts = range(0, len(trace[0]), WINDOW)
    parts = [(start, full_packs(*(one[start : start + WINDOW] for one in trace), capacity)) for start in starts]
    return [[start + item for item in pack] for start, packs in parts for pack in packs]


class Peer:
    """molmo2's packer."""

    def __init__(self, folder: Path) -> None:
        self._module = load(
            folder,
            "olmo/data/dynamic_packer.py",
            {
                "olmo.config": {"BaseConfig": object},
                "olmo.models.molmo_point.molmo_point_example_preprocessor": {"NO_POINTS_LABEL": None},
                "olmo.preprocessing.preprocessor_utils": {"TOKEN_POOLING_KEYS": ()},
                "olmo.dist_util": {"get_cp_mesh": None},
                "olmo.torch_util": {"get_rank": None},
            },
        )
        self._module.pack_with_cp = lambda *examples, **_: [one["number"] for one in examples]

    def __call__(self, trace: Trace, capacity: Capacity, weight: float) -> Packs:
        config = self._module.PackingConfig(buffer_size=BUFFER, image_weight=weight)
        solver = config.bulid(capacity.tokens, capacity.crops)
        given = zip(*(one.tolist() for one in trace), strict=True)
        examples = [
            {"input_tokens": range(tokens), "images": range(crops), "number": i}
            for i, (tokens, crops) in enumerate(given)
        ]
        packs = [solver(i, one) for i, one in enumerate(examples)]
        return [pack for pack in packs if pack is not None]


def check(packs: Packs, trace: Trace, capacity: Capacity, left_over: int) -> None:
    """Each example in at most one pack, all but `left_over` in one, none above its capacity."""
    numbers = [item for pack in packs for item in pack]
    assert len(set(numbers)) == len(numbers) == len(trace[0]) - left_over
    for pack in packs:
        assert trace[0][pack].sum() <= capacity.tokens and trace[1][pack].sum() <= capacity.crops


def fill(packs: Packs, trace: Trace, capacity: Capacity) -> dict[str, float]:
    """Share of the packs' tokens and crops that are used."""
    items = np.concatenate([np.asarray(pack) for pack in packs])
    return {
        "tokens": round(float(trace[0][items].sum() / (len(packs) * capacity.tokens)), 4),
        "crops": round(float(trace[1][items].sum() / (len(packs) * capacity.crops)), 4),
    }


def imbalance(costs: Sequence[float], world: int, balanced: bool) -> dict[str, float]:
    """Largest by mean cost of the ranks over a step: mean over the steps, the worst step, and the share of steps above
    1.03. Without balance, packs are dealt in turn."""
    worst = []
    for start in range(0, len(costs) - STEP + 1, STEP):
        step = costs[start : start + STEP]
        dealt = assign(step if balanced else [1.0] * STEP, world)
        loads = [sum(step[pack] for pack in mine) for mine in dealt]
        worst.append(max(loads) / (sum(loads) / world))
    above = sum(one > 1.03 for one in worst) / len(worst)
    return {"mean": round(float(np.mean(worst)), 4), "worst": round(max(worst), 4), "above_1.03": round(above, 4)}


def levels(trace: Trace, capacity: Capacity, peer_packs: Packs) -> dict[str, Any]:
    """Imbalance by number of ranks: ours, ours if crops were all that costs, and the peer's packs in turn."""
    tokens, crops = trace
    packing = Packing(
        lambda start, count: (tokens[start : start + count], crops[start : start + count]),
        capacity,
        WINDOW,
        method=PackingMethod.balanced,
        step=STEP,
    )
    numbers = range(sum(len(packing.packs_of(window)) for window in range(len(tokens) // WINDOW)))
    costs = [packing.cost(number) for number in numbers]
    of_crops = [float(crops[packing.pack(number)].sum()) for number in numbers]
    per_crop = (max(costs) - min(costs)) / max(max(of_crops) - min(of_crops), 1)
    peer_costs = [capacity.tokens + per_crop * float(crops[pack].sum()) for pack in peer_packs]
    return {
        f"{world} ranks": {
            "ours": imbalance(costs, world, True),
            "ours_crops_alone": imbalance(of_crops, world, True),
            "peer": imbalance(peer_costs, world, False),
        }
        for world in WORLDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one window of each trace, not three")
    parser.add_argument("--peer", type=Path, help=f"a checkout of allenai/molmo2, commit {COMMIT[:12]}")
    args = parser.parse_args()
    peer = Peer(molmo2(args.peer))
    rng = np.random.default_rng(0)
    windows, timed_examples = (1, QUICK) if args.quick else (3, WINDOW)
    photos, films = images(windows * WINDOW, rng), mixed(windows * WINDOW, rng)
    traces = {
        "image 4k": (photos, Capacity(4096, 32)),
        "image 16k": (photos, Capacity(16384, 128)),
        "mixed 16k": (films, Capacity(16384, 128)),
    }
    times, fills, peer_fills, level = Sizes(), {}, {}, {}
    for name, (trace, capacity) in traces.items():
        mine = ours(trace, capacity)
        check(mine, trace, capacity, 0)
        theirs = {weight: peer(trace, capacity, weight) for weight in WEIGHTS}
        weight = max(WEIGHTS, key=lambda one: fill(theirs[one], trace, capacity)["tokens"])
        check(theirs[weight], trace, capacity, len(trace[0]) - sum(map(len, theirs[weight])))
        fills[name], peer_fills[name] = (fill(packs, trace, capacity) for packs in (mine, theirs[weight]))
        level[name] = levels(trace, capacity, theirs[weight])
        part = (trace[0][:timed_examples], trace[1][:timed_examples])
        times[name] = in_turn(
            {
                "peer": partial(timed, partial(peer, capacity=capacity, weight=weight), [part]),
                "ours": partial(timed, partial(ours, capacity=capacity), [part]),
            },
            rounds=5,
        )
        print(name, fills[name], "peer", peer_fills[name], f"CPU ratio {ratio(times, name)}", flush=True)
    report(times, fills, peer_fills, level, timed_examples)


def ratio(times: Sizes, name: str) -> float:
    """How many times less CPU."""
    return Sizes({name: times[name]}).ratio(clock=1)


def report(
    times: Sizes, fills: dict[str, Any], peer_fills: dict[str, Any], level: dict[str, Any], examples: int
) -> None:
    """The JSON object."""
    by_trace = {name: ratio(times, name) for name in times}
    result(
        "packer",
        unit="ms of CPU for 1,000 examples, geometric mean over the traces",
        ours=round(times.mean("ours", clock=1) * 1000 / examples, 3),
        peer=round(times.mean("peer", clock=1) * 1000 / examples, 3),
        peer_name="allenai/molmo2 DynamicSolver",
        ratio=times.ratio(clock=1),
        spread=times.spread(),
        goal=10,
        ratio_by_trace=by_trace,
        fill=fills,
        peer_fill=peer_fills,
        as_full=all(fills[name]["tokens"] >= peer_fills[name]["tokens"] for name in fills),
        imbalance=level,
        packs_per_step=STEP,
        window=WINDOW,
        state_bytes_per_example=2,
        versions={"molmo2": COMMIT[:12]},
    )


if __name__ == "__main__":
    main()
