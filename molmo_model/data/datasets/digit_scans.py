"""The 1,797 scanned handwritten digits of scikit-learn, and which of them are held out of training.

297 of the scans are only ever shown in evaluation examples and the other 1,500 only in training examples, whatever the
seed and whatever family shows them.
"""

import gzip
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from molmo_model.artifacts import file_sha256
from molmo_model.data.datasets.generated import held_out, package_folder

LICENCE = "CC-BY-4.0"
SOURCE = "scikit-learn load_digits, from UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998)"
EVAL_SCANS = 297
"""Scans held out of training; the remaining 1,500 are held out of evaluation."""
SCAN_SIDE, SCAN_LEVELS = 8, 16
"""A scan is 8x8 pixels of 0 (paper) to 16 (ink)."""


def digest() -> dict[str, str]:
    """The digest of the scans, by name."""
    return {"scikit-learn digits": file_sha256(_path())}


def _path() -> Path:
    return package_folder("sklearn") / "datasets" / "data" / "digits.csv.gz"


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8] of levels 0 to 16, and the digit of each. From the file: importing its package is slow."""
    with gzip.open(_path(), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, SCAN_SIDE, SCAN_SIDE), table[:, -1]


@cache
def scan_split() -> dict[str, np.ndarray]:
    """Indices of the scans of each split, ascending; a fixed choice, not the seed's."""
    count = len(scans()[1])
    chosen = held_out([f"digit scan {scan}" for scan in range(count)], EVAL_SCANS)
    is_eval = np.array([f"digit scan {scan}" in chosen for scan in range(count)])
    return {"train": np.flatnonzero(~is_eval), "eval": np.flatnonzero(is_eval)}


@cache
def enlarged(scan: int, size: int) -> np.ndarray:
    """float32 [size, size] of ink from 0 to 1."""
    levels = PILImage.fromarray(scans()[0][scan].astype(np.float32) / SCAN_LEVELS)
    return np.asarray(levels.resize((size, size), PILImage.Resampling.BILINEAR))
