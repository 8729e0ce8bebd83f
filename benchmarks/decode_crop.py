"""From the bytes of a JPEG file to patches, pooling windows and tokens, on one thread, beside PIL and transformers.

As `benchmarks.multicrop`, with decoding on both sides: ours as the preprocessor does it, headers checked first; the
peer with PIL's `open` and `convert`. Both decode to the same pixels, and that is asserted as well.

    python -m benchmarks.decode_crop [--quick]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.multicrop import SPEC, check, ours, patches
from benchmarks.peers import Peer
from benchmarks.pictures import SIZES, Pixels, jpeg, pictures
from benchmarks.side_by_side import Sizes, in_turn, result, timed
from molmo_model.preprocessing.image import decode_image


def decoded(file: bytes) -> tuple[Pixels, Any, Any]:
    """Crops, pooling windows and token ids of a file."""
    return ours(decode_image(file))


def patched(file: bytes) -> Pixels:
    """The same in the peer's form."""
    return patches(decoded(file)[0])


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
            files = [jpeg(one) for one in pictures(height, width)[::step]]
            inputs, saved = Path(folder, "in.npz"), Path(folder, "out.npz")
            np.savez(inputs, *[np.frombuffer(file, dtype=np.uint8) for file in files])
            peer.ask(command="load", path=str(inputs), files=True)
            peer.ask(command="save", path=str(saved), max_crops=SPEC.max_crops)
            worst = max(worst, check([decode_image(file) for file in files], saved))
            sizes[f"{width}x{height}"] = in_turn(
                {
                    "peer": lambda: peer.ask(command="time", max_crops=SPEC.max_crops, as_bytes=False)["seconds"],
                    "ours": lambda files=files: timed(patched, files),
                    "ours_crops": lambda files=files: timed(decoded, files),
                    "ours_decode": lambda files=files: timed(decode_image, files),
                },
                rounds,
            )
        versions = peer.ask(command="versions")
    report(sizes, worst, versions)


def report(sizes: Sizes, worst: int, versions: dict[str, str]) -> None:
    """The JSON object."""
    import cv2

    result(
        "decode_crop",
        unit="images/s of one core, geometric mean over the sizes",
        ours=round(1000 / sizes.mean("ours"), 1),
        peer=round(1000 / sizes.mean("peer"), 1),
        peer_name="PIL and transformers Molmo2ImageProcessor",
        ratio=sizes.ratio(),
        spread=sizes.spread(),
        goal=5,
        max_pixel_difference=worst,
        ratio_cpu=sizes.ratio(clock=1),
        ratio_unpatched=sizes.ratio("peer", "ours_crops"),
        sizes=sizes.table(),
        threads=1,
        versions=versions | {"opencv": cv2.__version__},
    )


if __name__ == "__main__":
    main()
