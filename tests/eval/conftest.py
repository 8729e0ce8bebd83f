"""An evaluated project, and a tiny checkpoint, made once for the room."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from molmo_model.config import Params
from pipelines import assemble, report, score, scorecard
from pipelines.stage import run, run_all
from tests.eval import synthetic
from tests.eval.serving import ServerProcess


@pytest.fixture(scope="session")
def settings() -> Params:
    return synthetic.params()


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, settings: Params) -> Path:
    """A folder with shards and invented predictions, scored and reported by the real stages."""
    folder = tmp_path_factory.mktemp("evaluated")
    synthetic.workspace(folder, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_all(score.STAGE, settings, {})
        run_all(scorecard.STAGE, settings, {})
        run(report.STAGE, settings)
    return folder


@pytest.fixture(scope="session")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and the tiny model's first weights."""
    folder = tmp_path_factory.mktemp("assembled")
    settings = synthetic.tiny_params()
    settings.runs, settings.eval.checkpoints = {}, []
    synthetic.workspace(folder, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(assemble.STAGE, settings, model="base")
    return folder


@pytest.fixture(scope="session")
def serving(assembled: Path) -> Iterator[ServerProcess]:
    """The tiny model behind `pipelines.serve`, a process of its own."""
    with ServerProcess(assembled) as server:
        yield server


@pytest.fixture
def workspace(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Copies the evaluated project and goes there, so that a test may spoil it."""

    def copy() -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(evaluated, folder)
        monkeypatch.chdir(folder)
        return folder

    return copy
