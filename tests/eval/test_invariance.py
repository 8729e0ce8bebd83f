"""The command that shows what batching and precision do: its table, its verdict, its exit code."""

import json
import shutil
from pathlib import Path

import pytest

from molmo_model.config import to_dict
from molmo_model.nn import static_cache
from pipelines import invariance
from tests.eval.synthetic import tiny_params


@pytest.fixture
def project(assembled, tmp_path, monkeypatch):
    shutil.copytree(assembled, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    params = to_dict(tiny_params())
    (tmp_path / "project" / "params.json").write_text(json.dumps(params))  # JSON is YAML
    return ["params=params.json", "checkpoint=base/step-000000", "task=scene_count", "items=6"]


def test_nothing_differs_in_fp32(project, capsys):
    invariance.main([*project, "sizes=1,4", "precisions=bf16", "out=found.json"])
    found = json.loads(Path("found.json").read_text())
    ways = [(run["engine"], run["precision"], run["size"]) for run in found["runs"]]
    assert ways == [
        ("generate", "fp32", 1),
        ("generate", "fp32", 4),
        ("slots", "fp32", 1),
        ("slots", "fp32", 4),
        ("generate", "bf16", 1),
        ("generate", "bf16", 4),
        ("slots", "bf16", 4),
    ]
    assert found["broken"] == 0 and found["items"] == 6
    assert all(run["differing"] == run["near_ties"] for run in found["runs"] if run["precision"] == "fp32")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 answers of artifacts/checkpoints/base/step-000000 in scene_count on cpu")
    assert sum(line.startswith(("generate", "slots")) for line in lines) == 7


def test_a_broken_engine_is_caught(project, capsys, monkeypatch):
    seen = static_cache.visible_places
    monkeypatch.setattr(static_cache, "visible_places", lambda at, extent, window: seen(at - 2, extent, window))
    with pytest.raises(SystemExit) as end:
        invariance.main([*project, "sizes=4", "precisions="])
    assert end.value.code == 1
    shown = capsys.readouterr()
    assert "DIFFERENT: slots 4: " in shown.out and "are no near ties" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint="], "checkpoint=... is missing"),
        (["task=scene_cuont"], "scene_count"),
        (["items=0"], "items=0"),
        (["sizes=1,x"], "sizes=1,x"),
        (["precisions=fp8"], "fp8"),
        (["tasks.scene_count.decoding.num_beams=2"], "only greedy answers"),
    ],
)
def test_what_cannot_be_compared_is_refused(project, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        invariance.main([*project, *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
