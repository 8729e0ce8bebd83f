"""Films as examples: in JSON, in shards, in a user's rows, and on one side of the split."""

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets.chat import fingerprint, make
from molmo_model.data.example import BadRow, Conversation, Example, Message, Video
from molmo_model.data.schemas import check_table
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import INDEX, INDEX_SCHEMA, VIDEO_INDEX_SCHEMA, write_shards
from molmo_model.data.timeline import Timeline
from molmo_model.data.video_file import probe_video
from molmo_model.errors import DataError
from tests.data.builders import example as still_example
from tests.data.films import film

TALK = Conversation("qa", (Message("user", "What happens?"), Message("assistant", "It moves.")))
TURNS = [{"role": "user", "content": "What happens?"}, {"role": "assistant", "content": "It moves."}]


@pytest.fixture(scope="module")
def video() -> Video:
    return probe_video(film([1001 * i for i in range(40)], codec="mpeg4"))


@pytest.fixture(scope="module")
def uneven() -> Video:
    return probe_video(film([0, 7, 3003, 50000, 50001], container="matroska", time_base=(1, 1000)), clip=(0.0, 3.5))


def test_json_and_back(video, uneven):
    example = Example("e", (), (TALK,), {"a": 1}, (video, uneven))
    raw = json.loads(json.dumps(example.to_json()))
    assert Example.from_json(raw, [video.data, uneven.data]) == example
    assert raw["videos"][1]["clip"] == [0.0, 3.5] and raw["videos"][0]["steps"] == [[1001, 39]]
    with pytest.raises(DataError, match=r"describes 0 images and 2 videos, but 1 files"):
        Example.from_json(raw, [video.data])
    with pytest.raises(DataError, match=r"videos\[0\]\.sha256"):
        Example.from_json(raw, [uneven.data, video.data])


def test_examples_without_films_are_what_they_were():
    example = still_example(3)
    raw = example.to_json()
    assert sorted(raw) == ["conversations", "id", "images", "metadata"]
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert example.content_hash() == hashlib.sha256(text.encode()).hexdigest()


def test_clips_of_one_film_are_different_things(video):
    clips = [video, replace(video, clip=(0.0, 1.0)), replace(video, clip=(0.5, 1.0))]
    assert len({clip.identity for clip in clips}) == 3 and len({clip.sha256 for clip in clips}) == 1
    assert len({Example("e", (), (TALK,), videos=(clip,)).content_hash() for clip in clips}) == 3


BAD = {
    "images": ({"images": still_example(1).images}, "videos stand beside images"),
    "clip": ({"clip": (1.0, 1.0)}, r"videos\[0\]\.clip is \(1\.0, 1\.0\)"),
    "clip outside": ({"clip": (2.0, 3.0)}, r"videos\[0\]\.clip is .* 0\.000 to 1\.3"),
    "clip of text": ({"clip": ("0", "1")}, ".*two finite numbers"),
    "width": ({"width": 0}, r"videos\[0\]\.width"),
    "data": ({"data": b""}, r"videos\[0\]\.data"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_example_may_be(video, what):
    changes, reason = BAD[what]
    images = changes.get("images", ())
    film_changes = {} if images else changes
    with pytest.raises(DataError, match=f"example 'e': {reason}"):
        Example("e", images, (TALK,), videos=(replace(video, **film_changes),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", [[0, 3]]),
        ("steps", [[1001]]),
        ("time_base", [1, 0]),
        ("time_base", [1]),
        ("keys", []),
        ("last", -1),
        ("start", 1.5),
    ],
)
def test_times_that_make_no_sense_are_refused(video, field, value):
    raw = Example("e", (), (TALK,), videos=(video,)).to_json()
    raw["videos"][0][field] = value
    with pytest.raises(DataError, match=r"example 'e': videos\[0\]"):
        Example.from_json(raw, [video.data])


def test_shards_with_films(tmp_path, video, uneven):
    rows = [
        ("train", Example("a", (), (TALK,), videos=(video, uneven))),
        ("eval", still_example(2)),
        ("train", Example("c", (), (TALK,), videos=(uneven,))),
    ]
    index = write_shards(rows, tmp_path / "one", 10_000)
    assert write_shards(rows, tmp_path / "two", 10_000).equals(index)
    assert index.schema == VIDEO_INDEX_SCHEMA
    check_table(index, "index")
    assert index["video_frames"].to_pylist() == [[40, 5], [], [5]]
    assert index["video_clips"].to_pylist() == [[[], [0.0, 3.5]], [], [[0.0, 3.5]]]
    assert index["n_images"].to_pylist() == [0, 1, 0]
    reader = ShardReader(tmp_path / "one")
    for number, (_, example) in enumerate(rows):
        assert reader.read(number) == example
        light = reader.facts(number)
        assert [one.timeline for one in light.videos] == [one.timeline for one in example.videos]
        assert all(one.data == b"\0" for one in light.videos)
    assert reader.files() == [[video.sha256, uneven.sha256], [rows[1][1].images[0].sha256], [uneven.sha256]]
    names = {name for shard in (tmp_path / "one").glob("*.tar") for name in _names(shard)}
    assert {"a.json", "a.0.mp4", "a.1.mkv", "c.0.mkv"} <= names
    broken = index.set_column(
        index.column_names.index("video_frames"), "video_frames", pa.array([[40], [], [5]], pa.list_(pa.int32()))
    )
    with pytest.raises(DataError, match="facts of each film"):
        check_table(broken, "index")


def _names(shard: Path) -> list[str]:
    import tarfile

    with tarfile.open(shard) as tar:
        return tar.getnames()


def test_shards_without_films_have_the_columns_they_had(tmp_path):
    write_shards([("train", still_example(1))], tmp_path, 10_000)
    assert pq.read_schema(tmp_path / INDEX).equals(INDEX_SCHEMA)
    assert ShardReader(tmp_path).files() == [[image.sha256 for image in still_example(1).images]]


@pytest.fixture
def folder(tmp_path, video, uneven) -> Path:
    (tmp_path / "a.mp4").write_bytes(video.data)
    (tmp_path / "b.mkv").write_bytes(uneven.data)
    (tmp_path / "cut.mp4").write_bytes(video.data[: len(video.data) // 2])
    (tmp_path / "c.png").write_bytes(still_example(1).images[0].data)
    return tmp_path


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> list[tuple[str, Example | BadRow]]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(make(DatasetConfig(family="chat", path=str(folder / "rows.jsonl"), **options), 0))


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "r", "messages": TURNS, **changes}


GOOD = {
    "a path": ({"video": "a.mp4"}, [None]),
    "a list": ({"videos": ["a.mp4", "b.mkv"]}, [None, None]),
    "a clip in the row": ({"video": "a.mp4", "clip_start": 0.25, "clip_end": 1}, [(0.25, 1.0)]),
    "a clip from 0": ({"video": "a.mp4", "clip_start": 0.0, "clip_end": 0.5}, [(0.0, 0.5)]),
    "a start alone": ({"video": "a.mp4", "clip_start": 1.0}, [(1.0, 1.3346)]),
    "an end alone": ({"video": "a.mp4", "clip_end": 1.0}, [(0.0, 1.0)]),
    "clips in the list": (
        {"videos": [{"path": "a.mp4", "clip_start": 0.5}, {"path": "a.mp4", "clip_end": 0.5}, "a.mp4"]},
        [(0.5, 1.3346), (0.0, 0.5), None],
    ),
    "places": (
        {
            "video": "a.mp4",
            "messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}, TURNS[1]],
        },
        [None],
    ),
}


@pytest.mark.parametrize("what", GOOD)
def test_good_rows(folder, what):
    fields, clips = GOOD[what]
    ((_, example),) = read(folder, row(**fields))
    assert isinstance(example, Example) and not example.images
    found = [one.clip for one in example.videos]
    assert [clip is None for clip in found] == [clip is None for clip in clips]
    assert [value for clip in found for value in clip or ()] == pytest.approx(
        [value for clip in clips for value in clip or ()], abs=1e-4
    )


def test_llava_rows_and_bytes_inside(folder, video):
    turns = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "It moves."}]
    inside = {"base64": base64.b64encode(video.data).decode(), "clip_end": 1.0}
    found = read(folder, {"id": "r", "video": "a.mp4", "conversations": turns}, row(id="s", videos=[inside]))
    assert [example.videos[0].clip for _, example in found] == [None, (0.0, 1.0)]
    assert found[0][1].conversations[0].messages[0].text == "What happens?"


WRONG = [
    ({"video": "none.mp4"}, "video", "does not exist"),
    ({"video": "../a.mp4"}, "video", "leads out of"),
    ({"video": "https://host/a.mp4"}, "video", "not fetched"),
    ({"videos": "a.mp4"}, "videos", "must be a list"),
    ({"videos": ["a.mp4", "cut.mp4"]}, "videos[1]", "cannot be decoded|cut short"),
    ({"video": "c.png"}, "video", "cannot be decoded"),
    ({"video": "a.mp4", "images": ["c.png"]}, "video", "beside images"),
    ({"video": "a.mp4", "videos": ["a.mp4"]}, "video", "beside `videos`"),
    ({"video": {"path": "a.mp4", "start": 3}}, "video", "'start'"),
    ({"video": "a.mp4", "clip_start": "0"}, "clip_start", "number of seconds"),
    ({"video": "a.mp4", "clip_start": -1}, "clip_start", "at least 0"),
    ({"video": "a.mp4", "clip_start": 1.0, "clip_end": 0.5}, "clip_end", "enclose no time"),
    ({"video": "a.mp4", "clip_start": 7}, "clip_start", "outside the film|enclose no time"),
    ({"videos": [{"path": "a.mp4", "clip_end": True}]}, "videos[0].clip_end", "number of seconds"),
    ({"videos": [{"path": "a.mp4", "clip_start": 1.0, "clip_end": 0.2}]}, "videos[0].clip_end", "enclose no time"),
    ({"video": {"path": "a.mp4", "clip_end": 1}, "clip_end": 1}, "clip_end", "stands beside"),
    ({"videos": ["a.mp4", "b.mkv"], "clip_end": 1}, "clip_end", "exactly one video; the row has 2"),
    ({"clip_start": 1}, "clip_start", "exactly one video; the row has 0"),
    ({"video": "a.mp4", "messages": TURNS[:1], "points": [[1, 2]], "label": "x"}, "points", "exactly one image"),
    (
        {
            "video": "a.mp4",
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, TURNS[1]],
        },
        "messages",
        "1 places for 0 images",
    ),
    (
        {"video": "a.mp4", "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}, TURNS[1]]},
        "messages",
        "0 places for 1 videos",
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_bad_rows_are_told_by_file_line_and_field(folder, number):
    fields, field, reason = WRONG[number]
    found = read(folder, row(id="good", video="b.mkv"), row(**fields))
    bad = found[1][1]
    assert isinstance(bad, BadRow), bad
    assert (bad.file, bad.line, bad.id, bad.field) == (str(folder / "rows.jsonl"), 2, "r", field)
    assert any(part in bad.reason for part in reason.split("|")), bad.reason


def test_bounds_of_the_dataset_hold_for_films(folder):
    ((_, bad),) = read(folder, row(video="a.mp4"), max_image_pixels=6000)
    assert isinstance(bad, BadRow) and bad.field == "video" and "96 x 64 pixels are more than 6000" in bad.reason


def test_all_clips_of_a_film_stand_on_one_side(folder):
    rows = [row(id=str(n), video="a.mp4", clip_start=0.1 * n) for n in range(8)] + [row(id="b", video="b.mkv")]
    for fraction in (0.2, 0.5, 0.8):
        sides = {(example.videos[0].sha256, side) for side, example in read(folder, *rows, eval_fraction=fraction)}
        assert len(sides) == 2
    asked = read(folder, *rows, row(id="x", videos=["a.mp4"], split="eval"))
    assert {side for side, example in asked if example.videos[0].format == "MP4"} == {"eval"}


def test_the_fingerprint_follows_the_films(folder):
    config = DatasetConfig(family="chat", path=str(folder / "rows.jsonl"))
    read(folder, row(videos=[{"path": "a.mp4", "clip_end": 1.0}]))
    before = fingerprint(config, 0)
    (folder / "a.mp4").write_bytes((folder / "b.mkv").read_bytes())
    assert fingerprint(config, 0) != before


def test_timelines_keep_few_key_frames():
    every = Timeline.of(list(range(0, 300, 10)), 10, (1, 30), range(30))
    assert every.keys == (0, 3, 6, 9, 12, 15, 18, 21, 24, 27)
