"""The journal: what may and what must not be reused, kills at any byte, damage, several writers."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from molmo_model.artifacts import FileEntry, Manifest
from molmo_model.eval.journal import Identity, Journal, identity_of, seal, unseal

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
