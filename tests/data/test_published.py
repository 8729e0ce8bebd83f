"""Published datasets are read alike from the hub, a snapshot, single files, WebDataset and folders of pictures; what is
wrong with a row is told by file, line and field, and rows of one picture become one example in bounded memory."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Features, Value

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES, published_rows, row_groups
from molmo_model.data.datasets.family import Family
from molmo_model.data.datasets.published import (
    ROW_KEY,
    SPLIT_KEY,
    SUBSET_KEY,
    Files,
    Published,
    RowError,
    each,
    family,
    rows,
)
from molmo_model.data.downloads import Download, Status, Store, write_list
from molmo_model.data.example import BadRow, Conversation, Example, Message
from molmo_model.errors import ConfigError, DataError
from molmo_model.storage import open_file
from tests.data.films import film
from tests.data.snapshots import bad, good, hub_image, json_lines, png, snapshot

SET = Published(
    hub="owner/name",
    revision="abc123",
    licence="MIT",
    card="https://example.org/card",
    splits={"train": "train", "eval": "validation"},
)
FEATURES = Features({"image": datasets.Image(), "question": Value("string"), "label": ClassLabel(names=["no", "yes"])})


def row(number: int, question: str | None = "what?", label: int = 1) -> dict[str, Any]:
    return {"image": hub_image(number), "question": question, "label": label}


def talk(question: str, answer: str = "a cup") -> Conversation:
    return Conversation("qa", (Message("user", question), Message("assistant", answer)))


def convert(fields: dict[str, Any], files: Files, options: Any) -> Example:
    if not isinstance(question := fields.get("question"), str):
        raise RowError("question", "is missing")
    image = files.image(fields.get("image", fields.get("png")), "image")
    facts = {name: value for name, value in fields.items() if name.startswith("__")} | {"label": fields.get("label")}
    return Example(str(fields.get("id", fields[ROW_KEY])), (image,), (talk(question),), facts)


PLAIN = family(SET, convert)


def make(kind: Family, path: Path | str | None, **config: Any) -> list[tuple[str, Example | BadRow]]:
    return list(kind.make(DatasetConfig(family="set", path=None if path is None else str(path), **config), 0))


def first(made: list[tuple[str, Example | BadRow]]) -> Example:
    example = made[0][1]
    assert isinstance(example, Example), example
    return example


# ---- where rows come from


def test_a_snapshot_is_read_by_the_splits_of_its_card(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(0), row(1)], "validation": [row(2, label=0)], "test": [row(3)]})
    made = make(PLAIN, tmp_path)
    assert [(split, example.id) for split, example in made if isinstance(example, Example)] == [
        ("train", "train-0000000"),
        ("train", "train-0000001"),
        ("eval", "validation-0000000"),
    ]
    example = first(made)
    assert (example.images[0].data, example.images[0].width, example.images[0].height) == (png(0), 8, 6)
    assert example.metadata == {ROW_KEY: "train-0000000", SPLIT_KEY: "train", "label": 1}
    assert example.conversations == (talk("what?"),)
    assert make(PLAIN, tmp_path) == made


def test_a_snapshot_without_a_card_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(0)], "validation": [row(1)]})
    (tmp_path / "README.md").unlink()
    assert [split for split, _ in make(PLAIN, tmp_path)] == ["train", "eval"]


@pytest.mark.parametrize(
    ("names", "pattern", "mixed"),
    [
        (
            ["data/train-0.jsonl", "data/test-0.jsonl"],
            "data/*.jsonl",
            r"test \(.*data/test-0.jsonl\), train \(.*/train-0",
        ),
        (["a/training/0.jsonl", "a/dev/0.jsonl"], "a/**/*.jsonl", r"2 published splits: train .*, validation \("),
        (["train2014_a.jsonl", "val2014_a.jsonl"], "*_a.jsonl", "train .*, validation "),
        (["test/train-0.jsonl", "test/train-1.jsonl"], "test/*.jsonl", None),  # the folder is no part of the pattern
        (["train-0.jsonl", "more.jsonl", "contest.jsonl", "valley-1.jsonl"], "*.jsonl", None),
    ],
)
def test_a_pattern_over_several_published_splits_is_refused(
    tmp_path: Path, names: list[str], pattern: str, mixed: str | None
) -> None:
    root = tmp_path / "validation"
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{number}.png").write_bytes(png(number))
        json_lines(root / name, [{"id": f"e{number}", "image": f"{number}.png", "question": "what?"}])
    config = {"image_root": str(root), "eval_fraction": 0.0}
    if mixed is None:
        assert len(good(make(PLAIN, f"{root}/{pattern}", **config))) == len(names)
        return
    with pytest.raises(DataError, match=mixed + ".*one split.*or to the folder"):
        make(PLAIN, f"{root}/{pattern}", **config)
    joined = family(replace(SET, splits={"train": "train+validation+test"}), convert)
    assert len(good(make(joined, f"{root}/{pattern}", **config))) == len(names)  # all on one side


def test_subsets_are_read_in_order_and_can_be_chosen(tmp_path: Path) -> None:
    @dataclass
    class Options:
        subsets: list[str] = field(default_factory=list)

    for name in ("one", "two", "three"):
        snapshot(tmp_path, FEATURES, {"train": [row(len(name))]}, subset=name)
    (tmp_path / "README.md").unlink()
    several = family(replace(SET, subset=("one", "two", "three"), splits={"train": "train"}), convert, Options)
    made = [example for _, example in make(several, tmp_path) if isinstance(example, Example)]
    assert [example.metadata[SUBSET_KEY] for example in made] == ["one", "two", "three"]
    assert [example.id for example in made][:1] == ["one-train-0000000"]
    chosen = make(several, tmp_path, options={"subsets": ["three", "one"]})
    assert [example.id for _, example in chosen if isinstance(example, Example)] == [
        "one-train-0000000",
        "three-train-0000000",
    ]
    with pytest.raises(ConfigError, match="thre"):
        make(several, tmp_path, options={"subsets": ["thre"]})


def test_single_files_and_patterns_are_divided_by_their_pictures(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(n) for n in range(40)]})
    snapshot(tmp_path, FEATURES, {"more": [row(n) for n in range(40, 80)]})
    made = make(PLAIN, f"{tmp_path}/data/*.parquet", eval_fraction=0.3)
    sides = [split for split, _ in made]
    assert len(sides) == 80 and 10 <= sides.count("eval") <= 40
    alone = make(PLAIN, tmp_path / "data" / "more-00000-of-00001.parquet", eval_fraction=0.3)
    assert [split for split, _ in alone] == sides[:40]  # `more` sorts before `train`; a side depends on nothing else
    one_sided = family(replace(SET, splits={"eval": "test"}), convert)
    assert {split for split, _ in make(one_sided, f"{tmp_path}/data/*.parquet")} == {"eval"}
    with pytest.raises(DataError, match="no file is named like"):
        make(PLAIN, f"{tmp_path}/nothing-*.parquet")
    for name in ("nothing.parquet", "nothing.jsonl"):
        with pytest.raises(DataError, match=f"{name} is no file"):
            make(PLAIN, tmp_path / name)


def test_json_lines_name_their_pictures_below_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(5))
    entries = [{"image": "pictures/a.png", "question": "who?"}, {"image": "../a.png", "question": "x"}, "no row"]
    path = json_lines(tmp_path / "rows.jsonl", entries)
    made = make(PLAIN, path, eval_fraction=0.0)
    assert first(made).images[0].data == png(5)
    assert bad(made) == [
        ("rows.jsonl", 2, "image", f"'../a.png' leads out of {tmp_path}; images must lie below it, see `image_root`"),
        ("rows.jsonl", 3, "row", "is a JSON str; it must be an object"),
    ]


def test_a_webdataset_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a", "b"):
            for suffix, content in (("png", png(ord(name))), ("json", json.dumps({"question": f"{name}?"}).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    kind = family(SET, lambda fields, files, options: convert(fields | fields["json"], files, options))
    made = make(kind, tmp_path / "set.tar", eval_fraction=1.0)
    assert [(split, example.id) for split, example in made if isinstance(example, Example)] == [
        ("eval", "a"),
        ("eval", "b"),
    ]
    assert first(made).images[0].data == png(ord("a"))


def test_the_families_read_a_webdataset_of_pictures_and_json(tmp_path: Path) -> None:
    said = {"query": "how many?", "label": ["3"], "human_or_machine": 0, "image": "elsewhere.png"}
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a", "b"):
            for suffix, content in (("png", png(ord(name))), ("json", json.dumps(said).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    made = make(FAMILIES["chart_qa"], tmp_path / "set.tar", eval_fraction=0.0)
    examples = [example for _, example in made if isinstance(example, Example)]
    assert [(one.id, one.images[0].data) for one in examples] == [("a", png(ord("a"))), ("b", png(ord("b")))]
    assert examples[0].conversations[0].messages[0].text == "how many?"


def test_a_copy_without_its_card_may_call_val_validation(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.png").write_bytes(png(len(split)))
        entry = {"file_name": "0.png", "query": "how many?", "label": ["3"], "human_or_machine": 0}
        json_lines(tmp_path / split / "metadata.jsonl", [entry])
    made = make(FAMILIES["chart_qa"], tmp_path)
    sides = [(split, example.images[0].data) for split, example in made if isinstance(example, Example)]
    assert sides == [("train", png(5)), ("eval", png(3))]
    with pytest.raises(DataError, match=r"has no split 'test'.*eval_examples: 0"):
        make(FAMILIES["chart_qa"], tmp_path, options={"eval_split": "test"})


def test_a_folder_of_pictures_with_metadata_is_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    entries = [{"file_name": f"{n}.png", "question": f"{n}?"} for n in range(3)]
    json_lines(tmp_path / "metadata.jsonl", entries)
    kind = family(replace(SET, splits={"train": "train"}), convert)
    made = make(kind, tmp_path)
    assert [example.images[0].data for _, example in made if isinstance(example, Example)] == [png(n) for n in range(3)]
    assert [example.conversations[0].messages[0].text for _, example in made if isinstance(example, Example)] == [
        "0?",
        "1?",
        "2?",
    ]
    assert str(tmp_path) not in json.dumps(first(made).to_json())


def test_files_in_storage_are_read_by_a_pattern() -> None:
    entries = [{"image": "pictures/a.png", "question": f"{n}?"} for n in range(2)]
    for n, entry in enumerate(entries):
        with open_file(f"memory://published/set/train-{n}.jsonl", "wb") as file:
            file.write(json.dumps(entry).encode())
    with open_file("memory://published/set/pictures/a.png", "wb") as file:
        file.write(png(6))
    path = "memory://published/set/train-*.jsonl"
    made = make(PLAIN, path, eval_fraction=0.0)
    assert [example.conversations[0].messages[0].text for _, example in made if isinstance(example, Example)] == [
        "0?",
        "1?",
    ]
    assert first(made).images[0].data == png(6)
    before = PLAIN.fingerprint(DatasetConfig(family="set", path=path), 0)
    with open_file("memory://published/set/train-1.jsonl", "wb") as file:
        file.write(b"{}")
    assert PLAIN.fingerprint(DatasetConfig(family="set", path=path), 0) != before
    with pytest.raises(DataError, match=r"is a folder in storage; name its files, such as memory://published/set/"):
        make(PLAIN, "memory://published/set")
    patterns = family(replace(SET, splits={"train": "train"}, files={"train": "train-0.jsonl"}), convert)
    assert len(make(patterns, "memory://published/set")) == 1


@pytest.mark.parametrize(
    "document",
    [[{"question": "q"}], {"data": [{"question": "q"}], "more": 1}, {"qa_pairs": [{"question": "q"}]}],
)
def test_json_files_of_challenges_are_read(tmp_path: Path, document: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document))
    (found,) = rows(DatasetConfig(family="set", path=str(tmp_path / "x.json")), SET, "")
    assert (found.line, found.fields) == (1, {"question": "q", ROW_KEY: "row-0000000"})


def test_a_json_object_of_named_rows_or_of_one_row(tmp_path: Path) -> None:
    config = DatasetConfig(family="set", path=str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text(json.dumps({"7": {"question": "q"}, "8": {"question": "r"}}))
    assert [found.fields[ROW_KEY] for found in rows(config, SET, "")] == ["7", "8"]
    (tmp_path / "x.json").write_text(json.dumps({"question": "q", "answers": {"a": 1}}))
    assert [found.fields["question"] for found in rows(config, SET, "")] == ["q"]
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json is not JSON"):
        list(rows(config, SET, ""))


def test_patterns_of_files_by_split(tmp_path: Path) -> None:
    for name in ("train_v1.json", "val_v1.json"):
        (tmp_path / name).write_text(json.dumps({"data": [{"question": name, "image": "a.png"}]}))
    (tmp_path / "a.png").write_bytes(png(1))
    kind = family(replace(SET, hub=None, files={"train": "train_*.json", "validation": "val_*.json"}), convert)
    made = good(make(kind, tmp_path))
    assert [(split, example.conversations[0].messages[0].text) for split, example in made.values()] == [
        ("train", "train_v1.json"),
        ("eval", "val_v1.json"),
    ]
    (tmp_path / "val_v1.json").unlink()
    with pytest.raises(DataError, match=r"no file 'val_\*.json' for the split 'validation'"):
        make(kind, tmp_path)


def test_the_hub_is_asked_for_the_right_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Stream:
        def __init__(self, split: str) -> None:
            self.split = split

        def decode(self, enable: bool) -> list[dict[str, Any]]:
            assert enable is False
            return [row(len(self.split))]

    def load_dataset(hub: str, **options: Any) -> Stream:
        asked.append((hub, options))
        return Stream(options["split"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    kind = family(replace(SET, subset="part", files={"train": "x-*"}), convert)
    made = make(kind, None, revision="other")
    assert [split for split, _ in made] == ["train", "eval"]
    common = {"name": "part", "revision": "other", "streaming": True, "data_files": {"train": "x-*"}}
    assert asked == [("owner/name", common | {"split": split}) for split in ("train", "validation")]
    make(PLAIN, None)
    assert asked[-1] == ("owner/name", {"name": None, "revision": "abc123", "streaming": True, "split": "validation"})


def test_the_library_streams_what_is_asked_for(tmp_path: Path) -> None:
    """The same call as for the hub, with a repository in a folder: pictures come as the bytes that were published."""
    snapshot(tmp_path, FEATURES, {"train": [row(0), row(1, question=None)], "validation": [row(2)]})
    kind = family(replace(SET, hub=str(tmp_path), revision="main"), convert)
    made = make(kind, None)
    assert [(split, one.images[0].data) for split, one in good(made).values()] == [("train", png(0)), ("eval", png(2))]
    assert first(made).metadata["label"] == 1
    (told,) = [item for _, item in made if isinstance(item, BadRow)]
    assert (told.file, told.line, told.field) == (f"{tmp_path}@main/train", 2, "question")


def test_without_the_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(hub: str, **options: Any) -> None:
        raise ConnectionError("Couldn't reach it\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        make(PLAIN, None)
    message = str(caught.value)
    assert "owner/name@abc123/train cannot be read after row 0: ConnectionError: Couldn't reach it" in message
    assert "hf download owner/name" in message and "set `path`" in message and "long story" not in message


@pytest.mark.slow
def test_offline_mode_is_told_as_such(tmp_path: Path) -> None:
    program = (
        "from molmo_model.config import DatasetConfig\nfrom molmo_model.data.datasets import FAMILIES\n"
        "list(FAMILIES['chart_qa'].make(DatasetConfig(family='chart_qa'), 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("molmo_model.errors.DataError: HuggingFaceM4/ChartQA@") and "set `path`" in last


def test_defects_of_a_snapshot_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder and no file of"):
        make(PLAIN, tmp_path / "nothing")
    snapshot(tmp_path, FEATURES, {"train": [row(0)]})
    with pytest.raises(DataError, match="has no split 'validation'; it has train"):
        make(PLAIN, tmp_path)
    parquet = tmp_path / "data" / "train-00000-of-00001.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        make(PLAIN, tmp_path)


def test_data_to_be_fetched_by_hand(tmp_path: Path) -> None:
    kind = family(replace(SET, hub=None, by_hand="Register there."), convert)
    with pytest.raises(DataError, match=r"must be fetched by hand: Register there. Then set `path`.*example.org/card"):
        make(kind, None)
    snapshot(tmp_path, FEATURES, {"train": [row(0)], "validation": [row(1)]})
    assert len(make(kind, tmp_path)) == 2


# ---- rows


def test_bad_rows_are_told_and_the_others_stay(tmp_path: Path) -> None:
    broken = {"image": {"bytes": png(1)[:40], "path": None}, "question": "q", "label": 0}
    entries = [row(0), row(1, question=None), broken, {"image": None, "question": "q", "label": 0}, row(4)]
    snapshot(tmp_path, FEATURES, {"train": entries, "validation": [row(9)]})
    made = make(PLAIN, tmp_path)
    assert sorted(good(made)) == ["train-0000000", "train-0000004", "validation-0000000"]
    file = "train-00000-of-00001.parquet"
    assert bad(made) == [
        (file, 2, "question", "is missing"),
        (file, 3, "image", "is no image of PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        (file, 4, "image", "is missing"),
    ]
    (told, *_) = [row for _, row in made if isinstance(row, BadRow)]
    assert told.file == f"{tmp_path}/data/{file}" and told.id == "train-0000001" and not told.known


def test_what_no_example_may_be_is_a_bad_row(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(0, question=" ")], "validation": [row(1)]})
    ((_, line, name, reason),) = bad(make(PLAIN, tmp_path))
    assert (line, name) == (1, "conversations[0].messages[0].text") and "must be text that is not empty" in reason


def test_pictures_are_bounded(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(0)], "validation": [row(1)]})
    made = make(PLAIN, tmp_path, max_image_pixels=40)
    assert [reason for *_, reason in bad(made)] == ["is 8 x 6, more than 40 pixels (`max_image_pixels`)"] * 2


def test_equal_ids_and_several_examples_of_a_row_get_names_of_their_own(tmp_path: Path) -> None:
    def twice(fields: dict[str, Any], files: Files, options: Any) -> list[Example]:
        return [replace(convert(fields, files, options), id=name) for name in ("a", "a~2")]

    snapshot(tmp_path, FEATURES, {"train": [row(0), row(1)], "validation": [row(2)]})
    made = make(family(SET, twice), tmp_path)
    assert [example.id for _, example in made if isinstance(example, Example)] == [
        "a",
        "a~2",
        "a~3",
        "a~2~2",
        "a~4",
        "a~2~3",
    ]


def test_a_row_may_hold_no_example(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(0), row(1, label=0)], "validation": [row(2)]})
    kind = family(SET, lambda fields, files, options: convert(fields, files, options) if fields["label"] else [])
    assert sorted(good(make(kind, tmp_path))) == ["train-0000000", "validation-0000000"]


def test_at_most_so_many_examples_and_no_more_is_read(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(n) for n in range(9)], "validation": [row(10), row(11)]})
    seen = []

    def noted(fields: dict[str, Any], files: Files, options: Any) -> Example:
        seen.append(fields[ROW_KEY])
        return convert(fields, files, options)

    made = make(family(SET, noted), tmp_path, train_examples=2, eval_examples=0)
    assert [split for split, _ in made] == ["train", "train"]
    assert seen == ["train-0000000", "train-0000001"]


def test_a_side_that_is_held_out(tmp_path: Path) -> None:
    snapshot(tmp_path, FEATURES, {"train": [row(n % 30, question=f"{n}?") for n in range(60)]})
    kind = family(replace(SET, splits={"train": "train", "eval": None}), convert)
    made = make(kind, tmp_path, eval_fraction=0.4)
    sides: dict[str, set[str]] = {}
    for split, example in made:
        assert isinstance(example, Example)
        sides.setdefault(example.images[0].sha256, set()).add(split)
    assert len(sides) == 30 and all(len(found) == 1 for found in sides.values())
    assert {split for split, _ in made} == {"train", "eval"}
    assert {split for split, _ in make(kind, tmp_path, eval_fraction=0.0)} == {"train"}


def test_several_pictures_cannot_be_held_out_while_reading(tmp_path: Path) -> None:
    def two(fields: dict[str, Any], files: Files, options: Any) -> Example:
        picture = files.image(fields["image"], "image")
        return Example("two", (picture, picture), (talk("q"),))

    snapshot(tmp_path, FEATURES, {"train": [row(0)]})
    with pytest.raises(DataError, match="'two' has 2 pictures"):
        make(family(replace(SET, splits={"train": "train", "eval": None}), two), tmp_path)


def test_an_option_can_name_the_split_to_evaluate_on(tmp_path: Path) -> None:
    @dataclass
    class Options:
        eval_split: str = "validation"

    snapshot(tmp_path, FEATURES, {"train": [row(0)], "validation": [row(1)], "test": [row(2)]})
    kind = family(SET, convert, Options)
    assert [name for name, (split, _) in good(make(kind, tmp_path)).items() if split == "eval"] == [
        "validation-0000000"
    ]
    made = good(make(kind, tmp_path, options={"eval_split": "test"}))
    assert [name for name, (split, _) in made.items() if split == "eval"] == ["test-0000000"]


def test_films(tmp_path: Path) -> None:
    data = film([1001 * number for number in range(12)])
    (tmp_path / "a.mp4").write_bytes(data)
    json_lines(tmp_path / "rows.jsonl", [{"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "a.mp4", "start": 9.0}])

    def filmed(fields: dict[str, Any], files: Files, options: Any) -> Example:
        clip = (fields.get("start", 0.0), 0.2)
        return Example(fields[ROW_KEY], (), (talk("q"),), videos=(files.video(fields["video"], "video", clip),))

    made = make(family(SET, filmed), tmp_path / "rows.jsonl", eval_fraction=0.0)
    example = first(made)
    assert example.videos[0].data == data and example.videos[0].clip == (0.0, 0.2)
    assert [(line, name) for _, line, name, _ in bad(made)] == [(2, "video"), (3, "clip_end")]


# ---- groups


def _tree(rows_of_one: list[dict[str, Any]], files: Files, options: Any) -> Example:
    def conversation(fields: dict[str, Any]) -> Conversation:
        if not fields.get("question"):
            raise RowError("question", "is missing")
        return talk(fields["question"])

    talks = each(rows_of_one, conversation)
    return Example(str(rows_of_one[0]["image_id"]), (files.image(rows_of_one[0]["image"], "image"),), tuple(talks))


GROUPED = Features({"image": datasets.Image(), "image_id": Value("int64"), "question": Value("string")})
TREE = family(SET, _tree, group=lambda fields: fields["image_id"])


def of(image: int, question: str | None) -> dict[str, Any]:
    return {"image": hub_image(image), "image_id": image, "question": question}


def questions(example: Example) -> list[str | None]:
    return [conversation.messages[0].text for conversation in example.conversations]


def test_rows_of_one_picture_become_one_example_wherever_they_stand(tmp_path: Path) -> None:
    entries = [of(n % 7, f"{n}?") for n in range(200)]
    snapshot(tmp_path, GROUPED, {"train": entries, "validation": [of(3, "held out?")]})
    made = good(make(TREE, tmp_path))
    assert list(made) == [*map(str, range(7)), "3~2"]
    for image in range(7):
        assert questions(made[str(image)][1]) == [f"{n}?" for n in range(image, 200, 7)]
        assert made[str(image)][1].images[0].data == png(image)
    assert questions(made["3~2"][1]) == ["held out?"] and made["3~2"][0] == "eval"


def test_a_bad_row_of_a_group_is_told_and_the_others_stay(tmp_path: Path) -> None:
    entries = [of(1, "a?"), of(2, None), of(1, None), of(1, "b?")]
    snapshot(tmp_path, GROUPED, {"train": entries, "validation": [of(5, "c?")]})
    made = make(TREE, tmp_path)
    assert {name: questions(example) for name, (_, example) in good(made).items()} == {"1": ["a?", "b?"], "5": ["c?"]}
    assert [(line, name) for _, line, name, _ in bad(made)] == [(3, "question"), (2, "question")]


def test_a_broken_picture_loses_its_group_once(tmp_path: Path) -> None:
    entries = [of(1, "a?"), of(2, "b?"), of(1, "c?")]
    for entry in (entries[0], entries[2]):
        entry["image"] = {"bytes": b"no picture", "path": None}
    snapshot(tmp_path, GROUPED, {"train": entries, "validation": [of(5, "d?")]})
    made = make(TREE, tmp_path)
    assert sorted(good(made)) == ["2", "5"]
    ((_, line, name, reason),) = bad(made)
    assert (line, name) == (1, "image") and reason.endswith("(and 1 more rows of its group)")


def test_pictures_of_groups_are_kept_on_disk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as long as the different pictures and the texts, however often a picture is repeated."""
    sizes = []
    real: Callable[..., Any] = row_groups._Store.write

    def write(store: Any, item: Any) -> Any:
        place = real(store, item)
        sizes.append(store.file.seek(0, io.SEEK_END))
        return place

    monkeypatch.setattr(row_groups._Store, "write", write)
    big = {number: bytes([number]) * 100_000 for number in range(3)}
    found = (
        published_rows.Row("f", n + 1, {"k": n % 3, "n": n, "image": {"bytes": big[n % 3]}, "list": [big[0]]})
        for n in range(30)
    )
    groups = list(row_groups.grouped(found, lambda fields: fields["k"]))
    assert 300_000 < sizes[-1] < 310_000
    assert [[item.fields["n"] for item in group] for group in groups] == [list(range(k, 30, 3)) for k in range(3)]
    assert all(item.fields["image"]["bytes"] == big[item.fields["k"]] for group in groups for item in group)
    assert groups[2][0].fields["list"] == [big[0]] and groups[2][0].line == 3


# ---- URLs


URLS = replace(SET, splits={"train": "train"}, urls=lambda fields: [(fields["image_url"], fields.get("sha"))])
LINKED = family(URLS, lambda fields, files, options: convert(fields | {"image": fields["image_url"]}, files, options))


def test_pictures_by_url_come_from_the_list_of_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLMO_DOWNLOAD_DIR", str(tmp_path / "store"))
    data = png(3)
    part = tmp_path / "part"
    part.write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    Store().adopt(part, sha)
    url, gone = "https://example.org/a.png", "http://example.org/b.png"
    listed = tmp_path / "list.parquet"
    write_list(
        listed,
        [
            Download(url, Status.OK, sha256=sha, bytes=len(data), format="PNG", width=8, height=6),
            Download(gone, Status.GONE, reason="404"),
        ],
    )
    path = json_lines(
        tmp_path / "rows.jsonl", [{"image_url": url, "question": "q"}, {"image_url": gone, "question": "r"}]
    )
    made = make(LINKED, path, downloads=str(listed))
    assert first(made).images[0].data == data
    ((_, told),) = [(split, item) for split, item in made if isinstance(item, BadRow)]
    assert (told.line, told.field, told.known) == (2, "image", True)
    assert gone in told.reason and "404" in told.reason
    with pytest.raises(DataError, match=r"python -m pipelines.download dataset=NAME.*datasets.NAME.downloads"):
        make(LINKED, path)


def test_the_urls_of_a_dataset(tmp_path: Path) -> None:
    entries = [{"image_url": f"https://example.org/{n}", "sha": "0" * 64 if n else None} for n in range(3)]
    config = DatasetConfig(family="set", path=str(json_lines(tmp_path / "rows.jsonl", entries)))
    assert LINKED.urls is not None and PLAIN.urls is None
    assert list(LINKED.urls(config)) == [(f"https://example.org/{n}", "0" * 64 if n else None) for n in range(3)]


def test_names_of_files_need_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Stream:
        def decode(self, enable: bool) -> list[dict[str, Any]]:
            return [{"image": "coco/a.png", "question": "q"}]

    monkeypatch.setattr(datasets, "load_dataset", lambda hub, **options: Stream())
    with pytest.raises(DataError, match=r"names its files by path, such as 'coco/a.png'; set `image_root`"):
        make(PLAIN, None)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.png").write_bytes(png(8))
    assert first(make(PLAIN, None, image_root=str(tmp_path))).images[0].data == png(8)


# ---- what a family says of its data


def test_the_fingerprint_of_the_hub_and_of_files(tmp_path: Path) -> None:
    subset = family(replace(SET, subset="part"), convert)
    config = DatasetConfig(family="set")
    assert subset.fingerprint(config, 0) == {"hub": "owner/name@abc123 (part)"}
    assert PLAIN.fingerprint(replace(config, revision="v2"), 0) == {"hub": "owner/name@v2"}
    snapshot(tmp_path, FEATURES, {"train": [row(0)], "validation": [row(1)]})
    local = replace(config, path=str(tmp_path))
    before = PLAIN.fingerprint(local, 0)
    assert PLAIN.fingerprint(local, 0) == before and list(before) == [str(tmp_path)]
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").write_text("x")
    assert PLAIN.fingerprint(local, 0) == before
    (tmp_path / "more.txt").write_text("x")
    after = PLAIN.fingerprint(local, 0)
    assert after != before
    (tmp_path / "more.txt").write_text("y" * 9)
    assert PLAIN.fingerprint(local, 0) not in (before, after)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(png(0))
    rooted = PLAIN.fingerprint(replace(config, image_root=str(pictures)), 0)
    (pictures / "a.png").write_bytes(png(1, 9))
    assert PLAIN.fingerprint(replace(config, image_root=str(pictures)), 0) != rooted


def test_the_family_carries_licence_source_and_revision() -> None:
    assert (PLAIN.licence, PLAIN.source, PLAIN.revision, PLAIN.card) == (
        "MIT",
        "owner/name",
        "abc123",
        "https://example.org/card",
    )
    assert family(replace(SET, hub=None), convert).source == "https://example.org/card"
