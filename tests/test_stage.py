"""What every stage shares: nothing half-made looks finished, nothing finished is made again, whenever it is killed.

The stage of these tests is small, but goes through the real `pipelines.stage.run`. Kills are exhaustive, not by chance:
an audit hook sees every change that a process makes to the file system and kills it with SIGKILL at the n-th one, for
every n until it survives.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from molmo_model.artifacts import MANIFEST, Manifest, read_manifest, verify
from molmo_model.config import Params, params_from_dict
from molmo_model.errors import ArtifactError, ConfigError, DataError
from pipelines import stage as stages
from pipelines.stage import Build, Stage, differences, run, run_all
from tests.kills import in_child

PARTS = 2
KEY = {"run": "one"}


def make_params(seed: int = 1) -> Params:
    return params_from_dict({"version": 2, "seed": seed}, "test")


def build(task: Build) -> dict[str, Any]:
    """Parts that are published one by one, each a folder with a file; the journal says which were worked on."""
    text = task.inputs["source"].read_text() + str(task.params.seed)
    for part in range(PARTS):
        folder = task.out / f"part-{part}"
        if (folder / "done").exists():
            continue
        with open(task.work / "journal", "a") as journal:
            journal.write(f"{part}\n")
        folder.mkdir(exist_ok=True)
        (folder / "data").write_text(f"{text} {part} " * 50)
        (folder / "done").write_text("")
        task.publish(f"part-{part}")
    return {"parts": PARTS}


STAGE = Stage(
    name="fake",
    schema="molmo/fake",
    version=1,
    keys=("run",),
    out="artifacts/fake/{run}",
    params=("seed",),
    build=build,
    partitions=lambda params: [{"run": "one"}, {"run": "two"}],
    inputs=lambda params, key: {"source": "source.txt"},
    resumable=True,
)
PLAIN = dataclasses.replace(STAGE, resumable=False)
TARGET = Path("artifacts/fake/one")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MOLMO_STATE_DIR", raising=False)
    return enter(tmp_path / "0", monkeypatch)


def enter(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.mkdir()
    monkeypatch.chdir(path)
    Path("source.txt").write_text("source")
    return path


def journal() -> list[str]:
    """All parts that were ever worked on, by any identity."""
    return [line for path in Path(".state").glob("fake/*/work/journal") for line in path.read_text().splitlines()]


def is_sound(target: Path, known: set[str]) -> bool:
    """Whether what lies there is honest: no manifest, or one that verifies and is of a known content."""
    if not (target / MANIFEST).exists():
        return True
    return verify(target).digest in known


@pytest.mark.slow
@pytest.mark.parametrize("stage", [STAGE, PLAIN], ids=["resumable", "plain"])
def test_killed_at_every_change(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(stage, make_params(), **KEY).digest
    survived_at = None
    for kill_at in range(1, 400):
        enter(tmp_path / str(kill_at), monkeypatch)
        code = in_child(lambda: run(stage, make_params(), **KEY), kill_at)
        assert is_sound(TARGET, {wanted})
        for part in TARGET.glob("part-*"):
            assert (part / "done").exists(), "a published part is whole"
        begun = len(journal())
        assert run(stage, make_params(), **KEY).digest == wanted
        assert verify(TARGET).digest == wanted
        assert sorted(os.listdir("artifacts/fake")) == ["one"], "staging of the killed process is cleared"
        if stage.resumable:
            assert len(journal()) <= max(begun, PARTS) + 1, "at most the part in flight is made again"
        if code == 0:
            survived_at = kill_at
            break
        assert code == -signal.SIGKILL
    assert survived_at is not None
    assert survived_at > 30, "the hook sees the changes"


@pytest.mark.slow
def test_killed_while_replacing_another_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = run(STAGE, make_params(1), **KEY).digest
    new = run(STAGE, make_params(2), **KEY).digest
    assert old != new
    for kill_at in range(1, 400):
        enter(tmp_path / str(kill_at), monkeypatch)
        run(STAGE, make_params(1), **KEY)
        code = in_child(lambda: run(STAGE, make_params(2), **KEY), kill_at)
        assert is_sound(TARGET, {old, new})
        assert run(STAGE, make_params(2), **KEY).digest == new
        assert run(STAGE, make_params(1), **KEY).digest == old
        assert len(journal()) <= 2 * PARTS + 1, "yesterday's params cost nothing"
        if code == 0:
            return
    pytest.fail("never survived")


def test_killed_while_killed_again(tmp_path: Path) -> None:
    """Many kills in one folder: progress is never lost, so few more kills than parts of work are survived."""
    wanted = ""
    for kill_at in (7, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 40, 45, 50, 60, 80, 100):
        if in_child(lambda: run(STAGE, make_params(), **KEY), kill_at) == 0:
            break
        assert is_sound(TARGET, set())
    wanted = run(STAGE, make_params(), **KEY).digest
    assert verify(TARGET).digest == wanted
    assert set(journal()) == {str(part) for part in range(PARTS)}


def snapshot() -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in Path("artifacts").rglob("*"):
        info = path.stat()
        found[str(path)] = (info.st_ino, info.st_mtime_ns, info.st_size)
    return found


def test_a_second_run_rewrites_nothing() -> None:
    first = run(STAGE, make_params(), **KEY)
    before = snapshot()
    assert run(STAGE, make_params(), **KEY) == first
    assert snapshot() == before
    assert len(journal()) == PARTS
    assert differences(STAGE, make_params(), KEY) == []


@pytest.mark.parametrize("stage", [STAGE, PLAIN], ids=["resumable", "plain"])
def test_deleted_output_comes_back_without_work(stage: Stage) -> None:
    """`dvc repro` deletes a stage's outs before it runs it."""
    first = run(stage, make_params(), **KEY)
    subprocess.run(["rm", "-rf", "artifacts"], check=True)
    assert run(stage, make_params(), **KEY) == first
    assert len(journal()) == PARTS


@pytest.mark.parametrize("stage", [STAGE, PLAIN], ids=["resumable", "plain"])
@pytest.mark.parametrize("damage", ["edited", "truncated", "missing", "extra", "manifest"])
def test_damage_of_the_output_is_repaired(stage: Stage, damage: str) -> None:
    """Files are hard links, so an edit in place damages the state as well."""
    first = run(stage, make_params(), **KEY)
    path = TARGET / "part-1" / "data"
    if damage == "edited":
        with open(path, "r+b") as file:
            file.write(b"X")
    elif damage == "truncated":
        os.truncate(path, 3)
    elif damage == "missing":
        path.unlink()
    elif damage == "extra":
        (TARGET / "more").write_text("")
    else:
        (TARGET / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError):
        verify(TARGET)
    assert differences(stage, make_params(), KEY)
    if stage.resumable and damage in ("edited", "truncated"):
        run(stage, make_params(), **KEY)  # this build trusts its parts; a real one checks what it resumes from
        verify(TARGET)
    else:
        assert run(stage, make_params(), **KEY) == first
        assert verify(TARGET) == first


def test_changes_are_named_and_rebuilt() -> None:
    run(STAGE, make_params(1), **KEY)
    assert any("seed" in line and "1" in line and "2" in line for line in differences(STAGE, make_params(2), KEY))
    Path("source.txt").write_text("other")
    assert any("inputs source" in line for line in differences(STAGE, make_params(1), KEY))
    newer = dataclasses.replace(STAGE, version=2)
    assert any("version: made with 1, now 2" in line for line in differences(newer, make_params(1), KEY))
    assert run(newer, make_params(1), **KEY).version == 2
    assert read_manifest(TARGET).inputs == run(newer, make_params(1), **KEY).inputs


def test_changed_code_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    run(STAGE, make_params(), **KEY)
    monkeypatch.setattr(stages, "source_digest", lambda module: "f" * 64)
    assert any(line.startswith("code") for line in differences(STAGE, make_params(), KEY))
    assert run(STAGE, make_params(), **KEY).code == "f" * 64
    assert len(journal()) == 2 * PARTS


def test_missing_input_says_what_to_do() -> None:
    Path("source.txt").unlink()
    with pytest.raises(ArtifactError, match=r"source\.txt does not exist"):
        run(STAGE, make_params(), **KEY)
    assert not TARGET.exists()


def test_failed_build_leaves_nothing_finished_and_keeps_its_state() -> None:
    def fails(task: Build) -> dict[str, Any]:
        (task.out / "half").write_text("")
        (task.work / "journal").write_text("0\n")
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        run(dataclasses.replace(STAGE, build=fails), make_params(), **KEY)
    assert not TARGET.exists()
    assert journal() == ["0"]
    assert differences(STAGE, make_params(), KEY)


def test_two_at_once_build_once() -> None:
    context = multiprocessing.get_context("fork")

    def slow(task: Build) -> dict[str, Any]:
        time.sleep(0.3)
        return build(task)

    stage = dataclasses.replace(STAGE, build=slow)
    digests = context.Queue()
    children = [context.Process(target=lambda: digests.put(run(stage, make_params(), **KEY).digest)) for _ in range(3)]
    for child in children:
        child.start()
    found = {digests.get(timeout=30) for _ in children}
    for child in children:
        child.join()
    assert len(found) == 1
    assert sorted(journal()) == ["0", "1"]


def test_two_keys_do_not_mix() -> None:
    made = run_all(STAGE, make_params(), {})
    assert [key for key, _ in made] == [{"run": "one"}, {"run": "two"}]
    assert len(list(Path(".state/fake").iterdir())) == 2


@pytest.mark.parametrize("key", [{"run": "three"}, {}, {"run": "one", "task": "x"}, {"run": "../one"}])
def test_unknown_keys_are_refused(key: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        run(STAGE, make_params(), **key)
    assert not Path("artifacts").exists()


def test_a_mistyped_key_gets_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"fake: the params name no run 'tow'; did you mean 'two'\? known: one, two"):
        run_all(STAGE, make_params(), {"run": "tow"})


def test_state_directory_can_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLMO_STATE_DIR", str(tmp_path / "elsewhere"))
    first = run(STAGE, make_params(), **KEY)
    assert not Path(".state").exists()
    assert verify(TARGET) == first


def test_identity_knows_nothing_of_time_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(STAGE, make_params(), **KEY)
    first = (TARGET / MANIFEST).read_bytes()
    log = [json.loads(line) for line in Path("logs/stages.jsonl").read_text().splitlines()]
    enter(tmp_path / "another place", monkeypatch)
    run(STAGE, make_params(), **KEY)
    assert (TARGET / MANIFEST).read_bytes() == first
    assert log[0]["stage"] == "fake"


def main(*arguments: str) -> int:
    Path("params.yaml").write_text("version: 2\nseed: 1\n")
    try:
        stages.main(STAGE, list(arguments))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--help") == 0
    assert "usage: python -m pipelines.fake [run=...]" in capsys.readouterr().out
    assert main("run=one", "seed=4") == 0
    out = capsys.readouterr().out
    manifest: Manifest = read_manifest(TARGET)
    assert manifest.digest[:16] in out
    assert "parts: 2" in out
    assert manifest.params == {"seed": 4}
    assert not Path("artifacts/fake/two").exists()
    assert main() == 0
    assert Path("artifacts/fake/two").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run=three"], "three"),
        (["sed=1"], "sed"),
        (["--force"], "--force"),
        (["params=nothing.yaml"], "nothing.yaml"),
    ],
)
def test_command_line_refuses_in_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*arguments) == 2
    message = capsys.readouterr().err
    assert named in message
    assert len(message.splitlines()) == 1


def test_a_checkpoint_goes_by_its_name_or_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published = Path("artifacts/checkpoints/sft/step-000500")
    assert stages.checkpoint_folder("sft/step-000500") == Path("sft/step-000500")  # neither: the error names this one
    published.mkdir(parents=True)
    assert stages.checkpoint_folder("sft/step-000500") == published
    assert stages.checkpoint_folder(str(published)) == published
    Path("sft/step-000500").mkdir(parents=True)
    assert stages.checkpoint_folder("sft/step-000500") == Path("sft/step-000500")
