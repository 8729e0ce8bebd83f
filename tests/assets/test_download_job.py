"""The download job: the command line in a child, its exit code and its list."""

import json
from pathlib import Path

import dagster as dg
import pytest

from molmo_assets.jobs import download
from molmo_assets.resources import StageProcess
from molmo_model.data.downloads import Status, read_list

ROOT = Path(__file__).resolve().parents[2]
TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def run(**config: object) -> dg.ExecuteInProcessResult:
    ops = {"fetch_urls": {"config": {"dataset": "photos", **config}}}
    return download.execute_in_process(
        run_config={"ops": ops}, resources={"stage_process": StageProcess()}, raise_on_error=False
    )


@pytest.mark.slow
def test_the_job_runs_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MOLMO_PARAMS", "params.yaml")
    (tmp_path / "params.yaml").write_text("version: 2\ndatasets:\n  photos: {family: chat, path: rows.jsonl}\n")
    row = {"id": "a", "images": ["http://127.0.0.1:9/a.png"], "messages": TALK}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert not run(from_list=True).success  # there is no list yet: the command refuses
    assert run().success
    (found,) = read_list(Path("data/downloads/photos.parquet"))
    assert found.status is Status.BLOCKED  # no job and no param lets this machine's own servers in
