"""The listing and pruning of state: what today's params ask for stays, whatever its age."""

import os
import shutil
import time
from pathlib import Path

import pytest

from molmo_model.artifacts import file_sha256
from molmo_model.config import load_params
from molmo_model.errors import ConfigError
from pipelines import shards, state
from pipelines.stage import run, stamp, state_dir

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("datasets.digit_scenes.train_examples=4", "datasets.digit_scenes.eval_examples=2")


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    return load_params(ROOT / "params.yaml", SMALL)


def age(folder: Path, days: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - days * 86400,) * 2)


def test_wanted_state_stays_and_stale_state_goes(params):
    run(shards.STAGE, params, dataset="digit_scenes")
    yesterday = load_params(ROOT / "params.yaml", (*SMALL, "seed=99"))
    run(shards.STAGE, yesterday, dataset="digit_scenes")
    key = {"dataset": "digit_scenes"}
    wanted = state_dir(shards.STAGE, key, stamp(shards.STAGE, params, key))
    stale = state_dir(shards.STAGE, key, stamp(shards.STAGE, yesterday, key))
    for folder in (wanted, stale):
        age(folder, days=30)
    assert {one.path: (one.finished, one.wanted) for one in state.states(params)} == {
        wanted: (True, True),
        stale: (True, False),
    }
    published = Path("artifacts/shards/digit_scenes/index.parquet")
    before = file_sha256(published)
    assert [one.path for one in state.prune(params, days=60, journals=False)] == []
    assert [one.path for one in state.prune(params, days=7, journals=False)] == [stale]
    assert wanted.exists() and not stale.exists()
    assert file_sha256(published) == before  # the artefact has its own link


def test_journals_go_only_on_request_and_only_without_their_checkpoint(params):
    journal = Path(".state/predict/journal/0123456789")
    journal.mkdir(parents=True)
    (journal / "scene_qa.jsonl").write_text("{}\n")
    age(journal, days=30)
    assert state.prune(params, days=7, journals=False) == []
    assert [one.path for one in state.prune(params, days=7, journals=True)] == [journal]


@pytest.mark.parametrize("arguments", [["purge"], ["prune", "day=3"], ["prune", "days=x"], ["prune", "journals=yes"]])
def test_unknown_words_are_refused(arguments, params, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["state", *arguments, f"params={ROOT / 'params.yaml'}"])
    with pytest.raises(SystemExit) as stop:
        state.main()
    assert stop.value.code == 2
    assert ConfigError.__name__ in capsys.readouterr().err


def test_adopted_artefacts_are_not_made_again(params, monkeypatch):
    """As after `dvc pull` in a new clone: artefacts, but no state; DVC deletes the out before it asks the stage."""
    made = run(shards.STAGE, params, dataset="digit_scenes")
    shutil.rmtree(".state")
    assert len(state.adopt(params)) == 1
    assert state.adopt(params) == []
    shutil.rmtree("artifacts/shards")
    monkeypatch.setattr("pipelines.stage.write_manifest", None)  # building would fail
    assert run(shards.STAGE, params, dataset="digit_scenes") == made


def test_a_damaged_artefact_is_not_adopted(params):
    run(shards.STAGE, params, dataset="digit_scenes")
    shutil.rmtree(".state")
    index = Path("artifacts/shards/digit_scenes/index.parquet")
    index.write_bytes(index.read_bytes()[:-1])
    assert state.adopt(params) == []
