"""The workspace that the tests of this room share."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.assets.project import ROOT, Project, faked, flow


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """An empty workspace with the shipped params and fake builds."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOLMO_PARAMS", "params.yaml")
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    monkeypatch.setattr("molmo_assets.production.CHILD_STAGES", {})  # fakes exist in this process only
    content: dict[str, str] = {}
    for asset, stage in flow.STAGES.items():
        monkeypatch.setitem(flow.STAGES, asset, faked(stage, content))
    with dg.DagsterInstance.ephemeral() as instance:
        yield Project(tmp_path, instance, content)
