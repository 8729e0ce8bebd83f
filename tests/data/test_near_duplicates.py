"""Hashes of pictures and pairs that look alike: against brute force, against pictures changed by hand, and that charts
and scenes, which look alike by construction, are told apart."""

import io
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as PILImage
from skimage import data as photos

from molmo_model.config import DatasetConfig
from molmo_model.data import image_hashes
from molmo_model.data.datasets import family_of
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.data.image_hashes import HASHES, KINDS, hash_files
from molmo_model.data.near_duplicates import (
    CANDIDATES,
    DIFFERENCE,
    differences,
    find_in_artefacts,
    find_near_duplicates,
    near_hashes,
)
from molmo_model.data.schemas import check_table
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.data.video_file import probe_video
from molmo_model.errors import DataError
from tests.data.films import NTSC, film

ROOT = Path(__file__).resolve().parents[2]
TALK = (Conversation("qa", (Message("user", "?"), Message("assistant", "!"))),)
SOURCES = {"coffee": photos.coffee, "cat": photos.chelsea, "rocket": photos.rocket, "coins": photos.coins}


def encode(picture, form="PNG", **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def example(name, *files):
    pictures = []
    for data in files:
        with PILImage.open(io.BytesIO(data)) as opened:
            pictures.append(Image(data, *opened.size, str(opened.format)))
    return Example(name, tuple(pictures), TALK)


def shards(folder, *rows):
    write_shards(rows, folder, 10**7)
    return ShardReader(folder)


def table_of(reader, cache):
    table, faults = hash_files(reader, cache, workers=1)
    check_table(table, "image_hashes")
    assert faults == []
    return table


def sides(reader, name="d"):
    ids, files = reader.index["id"].to_pylist(), reader.files()
    return [[(name, ids[row], files[row]) for row in reader.rows(split)] for split in ("train", "eval")]


def cropped(picture, share):
    width, height = picture.size
    return picture.crop((round(width * share), round(height * share), round(width * (1 - share)), height))


CHANGES = {
    "recompressed": lambda picture: encode(picture, "JPEG", quality=35),
    "halved": lambda picture: encode(picture.resize((picture.width // 2, picture.height // 2))),
    "enlarged": lambda picture: encode(picture.resize((picture.width * 3 // 2, picture.height * 3 // 2))),
    "brightened": lambda picture: encode(picture.point(lambda value: min(255, round(value * 1.15)))),
    "cropped": lambda picture: encode(cropped(picture, 0.02), "JPEG", quality=80),
    "grey": lambda picture: encode(picture.convert("L"), "WEBP", quality=60),
}


def test_changed_pictures_are_found_and_others_are_not(tmp_path):
    originals = {name: PILImage.fromarray(source()).convert("RGB") for name, source in SOURCES.items()}
    for picture in originals.values():
        picture.thumbnail((320, 320))
    rows = [("eval", example(f"eval-{name}", encode(picture))) for name, picture in originals.items()]
    for name, picture in originals.items():
        rows += [("train", example(f"{name}-{change}", change_it(picture))) for change, change_it in CHANGES.items()]
        turned = picture.transpose(PILImage.Transpose.ROTATE_90)  # another picture, to a model too
        rows.append(("train", example(f"{name}-turned", encode(turned))))
        rows.append(("train", example(f"{name}-corner", encode(picture.crop((0, 0, 150, 100))))))
    reader = shards(tmp_path / "shards", *rows)
    pairs = find_near_duplicates(*sides(reader), table_of(reader, tmp_path / "cache"))
    assert {(pair.train[1], pair.eval[1]) for pair in pairs} == {
        (f"{name}-{change}", f"eval-{name}") for name in originals for change in CHANGES
    }
    assert pairs == sorted(pairs, key=lambda pair: (pair.distance, pair.difference, pair.eval, pair.train))
    assert all(pair.distance <= 14 and pair.difference <= DIFFERENCE for pair in pairs)


@pytest.mark.parametrize(("family", "train", "held_out"), [("charts", 300, 60), ("digit_scenes", 150, 30)])
def test_pictures_of_one_program_are_told_apart(tmp_path, family, train, held_out):
    config = DatasetConfig(family=family, train_examples=train, eval_examples=held_out)
    reader = shards(tmp_path / "shards", *family_of(config).make(config, 17))
    table = table_of(reader, tmp_path / "cache")
    assert find_near_duplicates(*sides(reader), table) == []
    if family == "charts":  # their hashes alone would tell of hundreds
        words = table["phash"].combine_chunks().to_numpy()
        assert sum(len(bits) for _, _, bits in near_hashes(words, words)) > 400


def test_hashes_are_found_as_by_comparing_all_with_all():
    rng = np.random.default_rng(5)
    train = rng.integers(0, 2**63, 3000).astype(np.uint64) * np.uint64(2)
    held_out = train[:700].copy()
    for i in range(len(held_out)):
        for bit in rng.choice(64, int(rng.integers(0, 20)), replace=False):
            held_out[i] ^= np.uint64(1 << int(bit))
    for distance in (0, 3, 6, 14):
        bits = np.bitwise_count(train[:, None] ^ held_out[None])
        wanted = [(int(i), int(j), int(bits[i, j])) for i, j in zip(*np.nonzero(bits <= distance), strict=True)]
        blocks = near_hashes(train, held_out, distance)
        found = [pair for block in blocks for pair in zip(*(part.tolist() for part in block), strict=True)]
        assert sorted(found) == sorted(wanted)  # once each
        assert len(wanted) > 10 * distance


def test_alignment_undoes_moves_and_brightness():
    rows, columns = np.mgrid[0:32, 0:32].astype(np.float32)

    def picture(scale, dx, dy, gain):
        wave = np.sin((columns * scale + dx) / 4) * np.cos((rows * scale + dy) / 5)
        return (128 + 60 * gain * wave).astype(np.float32)

    first = np.stack([picture(1, 0, 0, 1)] * 4)
    second = np.stack([picture(1, 0, 0, 1), picture(1.03, 0.8, -0.5, 1), picture(1, 0, 0, 1.2), picture(1, 9, 4, 1)])
    same, moved, brighter, other = differences(first, second)
    assert same < 0.01 and brighter < 0.01 and moved < 6 and other > 30
    assert np.abs(first[1] - second[1]).max() > 20  # what it would be without


def hash_rows(words, cells, names=None):
    names = names or [f"{i:064x}" for i in range(len(words))]
    columns = [names, ["image"] * len(words), [9] * len(words), [9] * len(words), words, [c.tobytes() for c in cells]]
    return pa.table([pa.array(c, kind) for c, kind in zip(columns, HASHES.types, strict=True)], HASHES)


def test_flat_pictures_are_nobodys_duplicates_and_candidates_are_bounded():
    """A black frame looks like every other; and a thousand copies are told for as many as get a second look."""
    cells = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    flat = hash_rows([7, 7], [np.zeros((32, 32), np.uint8)] * 2)
    train, held_out = [("d", "t", [f"{0:064x}"])], [("d", "e", [f"{1:064x}"])]
    assert find_near_duplicates(train, held_out, flat) == []
    (pair,) = find_near_duplicates(train, held_out, hash_rows([7, 7], [cells] * 2))
    assert str(pair) == "train ('d', 't') looks like eval ('d', 'e'), 0 of 64 bits and 0 of 255 grey levels apart"
    many = hash_rows([7] * 1001, [cells] * 1001)
    train = [("d", f"t{i}", [f"{i:064x}"]) for i in range(1000)]
    found = find_near_duplicates(train, [("d", "e", [f"{1000:064x}"])], many)
    assert len(found) == CANDIDATES


def test_equal_files_are_no_near_duplicates_and_several_examples_of_one_file_are_all_told():
    cells = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    a, b = "a" * 64, "b" * 64
    hashes = hash_rows([7, 6], [cells] * 2, [a, b])
    twice = pa.concat_tables([hashes, hashes])  # two datasets that have the same files
    found = find_near_duplicates([("d", "t", [a])], [("d", "e", [a])], hashes)
    assert found == []
    found = find_near_duplicates([("d", "t1", [a]), ("c", "t2", [a, a])], [("d", "e", [b, "f" * 64])], twice)
    assert [(pair.train, pair.eval, pair.distance) for pair in found] == [
        (("c", "t2"), ("d", "e"), 1),
        (("d", "t1"), ("d", "e"), 1),
    ]
    assert find_near_duplicates([], [], HASHES.empty_table()) == []


def test_datasets_without_hashes_are_named(tmp_path):
    from pyarrow import parquet

    cells = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    for dataset, name, word in (("x", "a", 5), ("y", "b", 4)):
        (tmp_path / dataset).mkdir()
        parquet.write_table(hash_rows([word], [cells], [name * 64]), tmp_path / dataset / "image_hashes.parquet")
    train, held_out = [("x", "t", ["a" * 64])], [("y", "e", ["b" * 64]), ("z", "f", ["c" * 64]), ("w", "g", [])]
    pairs, unknown = find_in_artefacts(train, held_out, tmp_path)
    assert [(pair.train, pair.eval) for pair in pairs] == [(("x", "t"), ("y", "e"))]
    assert unknown == ["z"]


def test_a_hash_is_that_of_the_library_for_the_upright_grey_picture(tmp_path):
    picture = PILImage.fromarray(photos.rocket())
    exif = PILImage.Exif()
    exif[0x0112] = 6
    sixteen = PILImage.fromarray((np.asarray(picture.convert("L")).astype(np.uint16) << 8) + 200)
    files = {
        "plain": encode(picture),
        "turned": encode(picture, exif=exif),
        "cmyk": encode(picture.convert("CMYK"), "TIFF"),
        "sixteen": encode(sixteen),
    }
    wanted = {
        "plain": picture,
        "turned": picture.transpose(PILImage.Transpose.ROTATE_270),
        "cmyk": picture.convert("CMYK").convert("RGB"),
        "sixteen": picture.convert("L"),
    }
    rows = [("train", Example(name, (Image(data, *wanted[name].size, "X"),), TALK)) for name, data in files.items()]
    reader = shards(tmp_path / "shards", *rows)
    table = {row["image_sha256"]: row for row in table_of(reader, tmp_path / "cache").to_pylist()}
    for name, found in zip(reader.index["id"].to_pylist(), reader.files(), strict=True):
        row = table[found[0]]
        assert row["phash"] == int(str(imagehash.phash(wanted[name].convert("L"))), 16), name
        assert (row["kind"], row["width"], row["height"]) == ("image", *wanted[name].size)


def test_of_a_film_the_first_frame_counts(tmp_path):
    films = [film([1001 * i for i in range(n)], NTSC, size=(192, 128)) for n in (4, 9)]
    rows = [
        (split, Example(split, (), TALK, videos=(probe_video(data),)))
        for split, data in zip(("train", "eval"), films, strict=True)
    ]
    reader = shards(tmp_path / "shards", *rows)
    table = table_of(reader, tmp_path / "cache")
    assert table["kind"].to_pylist() == ["film", "film"]
    (pair,) = find_near_duplicates(*sides(reader), table)
    assert pair.train == ("d", "train")


def many(count):
    rng = np.random.default_rng(2)
    return [
        (
            ("train", "eval")[i % 7 == 0],
            example(f"e{i}", encode(PILImage.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)))),
        )
        for i in range(count)
    ]


def test_what_was_hashed_is_not_decoded_again_and_a_lost_cache_changes_nothing(tmp_path, monkeypatch):
    decoded = []
    real = image_hashes._hash_file
    monkeypatch.setattr(
        image_hashes, "_hash_file", lambda file, limit: decoded.append(file.sha256) or real(file, limit)
    )
    rows = many(20)
    first = table_of(shards(tmp_path / "a", *rows), tmp_path / "cache")
    assert len(decoded) == 20
    rows[3] = ("train", example("e3", encode(PILImage.fromarray(photos.coins()))))
    changed = shards(tmp_path / "b", *rows)
    second = table_of(changed, tmp_path / "cache")
    assert decoded[20:] == [rows[3][1].images[0].sha256]
    assert table_of(shards(tmp_path / "c", *many(20)), tmp_path / "cache").equals(first)  # the others' rows stay out
    shutil.rmtree(tmp_path / "cache")
    assert table_of(changed, tmp_path / "cache").equals(second)
    assert sorted(set(second["kind"].to_pylist())) == [KINDS[0]]


@pytest.mark.slow
def test_processes_give_the_same_and_a_killed_one_loses_little(tmp_path):
    reader = shards(tmp_path / "shards", *many(300))
    alone, _ = hash_files(reader, tmp_path / "one", workers=1)
    together, _ = hash_files(reader, tmp_path / "two", workers=2)
    assert alone.equals(together)
    code = (
        "import os, sys; from pathlib import Path; from molmo_model.data import image_hashes as h\n"
        "from molmo_model.data.shard_reader import ShardReader\n"
        "real, n = h._hash_file, [0]\n"
        "def hash_file(*a):\n"
        "    n[0] += 1\n"
        "    if n[0] > 200: os.kill(os.getpid(), 9)\n"
        "    return real(*a)\n"
        "h._hash_file = hash_file\n"
        "h.hash_files(ShardReader(sys.argv[1]), Path(sys.argv[2]), workers=1)\n"
    )
    arguments = [sys.executable, "-c", code, str(reader.path), str(tmp_path / "killed")]
    done = subprocess.run(arguments, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -9
    (database,) = (tmp_path / "killed").rglob("hashes.sqlite")
    assert sqlite3.connect(database).execute("SELECT count(*) FROM hashes").fetchone() == (192,)  # whole chunks of 64
    assert hash_files(reader, tmp_path / "killed", workers=1)[0].equals(alone)


def test_a_corrupt_shard_is_told_by_id(tmp_path):
    reader = shards(tmp_path / "shards", *many(3))
    (path,) = (tmp_path / "shards").glob("shards-train-*.tar")
    data = bytearray(path.read_bytes())
    data[1700] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="'e1'"):
        hash_files(ShardReader(reader.path), tmp_path / "cache")


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import molmo_model.data.near_duplicates, molmo_model.data.image_hashes; "
        "print([m for m in ('imagehash', 'scipy', 'pandas', 'PIL', 'av', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
