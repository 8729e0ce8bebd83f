"""Journals that two machines share through a bucket: nothing lost, nothing overwritten, nothing asked twice."""

import json
import shutil

import pytest

from molmo_model.errors import StorageError
from molmo_model.eval import shared_journal
from molmo_model.eval.journal import Journal, seal
from molmo_model.eval.shared_journal import fetch, publishing, push
from molmo_model.storage import list_files
from pipelines import journal as command
from pipelines import predict
from pipelines.stage import run
from tests.eval.test_journal_command import MADE, WEIGHTS
from tests.eval.test_predict import CELL, asked, forget, params, project, rows  # noqa: F401
from tests.storage.conftest import s3_environment, s3_server  # noqa: F401


@pytest.fixture
def place(tmp_path):
    """A shared disk."""
    return str(tmp_path / "shared")


def journal(tmp_path, machine, writer="qa"):
    return Journal(tmp_path / machine / WEIGHTS, writer)


def test_what_one_machine_answers_another_finds(tmp_path, place):
    with journal(tmp_path, "a") as one, publishing(place, one, print) as bring:
        bring()  # nobody has published anything yet
        one.append([("k1", {"text": "one"})], MADE)
    with journal(tmp_path, "b") as two, publishing(place, two, print) as bring:
        assert two.get("k1") is None
        bring()
        assert two.get("k1") == {"text": "one"}
        two.append([("k2", {"text": "two"})], MADE)
    with journal(tmp_path, "a") as one, publishing(place, one, print) as bring:
        bring()
        assert one.get("k2") == {"text": "two"}
    assert len(list_files(place)) == 2  # nobody published again what came from another


def test_pieces_are_of_new_lines_and_never_change(tmp_path, place):
    contents = {}
    for number in range(3):
        with journal(tmp_path, "a") as one:
            one.append([(f"k{number}", {"text": "x"})], MADE)
        assert push(place, tmp_path / "a" / WEIGHTS) == 1
        assert push(place, tmp_path / "a" / WEIGHTS) == 0
        now = {name: (tmp_path / "shared" / name).read_bytes() for name in list_files(place)}
        assert {name: now[name] for name in contents} == contents
        contents = now
    assert len(contents) == 3
    assert fetch(place, tmp_path / "a" / WEIGHTS) == 0  # its own
    assert fetch(place, tmp_path / "b" / WEIGHTS) == 3
    assert fetch(place, tmp_path / "b" / WEIGHTS) == 0


def test_a_machine_whose_name_was_copied_overwrites_nothing(tmp_path, place):
    for machine, text in (("a", "one"), ("b", "two")):
        with journal(tmp_path, machine) as one:
            one.append([(f"k-{text}", {"text": text})], MADE)
        if machine == "a":
            push(place, tmp_path / "a" / WEIGHTS)
            (tmp_path / "b").mkdir()
            shutil.copy(tmp_path / "a" / "machine", tmp_path / "b" / "machine")
    push(place, tmp_path / "b" / WEIGHTS)
    assert fetch(place, tmp_path / "c" / WEIGHTS) == 2


def test_a_machine_that_lost_its_state_gets_its_answers_back(tmp_path, place):
    with journal(tmp_path, "a") as one, publishing(place, one, print):
        one.append([("k1", {"text": "one"})], MADE)
    shutil.rmtree(tmp_path / "a" / WEIGHTS)
    with journal(tmp_path, "a") as one, publishing(place, one, print) as bring:
        bring()
        assert one.get("k1") == {"text": "one"}


def test_a_damaged_piece_is_refused_by_name_and_all_others_come(tmp_path, place):
    for number in range(3):
        with journal(tmp_path, "a") as one:
            one.append([(f"k{number}", {"text": "x"})], MADE)
        push(place, tmp_path / "a" / WEIGHTS)
    victim = tmp_path / "shared" / list_files(place)[1]
    victim.write_bytes(victim.read_bytes().replace(b'"x"', b'"y"'))
    told = []
    with journal(tmp_path, "b") as two, publishing(place, two, told.append) as bring:
        bring()
        assert sum(two.get(f"k{number}") is not None for number in range(3)) == 2
    assert victim.name in told[0] and "SHA-256" in told[0]


def test_damaged_lines_are_not_published(tmp_path, place):
    with journal(tmp_path, "a") as one:
        one.append([("k1", {"text": "one"}), ("k2", {"text": "two"})], MADE)
    path = tmp_path / "a" / WEIGHTS / "qa.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"one"', b'"eno"'))
    push(place, path.parent)
    with journal(tmp_path, "b") as two, publishing(place, two, print) as bring:
        bring()
        assert (two.get("k1"), two.get("k2")) == (None, {"text": "two"})
        assert not two.problems


@pytest.mark.parametrize("kind", ["fails", "hangs"])
def test_a_place_that_does_not_answer_loses_nothing_and_is_told_once(kind, tmp_path, place, monkeypatch):
    def broken(*_):
        if kind == "hangs":
            hanging.wait(30)
        raise StorageError("s3://bucket: no route")

    import threading

    hanging, told = threading.Event(), []
    monkeypatch.setattr(shared_journal, "copy_tree", broken)
    monkeypatch.setattr(shared_journal, "LAST_SECONDS", 0.3)
    monkeypatch.setattr(shared_journal, "PUBLISH_SECONDS", 0.01)
    with journal(tmp_path, "a") as one, publishing(place, one, told.append):
        one.append([("k1", {"text": "one"})], MADE)
    hanging.set()
    assert len(told) == 1
    assert ("no route" if kind == "fails" else "takes longer") in told[0]
    monkeypatch.undo()
    with journal(tmp_path, "a") as one:
        assert one.get("k1") == {"text": "one"}
    assert push(place, tmp_path / "a" / WEIGHTS) == 1  # the next time it is shared


def test_what_pruning_took_is_neither_fetched_nor_published_again(tmp_path, place, monkeypatch):
    monkeypatch.setattr(command, "needed", lambda params: (set(), set()))
    monkeypatch.setenv("MOLMO_STATE_DIR", str(tmp_path / "state"))
    folder = predict.journals() / WEIGHTS
    for turn in range(2):
        with Journal(folder, "qa") as one:
            one.append([("k1", {"text": f"turn {turn}"})], MADE, turns={"k1": turn})
    with journal(tmp_path, "b") as two:
        two.append([("k2", {"text": "two"})], MADE, turns={"k2": 0})
        two.append([("k2", {"text": "newer"})], MADE, turns={"k2": 1})
    push(place, tmp_path / "b" / WEIGHTS)
    push(place, folder)
    fetch(place, folder)
    command.prune(command.to_prune(None, None, False))
    assert sum(line.entry is not None for path in folder.glob("*.jsonl") for line in command.read_lines(path)) == 2
    assert (fetch(place, folder), push(place, folder)) == (0, 0)


def test_the_command_pushes_and_pulls(tmp_path, place, monkeypatch, capsys):
    for machine, words in (("a", ["push", f"place={place}"]), ("b", ["pull", f"place={place}"])):
        monkeypatch.setenv("MOLMO_STATE_DIR", str(tmp_path / machine))
        if machine == "a":
            with Journal(predict.journals() / WEIGHTS, "qa") as one:
                one.append([("k1", {"text": "one"})], MADE)
        command.main(words)
    assert capsys.readouterr().out == "1 pieces published\n1 pieces fetched\n"
    with Journal(predict.journals() / WEIGHTS, "qa") as one:
        assert one.get("k1") == {"text": "one"}


@pytest.mark.slow
def test_a_colleague_finds_the_predictions_in_the_bucket(project, asked, s3_environment, monkeypatch):  # noqa: F811
    import s3fs

    s3fs.S3FileSystem().mkdir("team")
    settings = params()
    settings.runtime.journal = "s3://team/journal"
    first = run(predict.STAGE, settings, **CELL)
    answers = rows()
    forget(project)
    shutil.rmtree(project / ".state")
    monkeypatch.setenv("MOLMO_STATE_DIR", str(project / "colleague"))
    assert run(predict.STAGE, settings, **CELL) == first
    assert rows() == answers
    assert sum(asked) == len(answers)  # all of them the first time
    (piece,) = list_files("s3://team/journal")
    lines = (s3fs.S3FileSystem().cat_file(f"team/journal/{piece}")).splitlines(keepends=True)
    assert all(seal(json.loads(line.split(b" ", 1)[1])) == line for line in lines)
