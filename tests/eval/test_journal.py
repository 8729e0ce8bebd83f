"""The journal: what may and what must not be reused, kills at any byte, damage, several writers."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import pytest

from molmo_model.artifacts import FileEntry, Manifest
from molmo_model.eval.journal import Identity, Journal, identity_of, read_lines, seal, unseal

IDENTITY = Identity(
    weights="w" * 64,
    config="c" * 64,
    preprocessor="p" * 64,
    tokenizer="t" * 64,
    code="d" * 64,
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    decoding={"strategy": "greedy", "max_new_tokens": 8},
    precision="fp32",
)
IMAGES, PROMPT = ["a" * 64, "b" * 64], ["What is it?", " A cat.", " Where?"]
MADE = {"batch_size": 4, "ranks": 1}

MUTATIONS = {
    **{
        name: dataclasses.replace(IDENTITY, **{name: "x" * 64})
        for name in ("weights", "config", "preprocessor", "tokenizer", "code")
    },
    "precision": dataclasses.replace(IDENTITY, precision="bf16"),
    "one version": dataclasses.replace(IDENTITY, versions={**IDENTITY.versions, "torch": "2.13.1"}),
    "another library": dataclasses.replace(IDENTITY, versions={**IDENTITY.versions, "numpy": "2"}),
    "tokens": dataclasses.replace(IDENTITY, decoding={**IDENTITY.decoding, "max_new_tokens": 9}),
    "strategy": dataclasses.replace(IDENTITY, decoding={**IDENTITY.decoding, "strategy": "beam"}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_whatever_can_change_an_answer_changes_its_key(name):
    assert MUTATIONS[name].key(IMAGES, PROMPT) != IDENTITY.key(IMAGES, PROMPT)


@pytest.mark.parametrize(
    ("images", "prompt"),
    [
        (IMAGES[::-1], PROMPT),
        (IMAGES[:1], PROMPT),
        ([], PROMPT),
        (IMAGES, PROMPT[:1]),
        (IMAGES, ["What is it? A cat. Where?"]),  # the same text, other turns
        (IMAGES, ["What is it? ", "A cat.", " Where?"]),
    ],
)
def test_another_question_has_another_key(images, prompt):
    assert IDENTITY.key(images, prompt) != IDENTITY.key(IMAGES, PROMPT)


def manifest(**files):
    entries = {name.replace("__", "."): FileEntry(1, sha) for name, sha in files.items()}
    return Manifest("molmo/checkpoint", 1, {}, {}, "code", entries)


FILES = {
    "model__safetensors": "1",
    "config__json": "2",
    "generation_config__json": "3",
    "molmo_preprocessor__json": "4",
    "tokenizer__json": "5",
    "tokenizer_config__json": "6",
    "params__json": "7",
    "train_state/part__distcp": "8",
}


def identity(**changes):
    return identity_of(manifest(**{**FILES, **changes}), "code", {"max_new_tokens": 8}, "fp32").key(IMAGES, PROMPT)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("params", "train_state"))])
def test_every_file_that_the_model_is_made_of_counts(name):
    assert identity(**{name: "x"}) != identity()


def test_what_decodes_pictures_and_films_counts():
    """Another release of OpenCV or FFmpeg may decode or resize to other pixels."""
    assert {"av", "opencv-python-headless", "pillow"} <= set(
        identity_of(manifest(**FILES), "code", {}, "fp32").versions
    )


def test_new_tokenizer_files_count():
    assert identity(merges__txt="x") != identity()


@pytest.mark.parametrize(
    "name", ["params__json", "chat_template__jinja", "train_state/part__distcp", "train_state/more__distcp"]
)
def test_what_no_answer_depends_on_does_not_count(name):
    assert identity(**{name: "x"}) == identity()


def test_answers_survive_and_are_found_again(tmp_path):
    with Journal(tmp_path, "a") as journal:
        journal.append([("k1", {"text": "é\n\u2028x"}), ("k2", {"text": ""})], MADE)
        assert journal.get("k1") == {"text": "é\n\u2028x"}
    with Journal(tmp_path, "a") as journal:
        assert journal.get("k1") == {"text": "é\n\u2028x"}
        assert journal.get("k2") == {"text": ""}
        assert journal.get("k3") is None
        assert not journal.problems
    assert json.loads((tmp_path / "a.jsonl").read_bytes().splitlines()[0].split(b" ", 1)[1])["made"] == MADE


def test_a_kill_at_any_byte_loses_only_the_line_in_flight(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(tmp_path, "a") as journal:
        journal.append([("k1", {"text": "one"}), ("k2", {"text": "two"})], MADE)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(tmp_path, "a") as journal:
            kept = [key for key in ("k1", "k2") if journal.get(key)]
            assert kept == (["k1", "k2"] if size == len(whole) else ["k1"] if size >= first else [])
            assert bool(journal.problems) == (size not in {0, first, len(whole)})
            journal.append([("k3", {"text": "three"})], MADE)
        with Journal(tmp_path, "a") as journal:
            assert journal.get("k3") == {"text": "three"}
            assert not journal.problems


def test_damage_at_any_byte_of_the_middle_is_skipped_and_named_never_used(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(tmp_path, "a") as journal:
        journal.append([("k1", {"text": "one"}), ("k2", {"text": "two"}), ("k3", {"text": "three"})], MADE)
    whole = path.read_bytes()
    start, end = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1)
    for place in range(start, end):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with Journal(tmp_path, "a") as journal:
            assert journal.get("k2") is None
            assert (journal.get("k1"), journal.get("k3")) == ({"text": "one"}, {"text": "three"})
            assert f"{path}:2:" in journal.problems[0]


def test_writers_share_a_folder_and_journals_merge_by_copying(tmp_path):
    with Journal(tmp_path / "x", "rank0") as first, Journal(tmp_path / "x", "rank1") as second:
        first.append([("k1", {"text": "one"})], MADE)
        second.append([("k2", {"text": "two"})], MADE)
    with Journal(tmp_path / "y", "other") as journal:
        journal.append([("k3", {"text": "three"})], MADE)
    (tmp_path / "y" / "other.jsonl").rename(tmp_path / "x" / "other.jsonl")
    with Journal(tmp_path / "x", "rank0") as journal:
        assert [journal.get(key)["text"] for key in ("k1", "k2", "k3")] == ["one", "two", "three"]


def test_another_writers_unfinished_line_is_left_alone(tmp_path):
    other = tmp_path / "other.jsonl"
    line = seal({"key": "k1", "answer": {"text": "one"}, "made": {}})
    other.write_bytes(line + line[:20])
    with Journal(tmp_path, "mine") as journal:
        assert journal.get("k1") == {"text": "one"}
        assert not journal.problems
    assert other.read_bytes() == line + line[:20]


def test_a_second_process_of_the_same_writer_waits(tmp_path):
    code = (
        "import sys; from molmo_model.eval.journal import Journal\n"
        "print('started', flush=True)\n"
        "with Journal(sys.argv[1], 'a') as journal: print(journal.get('k1'), flush=True)"
    )
    with Journal(tmp_path, "a") as journal:
        command = [sys.executable, "-c", code, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout.readline() == "started\n"
        journal.append([("k1", {"text": "one"})], MADE)
    assert child.communicate(timeout=60)[0] == "{'text': 'one'}\n"


def test_unseal_refuses_what_seal_did_not_write():
    line = seal({"key": "a"})
    assert unseal(line) == {"key": "a"}
    for wrong in (b"", b"\n", b"0123456789abcdef {}\n", line.replace(b"a", b"b"), b"null\n"):
        assert unseal(wrong) is None


def test_answers_are_with_the_system_as_soon_as_they_are_recorded(tmp_path):
    """A kill after `append` loses none, however long the next answer takes; the disk follows within seconds."""
    with Journal(tmp_path, "a") as journal:
        for number in range(3):
            journal.append([(f"k{number}", {"text": "x"})], MADE)
            assert journal.path.read_bytes().count(b"\n") == number + 1


def test_what_an_identity_stands_for_is_written_once_per_file(tmp_path):
    for _ in range(2):
        with Journal(tmp_path, "a") as journal:
            for _ in range(2):
                journal.introduce(IDENTITY.digest, {"precision": "fp32"})
            journal.append([("k1", {"text": "one"})], MADE, IDENTITY.digest)
    with Journal(tmp_path, "b") as journal:
        journal.introduce(IDENTITY.digest, {"precision": "fp32"})
    lines = [line for name in "ab" for line in read_lines(tmp_path / f"{name}.jsonl")]
    assert [line.facts for line in lines if line.facts] == [(IDENTITY.digest, {"precision": "fp32"})] * 2
    assert {line.entry.identity for line in lines if line.entry} == {IDENTITY.digest}


def test_a_later_turn_wins_and_the_older_line_stays(tmp_path):
    with Journal(tmp_path, "z") as journal:
        journal.append([("k1", {"text": "new"})], MADE, turns={"k1": 2})
    with Journal(tmp_path, "a") as journal:
        assert journal.turn("k1") == 2
        journal.append([("k1", {"text": "old"}), ("k2", {"text": "two"})], MADE)
        assert journal.get("k1") == {"text": "new"}
        assert [journal.turn(key) for key in ("k1", "k2", "k3")] == [2, 0, -1]
    with Journal(tmp_path, "b") as journal:
        assert journal.get("k1") == {"text": "new"}
    assert sum(path.read_bytes().count(b'"k1"') for path in tmp_path.glob("*.jsonl")) == 2


def test_new_lines_of_others_are_seen_when_asked_for(tmp_path):
    with Journal(tmp_path, "mine") as mine, Journal(tmp_path, "other", others=False) as other:
        for number in range(3):
            other.append([(f"k{number}", {"text": str(number)})], MADE)
            assert mine.get(f"k{number}") is None
            mine.refresh()
            assert mine.get(f"k{number}") == {"text": str(number)}


def test_whatever_is_damaged_nothing_wrong_is_ever_answered(tmp_path):
    """300 journals of two writers, cut, with bits turned, with bytes gone or doubled: a key has its answer, an older
    one of its own, or none; lines that were not touched all count; every touched one is told by file and line."""
    said = {(key, turn): f"{key} in turn {turn}" for key in ("k1", "k2", "k3") for turn in range(2)}
    for name, turn in (("a", 0), ("b", 1)):
        with Journal(tmp_path, name) as journal:
            journal.introduce(IDENTITY.digest, {"precision": "fp32"})
            for key in ("k1", "k2", "k3"):
                journal.append([(key, {"text": said[key, turn]})], MADE, IDENTITY.digest, {key: turn})
    whole = {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in "ab"}
    rng = random.Random(0)
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in whole.items():
            (folder / f"{name}.jsonl").write_bytes(damage(data, rng))
        files = {name: (folder / f"{name}.jsonl").read_bytes() for name in "ab"}
        with Journal(folder, "a") as journal:
            for key in ("k1", "k2", "k3"):
                kept = [turn for name, turn in (("a", 0), ("b", 1)) if line_of(whole[name], key) in lines(files[name])]
                wanted = {"text": said[key, max(kept)]} if kept else None
                assert journal.get(key) == wanted, (number, files)
            damaged = sum(line not in lines(whole[name]) for name in "ab" for line in lines(files[name]))
            torn = bool(files["a"].rpartition(b"\n")[2])
            assert len(journal.problems) == damaged + torn
            assert all(f"{folder}/" in problem for problem in journal.problems)


def lines(data):
    return [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def line_of(data, key):
    return next(line for line in lines(data) if f'"{key}"'.encode() in line)


def damage(data, rng):
    place = rng.randrange(len(data))
    kind = rng.choice(["none", "cut", "bit", "gone", "twice"])
    if kind == "cut":
        return data[:place]
    if kind == "bit":
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == "gone":
        return data[:place] + data[place + rng.randrange(1, 40) :]
    return data if kind == "none" else data[: place + 1] + data[place:]
