"""Defects put into good data, each found with the id of its example and the field at fault, and nothing besides.

What is found where:

- the shards stage decodes every picture and film once when it makes an example: what a row says, and files that are
  missing, broken, cut short, too large or no pictures at all. It lists them in `problems.jsonl`;
- the validate stage decodes the shards' pictures again, small: files that broke afterwards or are not of the recorded
  size (`faults`), pictures of evaluation in training, as the same file (`leaks`) or nearly so (`near_duplicates`), and
  what is unusual for the dataset as a whole. It lists them in `validation.json`;
- legal oddities (grey, CMYK, 16 bits, palettes with transparency, EXIF orientation) are no defects: the pixels that the
  model sees equal those of an oracle.
"""

import io
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from skimage import data as photos

from molmo_model.artifacts import write_manifest
from molmo_model.config import DatasetConfig, params_from_dict
from molmo_model.data.datasets import chat_rows
from molmo_model.data.downloads import Download, Status, write_list
from molmo_model.data.example import UNLABELLED_STYLES, Conversation, Example, Image, Message
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.errors import DataError
from molmo_model.preprocessing.image import decode_image
from pipelines import shards, stage, validate
from tests.data.films import NTSC, film

TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A thing."}]
CUP = PILImage.fromarray(photos.coffee()).resize((240, 160))
CAT = PILImage.fromarray(photos.chelsea()).resize((225, 150))
MOVIE = film([1001 * i for i in range(6)], NTSC, fast_start=True)  # the index at its head survives a cut


def encode(picture, form="JPEG", **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def patch(number):
    """A picture of its own for every good row."""
    left = number % 6 * 60
    return PILImage.fromarray(photos.immunohistochemistry()[number // 6 * 60 :, left:][:120, :120])


def bomb():
    """The header of a PNG of 60,000 x 60,000 pixels, in 57 bytes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def unknown_codec():
    """An AVI whose pictures are of a codec that nobody knows."""
    data = film([1001 * i for i in range(4)], NTSC, container="avi", codec="mpeg4")
    assert b"FMP4" in data
    return data.replace(b"FMP4", b"QZQZ")


def exif(orientation):
    made = PILImage.Exif()
    made[0x0112] = orientation
    return made


def row(name, picture="cup.jpg", **changes):
    fields = {"id": name, "images": [picture], "messages": TALK, **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def says(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


FILES = {
    "cup.jpg": encode(CUP),
    "cut.jpg": encode(CUP)[:-300],
    "half.jpg": encode(CUP)[: len(encode(CUP)) // 2],
    "cut.png": encode(CUP, "PNG")[:-2000],
    "bomb.png": bomb(),
    "empty.jpg": b"",
    "page.jpg": b"<!doctype html><html><body>404 Not Found</body></html>",
    "moving.gif": encode(CUP, "GIF", save_all=True, append_images=[CAT.resize(CUP.size)]),
    "movie.mp4": MOVIE,
    "cut.mp4": MOVIE[: len(MOVIE) * 2 // 3],
    "unknown.avi": unknown_codec(),
}
POINT = {"messages": TALK[:1], "label": "cup"}
DEFECTS = {
    "same-id": (row("good-0", "extra.jpg"), "id", "stands in line 1 already"),
    "no-id": (row(..., "extra.jpg"), "id", "missing or empty"),
    "empty-answer": (row("empty-answer", messages=says("What?", " ")), "messages[1].content", "is empty"),
    "empty-question": (row("empty-question", messages=says("", "Yes.")), "messages[0].content", "is empty"),
    "no-answer": (row("no-answer", messages=TALK[:1]), "messages", "must end with the assistant's answer"),
    "roles": (row("roles", messages=TALK[::-1]), "messages[0]", "user first"),
    "control": (row("control", messages=says("What?", "Ye\x00s")), "messages[1].content", r"control character U\+0000"),
    "surrogate": (row("surrogate", messages=says("What?", "\ud83d")), "messages[1].content", "surrogate"),
    "bad-utf8": (b'{"id": "bad-utf8", "messages": "caf\xe9"}', "row", "not UTF-8"),
    "cut-line": (b'{"id": "cut-line", "messages": [{"role"', "row", "not JSON"),
    "huge-text": (row("huge-text", messages=says("What?", "x" * 70_000)), "row", "longer than 65536 bytes"),
    "nan": (row("nan", metadata={"score": float("nan")}), "metadata.score", "nan"),
    "unknown-field": (row("unknown-field", mesages=[]), "mesages", "did you mean 'messages'"),
    "declared-size": (row("declared-size", {"path": "cup.jpg", "width": 9}), "images[0]", "unknown field 'width'"),
    "outside": (row("outside", points=[[50, 101]], **POINT), "points[0]", "outside the image"),
    "negative": (row("negative", points=[[-1, 5]], **POINT), "points[0]", "outside the image"),
    "wrong-unit": (row("wrong-unit", points=[[120, 80]], **POINT), "points[0]", "0 to 100 percent"),
    "no-label": (row("no-label", messages=TALK[:1], points=[[1, 2]]), "label", "missing"),
    "missing": (row("missing", "none.jpg"), "images[0]", "does not exist"),
    "outside-root": (row("outside-root", "../secret.jpg"), "images[0]", "leads out of"),
    "not-fetched": (
        row("not-fetched", "http://127.0.0.1/x.jpg"),
        "images[0]",
        "cannot|not fetched|not in the list|lists",
    ),
    "zero-bytes": (row("zero-bytes", "empty.jpg"), "images[0]", "empty file"),
    "html": (row("html", "page.jpg"), "images[0]", "no image of"),
    "cut-jpeg": (row("cut-jpeg", "cut.jpg"), "images[0]", "broken or cut short"),
    "half-jpeg": (row("half-jpeg", "half.jpg"), "images[0]", "broken or cut short"),
    "cut-png": (row("cut-png", "cut.png"), "images[0]", "broken or cut short"),
    "bomb": (row("bomb", "bomb.png"), "images[0]", "more than 50000000 pixels"),
    "animation": (row("animation", "moving.gif"), "images[0]", "2 frames"),
    "cut-film": (row("cut-film", ..., images=..., video="cut.mp4"), "video", "cannot be decoded|cut short"),
    "unknown-codec": (
        row("unknown-codec", ..., images=..., video="unknown.avi"),
        "video",
        "cannot be decoded|no frame|codec",
    ),
    "other-side": (
        row("other-side", "eval.jpg", split="train"),
        "split",
        "another row put an image of this one into 'eval'",
    ),
}
"""Line of the file, field at fault and reason, by a name that is the row's id where it has a readable one."""
UNREADABLE = {"no-id", "bad-utf8", "cut-line", "huge-text"}

SEEN = {
    "recompressed": encode(CAT, quality=40),
    "resized": encode(CAT.resize((150, 100)), "PNG"),
    "cropped": encode(CAT.crop((4, 3, 221, 147)), "WEBP"),
}
"""The evaluation picture `eval.jpg`, not byte for byte."""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    monkeypatch.setattr(chat_rows, "MAX_LINE_BYTES", 2**16)
    folder = tmp_path / "set"
    folder.mkdir()
    more = {"eval.jpg": encode(CAT, quality=92), "extra.jpg": encode(CUP.rotate(180))}
    for name, data in {**FILES, **more, **{f"{name}.x": data for name, data in SEEN.items()}}.items():
        (folder / name).write_bytes(data)
    (tmp_path / "secret.jpg").write_bytes(FILES["cup.jpg"])
    return folder


def params(**changes):
    photos_of = {"family": "chat", "path": "set/rows.jsonl", "tolerance": 0.9, "eval_fraction": 0.0, **changes}
    return params_from_dict({"version": 2, "seed": 3, "datasets": {"photos": photos_of}}, "test")


def run_both(config):
    stage.run(shards.STAGE, config, dataset="photos")
    stage.run(validate.STAGE, config, dataset="photos")
    problems = Path("artifacts/shards/photos/problems.jsonl").read_text(encoding="utf-8").splitlines()
    document = json.loads(Path("artifacts/validation/photos/validation.json").read_text(encoding="utf-8"))
    return [json.loads(line) for line in problems], document


def write_rows(folder, rows):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def test_every_seeded_defect_is_found_and_nothing_else(workspace):
    assert len(DEFECTS) + len(SEEN) >= 25
    good = []
    for number in range(12):
        (workspace / f"good-{number}.png").write_bytes(encode(patch(number), "PNG"))
        good.append(
            row(f"good-{number}", f"good-{number}.png", messages=says(f"What is {number}?", f"Cells {number}."))
        )
    film_row = row("film", ..., images=..., video="movie.mp4")
    held_out = row("held-out", "eval.jpg", split="eval")
    seen = [row(name, f"{name}.x", split="train") for name in SEEN]
    write_rows(workspace, [*good, film_row, held_out, *seen, *(line for line, _, _ in DEFECTS.values())])
    problems, document = run_both(params())
    first = len(good) + 2 + len(seen)
    assert [problem["line"] for problem in problems] == list(range(first + 1, first + 1 + len(DEFECTS)))
    for problem, (name, (line, field, reason)) in zip(problems, DEFECTS.items(), strict=True):
        assert problem["field"] == field, problem
        assert re.search(reason, problem["reason"]), problem
        assert problem["id"] == (None if name in UNREADABLE else line["id"]), problem
        assert not problem["known"]
    reader = ShardReader("artifacts/shards/photos")
    ids = {"held-out", "film", *SEEN, *(one["id"] for one in good)}
    assert set(reader.index["id"].to_pylist()) == ids
    assert document["bad_rows"] == len(DEFECTS)
    assert document["faults"] == document["leaks"]["listed"] == []
    pairs = document["near_duplicates"]
    assert {(pair["train"], pair["eval"]) for pair in pairs["listed"]} == {(name, "held-out") for name in SEEN}
    assert pairs["found"] == len(SEEN)
    failed = {result["column"] for result in document["results"] if not result["success"]}
    # few rows, most of them bad, and the one of evaluation seen in training
    assert failed == {None, "drop_rate", "near_duplicate_rate"}


LEGAL = {
    "grey": (encode(CUP.convert("L")), lambda picture: picture.convert("RGB")),
    "cmyk": (encode(CUP.convert("CMYK")), lambda picture: picture.convert("RGB")),
    "sixteen": (
        encode(PILImage.fromarray(np.asarray(CUP.convert("L")).astype(np.uint16) * 257), "PNG"),
        lambda picture: CUP.convert("L").convert("RGB"),
    ),
    "palette": (
        encode(CUP.convert("P", palette=PILImage.Palette.ADAPTIVE, colors=64), "PNG", transparency=0),
        lambda picture: PILImage.composite(
            picture.convert("RGBA").convert("RGB"),
            PILImage.new("RGB", picture.size, "white"),
            picture.convert("RGBA").getchannel("A"),
        ),
    ),
    "turned": (encode(CUP, exif=exif(6)), lambda picture: picture.transpose(PILImage.Transpose.ROTATE_270)),
    "mirrored": (
        encode(CUP, "PNG", exif=exif(2)),
        lambda picture: picture.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT),
    ),
    "trailing": (encode(CUP) + b"\0" * 100, lambda picture: picture),
}


def test_legal_oddities_are_read_exactly_and_are_no_defects(workspace):
    rows = []
    for name, (data, _) in LEGAL.items():
        (workspace / name).write_bytes(data)
        rows.append(
            row(name, name, messages=says(f"What is {name}?"), points=[[24, 16]], points_unit="pixel", label="cup")
        )
    write_rows(workspace, rows)
    config = params(tolerance=0.0)
    problems, document = run_both(config)
    assert problems == document["faults"] == []
    reader = ShardReader("artifacts/shards/photos")
    for number, name in enumerate(reader.index["id"].to_pylist()):
        example = reader.read(number)
        data, oracle = LEGAL[name]
        with PILImage.open(io.BytesIO(data)) as opened:
            opened.load()
            wanted = oracle(opened)
        pixels = decode_image(example.images[0].data)
        assert np.array_equal(pixels, np.asarray(wanted)), name
        assert (example.images[0].width, example.images[0].height) == wanted.size, name
        (point,) = example.conversations[0].messages[-1].points
        assert point == (100 * 24 / wanted.width, 100 * 16 / wanted.height), name  # of the upright picture


def made_by_hand(folder, *rows):
    write_shards(rows, folder, 10**7)
    (folder / "problems.jsonl").touch()
    write_manifest(folder, schema="molmo/shards", version=1, params={}, inputs={}, code="", summary={})


def talk(question="?", answer="!"):
    return (Conversation("qa", (Message("user", question), Message("assistant", answer))),)


def test_what_shards_hide_is_found_by_validation(tmp_path, monkeypatch, capsys):
    """Files that a faulty writer let through: their headers are well, their pixels are not."""
    monkeypatch.chdir(tmp_path)
    cut, size = FILES["half.jpg"], CUP.size
    with PILImage.open(io.BytesIO(cut)) as opened:
        assert opened.size == size  # what looks at headers alone sees nothing
    same = encode(CAT)
    rows = [
        ("train", Example("cut", (Image(cut, *size, "JPEG"),), talk("a"))),
        ("train", Example("wrong-size", (Image(encode(patch(0)), 121, 120, "JPEG"),), talk("b"))),
        ("train", Example("turned", (Image(encode(CUP, exif=exif(6)), *size, "JPEG"),), talk("c"))),
        (
            "train",
            Example("leaked", (Image(encode(patch(1)), 120, 120, "JPEG"), Image(same, 225, 150, "JPEG")), talk("d")),
        ),
        ("eval", Example("asked", (Image(same, 225, 150, "JPEG"),), talk("e"))),
        ("train", Example("good", (Image(encode(patch(2)), 120, 120, "JPEG"),), talk("f"))),
    ]
    made_by_hand(Path("artifacts/shards/photos"), *rows)
    with pytest.raises(DataError, match=r"files of 3 of 6 examples.*\n +'cut' images\[0\]: is broken or cut short"):
        stage.run(validate.STAGE, params(tolerance=0.4), dataset="photos")
    assert not Path("artifacts/validation/photos").exists()
    capsys.readouterr()
    manifest = stage.run(validate.STAGE, params(tolerance=0.5), dataset="photos")
    document = json.loads(Path("artifacts/validation/photos/validation.json").read_text(encoding="utf-8"))
    assert {fault["id"]: (fault["field"], fault["reason"]) for fault in document["faults"]} == {
        "cut": ("images[0]", "is broken or cut short: it does not decode"),
        "wrong-size": ("images[0]", "is 120 x 120 pixels, the index says 121 x 120"),
        "turned": ("images[0]", "is 160 x 240 pixels, the index says 240 x 160"),
    }
    (leak,) = document["leaks"]["listed"]
    assert (leak["train"], leak["eval"]) == ("leaked", "asked")
    assert document["near_duplicates"]["listed"] == []
    assert manifest.summary["faults"] == 3 and manifest.summary["success"] is False
    told = capsys.readouterr().out
    assert "warning: photos: train ('photos', 'leaked') shows the very picture of eval ('photos', 'asked')" in told
    assert "warning: photos: 'cut' images[0] is broken" in told


def test_a_flipped_byte_is_told_with_its_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("train", Example(f"e{i}", (Image(encode(patch(i)), 120, 120, "JPEG"),), talk(str(i)))) for i in range(3)]
    made_by_hand(Path("artifacts/shards/photos"), *rows)
    index = ShardReader("artifacts/shards/photos").index
    path = Path("artifacts/shards/photos/shards-train-all.tar")
    data = bytearray(path.read_bytes())
    data[index["offset"][1].as_py() + index["size"][1].as_py() - 600] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="'e1'"):
        stage.run(validate.STAGE, params(), dataset="photos")


def test_dead_links_are_listed_and_are_no_fault(workspace):
    """A URL that the list of downloads has as failed is known; one that it does not have makes the list too old."""
    dead, strange = "https://example.org/dead.jpg", "https://example.org/strange.jpg"
    write_list(workspace / "list.parquet", [Download(dead, Status.GONE, "404 Not Found", 404)])
    write_rows(workspace, [row("good"), row("dead", dead)])
    problems, document = run_both(params(downloads="set/list.parquet", tolerance=0.0))
    assert [(problem["id"], problem["known"]) for problem in problems] == [("dead", True)]
    assert "404 Not Found" in problems[0]["reason"]
    assert (document["bad_rows"], document["missing_downloads"]) == (0, 1)
    write_rows(workspace, [row("good"), row("strange", strange)])
    with pytest.raises(DataError, match=r"strange\.jpg.*older than the data"):
        run_both(params(downloads="set/list.parquet"))


OPTIONS = ("red", "green", "blue")
UNLABELLED = min(UNLABELLED_STYLES)
"""A style whose choices are shown without letters."""


@pytest.mark.parametrize(
    ("style", "options", "answer", "field"),
    [
        (UNLABELLED, ("red", "green", "red"), "red", r"messages\[0\].options\[2\] is options\[0\] again"),
        ("qa", ("red",), "A", r"messages\[0\].options are 1; a question offers 2 to 26"),
        ("qa", ("red", " "), "A", r"messages\[0\].options\[1\] is ' '"),
        ("qa", OPTIONS, "D", r"messages\[1\].text is 'D', none of the options and no letter from A to C"),
        ("qa", OPTIONS, "yellow", r"messages\[1\].text is 'yellow', none of the options"),
    ],
)
def test_choices_that_make_no_sense_are_no_examples(style, options, answer, field):
    question = Message("user", "Which colour?", options=options)
    with pytest.raises(DataError, match=rf"example 'e': conversations\[0\].{field}"):
        Example("e", (), (Conversation(style, (question, Message("assistant", answer))),))


def test_choices_that_do():
    question = Message("user", "Which colour?", options=OPTIONS)
    for answer in (
        Message("assistant", "C"),
        Message("assistant", "green"),
        Message("assistant", "A", alternatives=("B",)),
    ):
        Example("e", (), (Conversation("qa", (question, answer)),))
    bad = replace(answer, alternatives=("E",))
    with pytest.raises(DataError, match="is 'E', none of the options"):
        Example("e", (), (Conversation("qa", (question, bad)),))


def test_thresholds_are_named_per_dataset(workspace):
    (workspace / "good.png").write_bytes(encode(patch(0), "PNG"))
    write_rows(workspace, [row("good", "good.png")])
    _, strict = run_both(params())
    before = Path("artifacts/shards/photos/manifest.json").read_bytes()
    _, loose = run_both(params(expectations={"min_rows": 1, "min_eval_share": 0.0, "max_majority_answer": 1.0}))
    assert not strict["success"] and loose["success"]
    assert Path("artifacts/shards/photos/manifest.json").read_bytes() == before  # no reason to make the shards again
    with pytest.raises(Exception, match="min_row"):
        params(expectations={"min_row": 1})
    with pytest.raises(Exception, match=r"max_drop_rate is 1\.5; it must lie between 0 and 1"):
        params(expectations={"max_drop_rate": 1.5})
    assert DatasetConfig(family="chat").expectations.min_rows == 100
