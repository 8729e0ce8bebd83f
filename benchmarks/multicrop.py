"""From an image's pixels to patches, pooling windows and tokens, on one thread, beside transformers' processor.

Ours gives what its batches hold: uint8, and the ids of the image's tokens; for the comparison also brought into the
peer's form, patches [C, 729, 588]. The peer gives float32 patches, as it does unless told otherwise, and no ids; a
second figure is its time for uint8. Both hold the same tokens and windows, the same uint8 pixels within one level of
255, and with `exact_resize` the same bytes: asserted for every picture.

    python -m benchmarks.multicrop [--quick]
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import Peer
from benchmarks.pictures import SIZES, Pixels, pictures
from benchmarks.side_by_side import Sizes, in_turn, result, timed
from molmo_model.model_config import CropMode
from molmo_model.preprocessing.crops import fill_crops
from molmo_model.preprocessing.tiling import IMAGE_TOKENS, TilingSpec, layout

SPEC = TilingSpec(378, 14, (2, 2), (4, 4), max_crops=8, mode=CropMode.overlap_and_resize_c2)
FIRST_ID = 151_936
"""Id of the first image token."""


def ours(picture: Pixels, *, exact: bool = False) -> tuple[Pixels, Any, Any]:
    """Crops [C, 378, 378, 3], pooling windows [T, 4] and token ids, as the preprocessor makes them."""
    one = layout(*picture.shape[:2], SPEC)
    crops = np.empty((one.crops, SPEC.crop_size, SPEC.crop_size, 3), dtype=np.uint8)
    fill_crops(picture, one, SPEC, "siglip", crops, exact=exact)
    return crops, one.pooling, one.tokens + FIRST_ID


def patches(crops: Pixels) -> Pixels:
    """[C, 729, 588]: the peer's form. A row of a patch, 42 bytes, moves as one value."""
    rows = crops.reshape(-1, 27, 14, 27, 42).view("V42")[..., 0].swapaxes(2, 3)
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(crops), 729, 588)


def check(images: Sequence[Pixels], saved: Path) -> int:
    """Ours against what the peer saved: raises on any difference but of pixels; their largest difference."""
    worst = 0
    with np.load(saved) as peer:
        for number, image in enumerate(images):
            crops, pooling, ids = ours(image)
            np.testing.assert_array_equal(pooling, peer[f"pooling{number}"])
            tokens = [IMAGE_TOKENS[place] for place in ids - FIRST_ID]
            np.testing.assert_array_equal(tokens, peer[f"tokens{number}"])
            theirs = peer[f"patches{number}"]
            np.testing.assert_array_equal(patches(ours(image, exact=True)[0]), theirs)
            worst = max(worst, int(np.abs(patches(crops).astype(np.int16) - theirs).max()))
    if worst > 1:
        raise AssertionError(f"pixels differ by {worst} levels")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="five rounds of three of the eight pictures, not fifteen of all"
    )
    rounds, step = (5, 3) if parser.parse_args().quick else (15, 1)
    torch.set_num_threads(1)
    sizes = Sizes()
    worst = 0
    with Peer("molmo2_peer.py") as peer, tempfile.TemporaryDirectory() as folder:
        for height, width in SIZES:
            images = pictures(height, width)[::step]
            inputs, saved = Path(folder, "in.npz"), Path(folder, "out.npz")
            np.savez(inputs, *images)
            peer.ask(command="load", path=str(inputs), files=False)
            peer.ask(command="save", path=str(saved), max_crops=SPEC.max_crops)
            worst = max(worst, check(images, saved))
            sizes[f"{width}x{height}"] = in_turn(
                {
                    "peer": lambda: peer.ask(command="time", max_crops=SPEC.max_crops, as_bytes=False)["seconds"],
                    "ours": lambda images=images: timed(lambda one: patches(ours(one)[0]), images),
                    "peer_uint8": lambda: peer.ask(command="time", max_crops=SPEC.max_crops, as_bytes=True)["seconds"],
                    "ours_crops": lambda images=images: timed(ours, images),
                    "ours_exact": lambda images=images: timed(lambda one: patches(ours(one, exact=True)[0]), images),
                },
                rounds,
            )
        versions = peer.ask(command="versions")
    report(sizes, worst, versions)


def report(sizes: Sizes, worst: int, versions: dict[str, str]) -> None:
    """The JSON object."""
    import cv2

    result(
        "multicrop",
        unit="ms per image, geometric mean over the sizes",
        ours=sizes.mean("ours"),
        peer=sizes.mean("peer"),
        peer_name="transformers Molmo2ImageProcessor",
        ratio=sizes.ratio(),
        spread=sizes.spread(),
        goal=10,
        max_pixel_difference=worst,
        ratio_cpu=sizes.ratio(clock=1),
        ratio_unpatched=sizes.ratio("peer", "ours_crops"),
        ratio_exact=sizes.ratio("peer", "ours_exact"),
        ratio_to_uint8_peer=sizes.ratio("peer_uint8", "ours"),
        sizes=sizes.table(),
        threads=1,
        versions=versions | {"opencv": cv2.__version__},
    )


if __name__ == "__main__":
    main()
