"""A perceptual hash and a small grey copy of every picture of a dataset, made once per content: what near duplicates
are found by (`near_duplicates`).

Every distinct picture, and of a film the first frame, is decoded once and small. That also tells files that are broken,
and pictures of another size than the shards say. A cache by content, which datasets share and which survives a kill,
spares what was hashed before: a changed example costs one picture. The hash is pHash, the signs of the lowest
frequencies of a 32 x 32 cosine transform, as the library imagehash computes it.
"""

import io
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from molmo_model.data.example import Image, Video
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.video_file import decode_frames
from molmo_model.errors import DataError

FILE = "image_hashes.parquet"
SIDE = 32
"""Rows and columns of the grey copy."""
HASHES = pa.schema(
    [
        ("image_sha256", pa.string()),  # of the file
        ("kind", pa.string()),  # `image`, or `film`: then all else is of its first frame
        ("width", pa.int32()),  # pixels, upright, as the file itself says
        ("height", pa.int32()),
        ("phash", pa.uint64()),
        ("small", pa.binary(SIDE * SIDE)),  # grey, row by row
    ]
)
"""`image_hashes.parquet`: one row per distinct picture, by `image_sha256`."""
KINDS = ("image", "film")
VERSION = "1"
"""Of what is kept per picture; another version has another cache."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Decoders that bytes may reach."""
MAX_PIXELS = 50_000_000
CHUNK = 64
"""Pictures that one task of a worker decodes."""
IN_PROCESS = 4 * CHUNK
"""Up to so many pictures are hashed at once here: a worker takes longer to start."""

_Row = tuple[str, str, int, int, int, bytes]


@dataclass(frozen=True)
class Fault:
    """A picture or film of an example that is not what the shards say of it."""

    id: str
    field: str
    reason: str


def hash_files(
    reader: ShardReader, cache: Path, max_pixels: int = MAX_PIXELS, workers: int | None = None
) -> tuple[pa.Table, list[Fault]]:
    """Hashes of all pictures and films of a dataset, and the files that are not as recorded.

    Args:
        reader: the dataset.
        cache: folder of the hashes by content, which datasets share; made if missing.
        max_pixels: larger pictures are not decoded, and a fault.
        workers: processes; default: the cores that this process may use.

    Returns:
        A table of `HASHES`, the same for the same files, and the faults in the order of the index.

    Raises:
        DataError: a shard is missing or corrupt, or a worker died.
    """
    places: dict[str, tuple[int, int]] = {}
    for row, files in enumerate(reader.files()):
        for number, value in enumerate(files):
            places.setdefault(value, (row, number))
    broken: dict[str, str] = {}
    with _Cache(cache) as known:
        missing = [(value, *places[value]) for value in sorted(places.keys() - known.keys(), key=places.__getitem__)]
        for results in _hash_all(reader, missing, max_pixels, workers or len(os.sched_getaffinity(0))):
            known.put([one for one in results if not isinstance(one[1], Exception)])
            broken |= {one[0]: str(one[1]) for one in results if isinstance(one[1], Exception)}
        rows = known.get(sorted(places))
    columns = zip(*rows, strict=True) if rows else [[]] * len(HASHES)
    arrays = [pa.array(list(values), kind) for values, kind in zip(columns, HASHES.types, strict=True)]
    table = pa.table(arrays, HASHES)
    return table, _faults(reader, table, broken)


def perceptual_hash(picture: Any) -> tuple[int, bytes]:
    """The 64-bit pHash and the grey copy of a PIL picture in mode `L`."""
    import imagehash
    from PIL import Image as PILImage

    bits = imagehash.phash(picture).hash.ravel()
    small = picture.resize((SIDE, SIDE), PILImage.Resampling.BILINEAR)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), small.tobytes()


def _hash_file(file: Image | Video, max_pixels: int) -> tuple[str, int, int, int, bytes]:
    """Kind, width, height, hash and grey copy of a file.

    Raises:
        DataError: it does not decode, or is too large.
    """
    from PIL import Image as PILImage

    if isinstance(file, Video):
        ((_, frame),) = decode_frames(file, [0])
        return ("film", file.width, file.height, *perceptual_hash(PILImage.fromarray(frame).convert("L")))
    return ("image", *_grey_size_hash(file.data, max_pixels))


def _grey_size_hash(data: bytes, max_pixels: int) -> tuple[int, int, int, bytes]:
    import warnings

    from PIL import Image as PILImage
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and odd EXIF
        try:
            with PILImage.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise DataError(f"is {width} x {height}, more than {max_pixels} pixels (`max_image_pixels`)")
                picture.draft(None, (4 * SIDE, 4 * SIDE))  # a JPEG is decoded at an eighth, and read to its end
                picture.load()
                upright = ImageOps.exif_transpose(picture)
                if (upright.width < upright.height) != (picture.width < picture.height):
                    width, height = height, width
                return (width, height, *perceptual_hash(_grey(upright)))
        except DataError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            raise DataError("is broken or cut short: it does not decode") from error


def _grey(picture: Any) -> Any:
    """A PIL picture of any mode in mode `L`: 16 bits by their high byte, transparency on white."""
    from PIL import Image as PILImage

    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, np.float64)
        return PILImage.fromarray(
            (np.nan_to_num(values) / (256 if picture.mode != "F" else 1)).clip(0, 255).astype(np.uint8)
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB").convert("L")


_Task = tuple[str, int, int]
_Outcome = tuple[Any, ...]
_OPENED: dict[str, Any] = {}
"""What a worker keeps between its tasks."""


def _hash_all(reader: ShardReader, tasks: list[_Task], max_pixels: int, workers: int) -> Iterator[list[_Outcome]]:
    """The outcomes of all tasks, chunk by chunk, with a bar once it takes long."""
    from tqdm import tqdm

    chunks = [tasks[start : start + CHUNK] for start in range(0, len(tasks), CHUNK)]
    with tqdm(total=len(tasks), desc="hashes", unit=" pictures", delay=2, mininterval=1) as bar:
        for results in _outcomes(reader, chunks, max_pixels, 1 if len(tasks) <= IN_PROCESS else workers):
            bar.update(len(results))
            yield results


def _outcomes(
    reader: ShardReader, chunks: list[list[_Task]], max_pixels: int, workers: int
) -> Iterator[list[_Outcome]]:
    if workers == 1:
        yield from (_hash_chunk(reader, max_pixels, chunk) for chunk in chunks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of Arrow's threads
    try:
        with ProcessPoolExecutor(workers, context, _open, (reader, max_pixels)) as pool:
            yield from pool.map(_hash_opened, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            f"{reader.path}: a worker died while it decoded pictures; run again with more memory"
        ) from error


def _open(reader: ShardReader, max_pixels: int) -> None:
    _OPENED.update(reader=reader, max_pixels=max_pixels)


def _hash_opened(chunk: list[_Task]) -> list[_Outcome]:
    return _hash_chunk(_OPENED["reader"], _OPENED["max_pixels"], chunk)


def _hash_chunk(reader: ShardReader, max_pixels: int, chunk: list[_Task]) -> list[_Outcome]:
    """Per task the row of the table, or the SHA-256 and what is wrong with the file."""
    outcomes: list[_Outcome] = []
    at, example = -1, None
    for value, row, number in chunk:
        if row != at or example is None:
            at, example = row, reader.read(row)
        try:
            outcomes.append((value, *_hash_file(example.files[number], max_pixels)))
        except DataError as error:
            outcomes.append((value, error))
    return outcomes


def _faults(reader: ShardReader, table: pa.Table, broken: Mapping[str, str]) -> list[Fault]:
    """Files that do not decode, and pictures of another size than the index has."""
    columns = {name: table[name].to_pylist() for name in ("image_sha256", "width", "height")}
    sizes = dict(zip(columns["image_sha256"], zip(columns["width"], columns["height"], strict=True), strict=True))
    index = reader.index
    ids, widths, heights = (index[name].to_pylist() for name in ("id", "widths", "heights"))
    faults = []
    for row, files in enumerate(reader.files()):
        images = len(widths[row])
        for number, value in enumerate(files):
            field = f"images[{number}]" if number < images else f"videos[{number - images}]"
            if value in broken:
                faults.append(Fault(ids[row], field, broken[value]))
            elif number < images and sizes[value] != (size := (widths[row][number], heights[row][number])):
                found = f"is {sizes[value][0]} x {sizes[value][1]} pixels, the index says {size[0]} x {size[1]}"
                faults.append(Fault(ids[row], field, found))
    return faults


class _Cache:
    """Rows of `HASHES` by SHA-256 in a SQLite file, which is safe when several stages write and one is killed."""

    def __init__(self, folder: Path) -> None:
        folder = folder / VERSION
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "hashes.sqlite"
        self._database = sqlite3.connect(path, timeout=60)
        os.utime(path)  # `pipelines.state prune` goes by when it was last used

    def __enter__(self) -> "_Cache":
        create = "CREATE TABLE IF NOT EXISTS hashes (sha256 TEXT PRIMARY KEY, facts BLOB NOT NULL)"
        with self._database:
            self._database.execute(create)
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def keys(self) -> set[str]:
        """What is there."""
        return {value for (value,) in self._database.execute("SELECT sha256 FROM hashes")}

    def put(self, rows: Iterable[_Outcome]) -> None:
        """Keeps rows; a kill loses those of the call at most."""
        packed = [(r[0], _FACTS.pack(KINDS.index(r[1]), r[2], r[3], r[4]) + r[5]) for r in rows]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?)", packed)

    def get(self, values: Sequence[str]) -> list[_Row]:
        """The rows that are there, in the order of the values."""
        found: list[_Row] = []
        for start in range(0, len(values), 500):
            part = values[start : start + 500]
            query = f"SELECT sha256, facts FROM hashes WHERE sha256 IN ({','.join('?' * len(part))}) ORDER BY sha256"
            with closing(self._database.execute(query, part)) as cursor:
                for value, facts in cursor:
                    kind, width, height, word = _FACTS.unpack_from(facts)
                    found.append((value, KINDS[kind], width, height, word, facts[_FACTS.size :]))
        return found


_FACTS = struct.Struct("<BIIQ")
"""Kind, width, height and hash, before the grey copy."""
