"""The journal's command: listing, showing, pruning, merging, on invented answers."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from molmo_model.eval import journal as journals
from molmo_model.eval.journal import Journal, read_lines, seal
from pipelines import journal, predict
from tests.eval.test_journal import IDENTITY

WEIGHTS, OTHERS = "0123456789abcdef0123", "f" * 20
MADE = {"batch_size": 4, "ranks": 2, "device": "cpu", "engine": "generate", "checkpoint": "base/step-1", "task": "qa"}


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    """A folder with two answers, one of which was asked again, and another checkpoint's one answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    monkeypatch.setattr(journal, "needed", lambda params: (set(), set()))
    monkeypatch.setattr(journal, "load_params", lambda path: None)
    write(WEIGHTS, "qa", ("k1", "one"), ("k2", "two"))
    write(WEIGHTS, "qa", ("k1", "newer"), turns={"k1": 1})
    write(OTHERS, "qa", ("k9", "nine"), made={**MADE, "checkpoint": "old/step-1"})
    return tmp_path


def write(weights, writer, *answers, turns=None, made=MADE, at=None):
    with Journal(predict.journals() / weights, writer) as one, pytest.MonkeyPatch.context() as patch:
        if at is not None:
            patch.setattr(time, "time", lambda: at)
        one.introduce(IDENTITY.digest, {"engine": "slots", "precision": "bf16", "code": "abcdef" * 10, "decoding": {}})
        one.append([(key, {"text": text}) for key, text in answers], made, IDENTITY.digest, turns)


def answers(weights=WEIGHTS):
    with Journal(predict.journals() / weights, "reader") as one:
        found = {key: one.get(key)["text"] for key in ("k1", "k2", "k3", "k9") if one.get(key)}
    (predict.journals() / weights / "reader.jsonl").unlink()
    return found


def test_the_list_says_who_answered_how_and_what_is_damaged(capsys):
    path = predict.journals() / WEIGHTS / "qa.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"tow"'))
    journal.main(["list"])
    said = capsys.readouterr().out
    assert f"{WEIGHTS}  gone, was base/step-1: 1 answers, 1 replaced" in said
    assert "1 by slots bf16, code abcdefab: qa 1" in said
    assert f"{path}:3: damaged" in said
    assert f"{OTHERS}  gone, was old/step-1: 1 answers, 0 replaced" in said


def test_lines_of_before_facts_were_kept_are_read_and_listed(capsys):
    path = predict.journals() / ("a" * 20) / "qa.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(seal({"key": "k3", "answer": {"text": "three"}, "made": {"batch_size": 1, "ranks": 1}}))
    assert answers("a" * 20) == {"k3": "three"}
    journal.main([])
    assert "1 by an engine that was not recorded: ? 1" in capsys.readouterr().out


def test_what_made_an_answer_is_shown_per_row(capsys):
    journal.main(["show", "task=qa"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    assert "slots bf16" in rows[0] and "batch_size 4  ranks 2  device cpu" in rows[0]
    journal.main(["show", "key=k1"])
    said = capsys.readouterr().out
    assert said.index('"text": "one"') < said.index('"text": "newer"')
    assert '"counts": "replaced"' in said and '"counts": "counts"' in said
    journal.main(["show", "task=qq"])
    assert "no answer of task=qq" in capsys.readouterr().out


def test_pruning_says_first_what_it_would_do(capsys):
    before = {path: path.read_bytes() for path in predict.journals().rglob("*.jsonl")}
    journal.main(["prune", "gone=true", "days=0"])
    assert "would free" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in predict.journals().rglob("*.jsonl")} == before


def test_pruning_takes_what_is_replaced_or_damaged_and_changes_no_answer(capsys):
    path = predict.journals() / WEIGHTS / "qa.jsonl"
    path.write_bytes(path.read_bytes() + b"0123 nonsense\n")
    wanted = answers()
    journal.main(["prune", "apply=true"])
    assert "1 damaged, 1 replaced" in capsys.readouterr().out
    assert answers() == wanted == {"k1": "newer", "k2": "two"}
    assert [bool(line.facts) for line in read_lines(path)] == [True, False, False]
    assert answers(OTHERS) == {"k9": "nine"}
    write(WEIGHTS, "qa", ("k3", "three"))  # the file goes on as it was
    assert answers() == {**wanted, "k3": "three"}


def test_pruning_by_age_and_by_checkpoint(capsys):
    write(WEIGHTS, "older", ("k3", "three"), at=time.time() - 40 * 86400)
    journal.main(["prune", "days=30", "apply=true"])
    assert answers() == {"k1": "newer", "k2": "two"}
    journal.main(["prune", "gone=true", "apply=true"])
    assert not list(predict.journals().glob("*/*.jsonl"))


def test_what_the_params_need_stays(monkeypatch):
    monkeypatch.setattr(journal, "needed", lambda params: ({"k2"}, {("old/step-1", "qa")}))
    journal.main(["prune", "days=0", "gone=true", "apply=true"])
    assert answers() == {"k2": "two"}
    assert answers(OTHERS) == {"k9": "nine"}  # its cell could not be looked up


def test_a_file_in_use_is_left_alone_and_its_new_lines_are_kept(capsys):
    found = journal.to_prune(None, None, False)
    with Journal(predict.journals() / WEIGHTS, "qa") as writer:
        assert journal.prune(found) == [f"{writer.path} is being written; prune it later"]
        writer.append([("k3", {"text": "three"})], MADE)
    assert journal.prune(found) == []
    assert answers() == {"k1": "newer", "k2": "two", "k3": "three"}


def test_merging_takes_what_is_new_verified_and_once(tmp_path, capsys):
    theirs = tmp_path / "theirs" / WEIGHTS
    with Journal(theirs, "qa") as one:
        one.append([("k2", {"text": "two"}), ("k3", {"text": "three"})], MADE)
        one.append([("k1", {"text": "newest"})], MADE, turns={"k1": 2})
        one.append([("k9", {"text": "nine"})], MADE)
    path = theirs / "qa.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"nine"', b'"nein"'))
    journal.main(["merge", str(tmp_path / "theirs")])
    assert "2 answers taken over, 1 were known, 1 damaged" in capsys.readouterr().out
    assert answers() == {"k1": "newest", "k2": "two", "k3": "three"}
    journal.main(["merge", str(tmp_path / "theirs"), str(path)])
    assert "0 answers taken over, 6 were known, 2 damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["purge"], ["show"], ["show", "task=a", "key=b"], ["prune", "day=1"], ["prune", "days=x"], ["prune", "apply=yes"],
     ["merge"], ["merge", "nowhere"], ["list", "task=a"]],
)  # fmt: skip
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        journal.main(words)
    assert stop.value.code == 2
    assert "ConfigError" in capsys.readouterr().err


def test_the_same_answers_win_in_whatever_order_files_are_read():
    """Ties too: two machines that merged each other's journals must agree."""
    folder = predict.journals() / ("b" * 20)
    lines = [
        seal({"key": "k", "answer": {"text": text}, "made": {}, "turn": turn, "at": at})
        for text, turn, at in [("a", 1, 20), ("b", 1, 10), ("c", 0, 1), ("d", 1, 10), ("e", 0, 99)]
    ]
    found = Counter()
    for shift in range(len(lines)):
        for number, line in enumerate(lines[shift:] + lines[:shift]):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.jsonl").write_bytes(line)
        with Journal(folder, "reader") as one:
            found[json.dumps(one.get("k"))] += 1
    assert found == {'{"text": "b"}': len(lines)}


def test_pruning_a_file_that_a_writer_waits_for_loses_nothing(tmp_path):
    """The writer has opened the old file; what it writes must land in the new one."""
    path = predict.journals() / WEIGHTS / "qa.jsonl"
    with journals.exclusive(path):
        import threading

        opened = threading.Thread(target=write, args=(WEIGHTS, "qa", ("k3", "three")))
        opened.start()
        time.sleep(0.2)
        copy = Path(f"{path}.new")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
    opened.join(30)
    assert answers() == {"k1": "newer", "k2": "two", "k3": "three"}
