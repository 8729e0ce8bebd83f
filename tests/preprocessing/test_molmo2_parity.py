"""Token for token and patch for patch against transformers' own `Molmo2ImageProcessor`, which needs torchvision: it
runs in the peers' environment (`benchmarks/peers.py`), which this test makes where it is missing.

What both support: a global crop and overlapping crops, squashed, bilinear without antialiasing; column tokens in both
views and one kind of start token (options of the processor, not its defaults). What differs on purpose: pictures with a
side of at most the crops' margins, of which the processor makes a negative number (`tiling.tiling_for`).
"""

import hashlib

import numpy as np
import pytest

from benchmarks.peers import Peer
from molmo_model.model_config import CropMode
from molmo_model.preprocessing.collator import collate
from molmo_model.preprocessing.crops import fill_crops
from molmo_model.preprocessing.preprocessor import Encoded
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tiling import IMAGE_TOKENS, TilingSpec, layout, tiling_for

pytestmark = pytest.mark.slow

GEOMETRIES = {
    "siglip": (120, {}, (378, 14, (2, 2), (4, 4))),
    "clip": (24, {"size": {"height": 336, "width": 336}}, (336, 14, (2, 2), (4, 4))),
    "3x2": (
        216,
        {"size": {"height": 112, "width": 112}, "pooling_size": [3, 2], "overlap_margins": [1, 2]},
        (112, 14, (3, 2), (1, 2)),
    ),
}
"""Number of sizes, the processor's options, and ours: crop size, patch size, window, margins."""


def spec(name: str, max_crops: int) -> TilingSpec:
    return TilingSpec(*GEOMETRIES[name][2], max_crops, CropMode.overlap_and_resize_c2)


def cases(name: str) -> list[list[int]]:
    """[height, width, max_crops]: sizes from just above the margins, all numbers of crops from 1 to 36."""
    count, _, (_, patch, _, margins) = GEOMETRIES[name]
    least = sum(margins) * patch + 1
    sides = np.exp(np.random.default_rng(0).uniform(np.log(least), np.log(1500), (count, 2))).astype(int)
    sides[:2] = [(least, least), (least, 1400)]
    return [[*side, 1 + number % 36] for number, side in enumerate(sides.tolist())]


def noise(number: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def peer():
    with Peer("molmo2_peer.py") as running:
        yield running


def patches(crops: np.ndarray, one: TilingSpec) -> np.ndarray:
    """[C, N, pixels of a patch]: the processor's form."""
    size, patch = one.crop_patches, one.patch_size
    cut = crops.reshape(-1, size, patch, size, patch, 3).swapaxes(2, 3)
    return np.ascontiguousarray(cut).reshape(-1, size**2, patch * patch * 3)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_tokens_windows_and_patches_equal_the_processors(peer, tmp_path, name):
    """Tokens and windows equal; patches equal to the bit with `exact`, within one level of 255 without (13% of the
    values of noise differ by that one level)."""
    saved = tmp_path / "peer.npz"
    peer.ask(command="parity", path=str(saved), cases=cases(name), options=GEOMETRIES[name][1])
    with np.load(saved) as theirs:
        for number, (height, width, max_crops) in enumerate(cases(name)):
            one = spec(name, max_crops)
            ours, where = layout(height, width, one), f"{width} x {height}, max_crops {max_crops}"
            np.testing.assert_array_equal(ours.pooling, theirs[f"pooling{number}"], where)
            assert [IMAGE_TOKENS[place] for place in ours.tokens] == theirs[f"tokens{number}"].tolist(), where
            exact, fast = np.empty((2, ours.crops, one.crop_size, one.crop_size, 3), dtype=np.uint8)
            image = noise(number, height, width)
            fill_crops(image, ours, one, "siglip", exact, exact=True)
            fill_crops(image, ours, one, "siglip", fast)
            digest = hashlib.sha256(patches(exact, one)).hexdigest()
            assert digest == str(theirs[f"digest{number}"]), where
            assert (np.maximum(exact, fast) - np.minimum(exact, fast)).max() <= 1, where


def test_several_images_of_a_batch_and_normalised_pixels(peer, tmp_path):
    """The processor's defaults: float32 and all images in one call. Its window numbers run on over the images as those
    of a batch do; (x / 255 - 0.5) / 0.5 of our bytes is within 6e-8 of its pixels, 1e-6 allowed."""
    sizes = [(480, 640), (200, 1400), (640, 480), (480, 640), (1080, 1920)]
    saved = tmp_path / "peer.npz"
    peer.ask(command="several", path=str(saved), sizes=sizes)
    one = spec("siglip", 8)
    config = PreprocessorConfig(378, 14, (2, 2), "siglip", 512, max_crops=8)
    encoded = []
    for number, size in enumerate(sizes):
        ours = layout(*size, one)
        crops = np.empty((ours.crops, 378, 378, 3), dtype=np.uint8)
        fill_crops(noise(number, *size), ours, one, "siglip", crops, exact=True)
        nothing = np.zeros(0, dtype=np.int64)
        encoded.append(
            Encoded(nothing, nothing, nothing.astype(np.float32), nothing, nothing, nothing, crops, ours.pooling)
        )
    batch = collate([encoded], None, config)
    with np.load(saved) as theirs:
        np.testing.assert_array_equal(batch["pooling"], theirs["pooling"])
        normalised = (patches(batch["pixel_values"].numpy(), one).astype(np.float32) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(normalised, theirs["patches"], rtol=0, atol=1e-6)


def test_thin_strips_are_where_both_part(peer, tmp_path):
    """112 pixels of margins: with a side of 100 the processor takes one crop for what we show in up to twelve."""
    sizes = [[100, 1400, 12], [1400, 100, 12]]
    saved = tmp_path / "peer.npz"
    peer.ask(command="parity", path=str(saved), cases=sizes, options={})
    with np.load(saved) as theirs:
        for number, (height, width, max_crops) in enumerate(sizes):
            one = spec("siglip", max_crops)
            assert len(theirs[f"pooling{number}"]) == len(layout(1, 1, one).pooling)
            assert max(tiling_for(height, width, one)) > 1
