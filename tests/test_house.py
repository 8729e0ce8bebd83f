"""The architecture, as tests: which way things depend, and that every description of a stage says the same.

A stage is described four times, by its `STAGE` object, its entry in `dvc.yaml`, its Dagster asset and its source files.
These tests fail until all agree.
"""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from molmo_model.config import Params, load_params
from molmo_model.source_digest import source_closure
from pipelines.source_deps import source_deps
from pipelines.stage import Stage

ROOT = Path(__file__).parent.parent
PACKAGES = ("molmo_model", "pipelines", "molmo_assets")
STAGE_NAMES = ("assemble", "shards", "validate", "mixture", "train", "predict", "score", "scorecard", "report")
HEAVY = ("torch", "transformers", "dagster", "dvc", "pandas", "pyarrow", "sklearn", "great_expectations", "pandera")


def shipped_files(*suffixes: str) -> list[Path]:
    """Files that git tracks or would, so neither artefacts nor environments."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        paths = [ROOT / name for name in done.stdout.splitlines()]
    else:  # an unpacked archive has no git
        hidden = (".ci", ".github", ".dvcignore", ".gitignore")
        top = [path for path in ROOT.iterdir() if path.name in hidden or not path.name.startswith(".")]
        top = [path for path in top if path.name not in ("artifacts", "logs", "dvc.lock")]
        paths = [file for path in top for file in ([path] if path.is_file() else path.rglob("*"))]
        paths = [path for path in paths if "__pycache__" not in path.parts]
    return sorted(path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes))


def sources(*packages: str) -> list[Path]:
    return [path for name in packages for path in sorted((ROOT / name).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stage_of(name: str) -> Stage:
    return importlib.import_module(f"pipelines.{name}").STAGE


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@cache
def dvc_stages() -> dict[str, Any]:
    """Every stage of `dvc.yaml` as DVC itself resolves it, by the name that `dvc repro` takes."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        return {stage.addressing: facts_of(stage) for stage in repo.index.stages}


def facts_of(stage: Any) -> dict[str, Any]:
    from dvc.dependency import ParamsDependency

    deps = [dep for dep in stage.deps if not isinstance(dep, ParamsDependency)]
    tracked = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
    return {
        "cmd": stage.cmd,
        "deps": [os.path.relpath(dep.fs_path, ROOT) for dep in deps],
        "outs": [os.path.relpath(out.fs_path, ROOT) for out in stage.outs],
        "params": [name for dep in tracked for name in dep.params],
    }


def dvc_name(stage: Stage, key: dict[str, str]) -> str:
    return f"{stage.name}@{'-'.join(key.values())}" if key else stage.name


def covered(wanted: str, by: list[str], separator: str) -> bool:
    """Whether one of `by` is `wanted` or a part above it."""
    return any(wanted == name or wanted.startswith(name + separator) for name in by)


# ---- one stage, described four times


def test_every_stage_module_is_known() -> None:
    found = {path.stem for path in (ROOT / "pipelines").glob("*.py") if "STAGE = Stage(" in path.read_text("utf-8")}
    assert found == set(STAGE_NAMES)
    for name in STAGE_NAMES:
        assert stage_of(name).name == name
    document = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    assert set(document["stages"]) == set(STAGE_NAMES)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_dvc_has_exactly_the_partitions_of_the_stage(name: str, params: Params) -> None:
    stage = stage_of(name)
    wanted = {dvc_name(stage, key) for key in stage.partitions(params)}
    assert {found for found in dvc_stages() if found.split("@")[0] == name} == wanted


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_dvc_runs_the_same_command_into_the_same_place(name: str, params: Params) -> None:
    stage = stage_of(name)
    for key in stage.partitions(params):
        found = dvc_stages()[dvc_name(stage, key)]
        assert found["cmd"] == " ".join(["python", "-m", stage.module, *(f"{k}={v}" for k, v in key.items())])
        assert found["outs"] == [stage.target(key).as_posix()]


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_dvc_asks_again_whenever_the_stage_would(name: str, params: Params) -> None:
    """DVC's params and deps cover those of the manifest; it may ask too often, never too rarely."""
    stage = stage_of(name)
    for key in stage.partitions(params):
        found = dvc_stages()[dvc_name(stage, key)]
        paths = [*(path.format(**key) for path in stage.params), *stage.more_params(params, key)]
        for path in paths:
            assert covered(path, found["params"], "."), f"{dvc_name(stage, key)}: dvc.yaml has no params {path}"
        for path in map(str, stage.inputs(params, key).values()):
            assert covered(path, found["deps"], "/"), f"{dvc_name(stage, key)}: dvc.yaml has no dep {path}"


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_dvc_lists_the_source_files_that_the_code_digest_covers(name: str, params: Params) -> None:
    stage = stage_of(name)
    wanted = [relative(path) for path in source_closure(stage.module)]
    assert source_deps(name) == wanted
    for key in stage.partitions(params)[:1]:
        found = [dep for dep in dvc_stages()[dvc_name(stage, key)]["deps"] if dep.endswith(".py")]
        assert sorted(found) == sorted(wanted), "run `make deps`"


def test_files_that_are_no_python_are_deps_too() -> None:
    """Templates and tokenizers are outside the code digest, so the stage that reads them must name them."""
    deps = sorted({dep for facts in dvc_stages().values() for dep in facts["deps"]})
    for name in map(relative, shipped_files()):
        if name.startswith(("molmo_model/", "pipelines/")) and not name.endswith((".py", ".md", ".pyi", "py.typed")):
            assert covered(name, deps, "/"), f"no stage of dvc.yaml has {name} among its deps"


def test_outs_do_not_overlap() -> None:
    outs = sorted(out for facts in dvc_stages().values() for out in facts["outs"])
    assert len(outs) == len(set(outs))
    for out in outs:
        assert not any(other.startswith(out + "/") for other in outs), out


def test_every_stage_is_an_asset(params: Params) -> None:
    from molmo_assets.flow import STAGES, all_artefacts

    assert {stage.name for stage in STAGES.values()} == set(STAGE_NAMES)
    names = {artefact.dvc_name for artefact in all_artefacts(params)} - {None}
    assert names >= set(dvc_stages())
    # Dagster may also evaluate saved checkpoints that params.yaml does not name; DVC has nothing else more or less
    assert {name.split("@")[0] for name in names - set(dvc_stages())} <= {"predict", "score", "scorecard"}


def test_stages_declare_real_params(params: Params) -> None:
    from molmo_model.config import pick

    for stage in map(stage_of, STAGE_NAMES):
        assert stage.schema.startswith("molmo/")
        for key in stage.partitions(params):
            assert set(key) == set(stage.keys)
            pick(params, [*(path.format(**key) for path in stage.params), *stage.more_params(params, key)])


# ---- which way things depend


def test_directions_of_dependence() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_directions_again_by_another_way() -> None:
    """The same rules from the syntax trees alone, so that a mistake in a contract's pattern cannot hide."""
    above = {
        "molmo_model": ("pipelines", "molmo_assets", "dagster", "dvc"),
        "pipelines": ("molmo_assets", "dagster", "dvc"),
    }
    for package, forbidden in above.items():
        for path in sources(package):
            tops = {name.split(".")[0] for name in imports_of(path)}
            assert not tops & set(forbidden), relative(path)
    for path in sources("molmo_model/nn"):
        assert not any(name.startswith(("molmo_model.data", "molmo_model.preprocessing")) for name in imports_of(path))
    for path in sources("molmo_model/data"):
        assert not any(name.startswith(("molmo_model.nn", "molmo_model.preprocessing")) for name in imports_of(path))
    for path in sources("molmo_assets"):
        assert not {"torch", "transformers"} & {name.split(".")[0] for name in imports_of(path)}, relative(path)


def modules_after(code: str) -> set[str]:
    """Heavy modules that are loaded after `code` ran in a fresh process."""
    show = f"\nimport sys\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + show], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


RUN_HELP = """
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module("pipelines.{name}", run_name="__main__")
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("name", [*STAGE_NAMES, "generate", "export", "import_checkpoint", "download", "serve"])
def test_help_is_light_and_helpful(name: str) -> None:
    code = RUN_HELP.format(name=name)
    assert modules_after(code) == set()
    done = subprocess.run(
        [sys.executable, "-m", f"pipelines.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"python -m pipelines.{name}" in done.stdout
    assert len(done.stdout.splitlines()) > 3


def test_the_asset_graph_loads_without_torch() -> None:
    found = modules_after("import molmo_assets.definitions")
    assert not found & {"torch", "transformers", "dvc", "great_expectations", "sklearn"}


@pytest.mark.parametrize(
    "module", ["config", "artifacts", "storage", "eval.metrics", "eval.scoring", "eval.tasks", "eval.report"]
)
def test_light_modules_load_without_torch(module: str) -> None:
    assert not modules_after(f"import molmo_model.{module}") & {"torch", "transformers"}


def test_dataset_families_load_no_library_before_they_read() -> None:
    assert modules_after("import molmo_model.data.datasets") == set()


# ---- how things are written


def test_every_module_says_what_it_is() -> None:
    for path in sources(*PACKAGES):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), relative(path)


CHECKS_ALONE = {"pipelines/predict.py": {"import_module"}}
"""It asks by name whether a task's metrics fit its references: that may refuse a task and changes no answer, and
answers must not depend on the sources of metrics."""


def test_no_import_escapes_the_code_digest() -> None:
    """The closure is taken from import statements, so a module that is imported by a string would not count."""
    for path in sources("molmo_model", "pipelines"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        escaped = names & {"import_module", "__import__", "run_module", "spec_from_file_location"}
        assert escaped <= CHECKS_ALONE.get(relative(path), set()), relative(path)
    predict = (ROOT / "pipelines/predict.py").read_text("utf-8")
    assert predict.count("import_module(") == predict.count('import_module("molmo_model.eval.fitting")') == 1


def test_no_code_from_data() -> None:
    for path in sources(*PACKAGES):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, relative(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{relative(path)}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                words = {word.arg: word.value for word in node.keywords}
                trusts = words.get("trust_remote_code", ast.Constant(False))
                assert ast.unparse(trusts) == "False", f"{relative(path)}:{node.lineno}"
                if ast.unparse(node.func) == "torch.load":
                    safe = words.get("weights_only")
                    assert isinstance(safe, ast.Constant), f"{relative(path)}:{node.lineno}"
                    assert safe.value is True, f"{relative(path)}:{node.lineno}"


def test_assets_have_real_annotations() -> None:
    """Dagster looks at the annotation of `context`; as a string it is refused."""
    for path in sources("molmo_assets"):
        assert "__future__" not in imports_of(path), relative(path)


def test_no_file_names_a_place_of_one_machine() -> None:
    place = re.compile(r"(?<![\w./*{}-])/(work|root|home|opt|Users)/")
    for path in shipped_files():
        if path.suffix not in (".png", ".jpg", ".gif", ".parquet", ".tar", ".safetensors"):
            found = place.search(text := path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{relative(path)}: {text[max(found.start() - 40, 0) : found.end() + 40]!r}"


def test_nothing_large_is_shipped() -> None:
    for path in shipped_files():
        assert path.stat().st_size < 1_500_000, relative(path)


# ---- what a person reads and types


def test_every_yaml_parses() -> None:
    found = shipped_files(".yaml", ".yml")
    assert {"params.yaml", "dvc.yaml", "workspace.yaml", "dagster.yaml"} <= {relative(path) for path in found}
    for path in found:
        assert list(yaml.safe_load_all(path.read_text(encoding="utf-8"))), relative(path)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def documents() -> list[Path]:
    return shipped_files(".md")


def commands_in(path: Path) -> str:
    """What stands in code spans and blocks."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])


@pytest.mark.parametrize("path", documents(), ids=relative)
def test_commands_of_the_documents_exist(path: Path) -> None:
    commands = commands_in(path)
    for target in re.findall(r"\bmake ((?:[a-z][a-z-]* ?)+)", commands):
        for name in target.split():
            assert name in make_targets(), f"make {name}"
    for module in re.findall(r"python -m ([\w.]+)", commands):
        if module.split(".")[0] in PACKAGES:
            assert importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize("path", documents(), ids=relative)
def test_links_of_the_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#", "mailto:")):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_every_make_target_has_a_help_line() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE)) == make_targets()
    assert {"setup", "demo", "dev", "test", "test-fast", "check", "format", "help", "deps"} <= make_targets()


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert re.fullmatch(r"[\w.!]+", version), f"constraints.txt: {line!r}"
            pinned[normal(name)] = version
    for requirement in wanted:
        name, _, version = requirement.partition("==")
        assert normal(name) in pinned, f"constraints.txt has no {name}"
        assert version in ("", pinned[normal(name)]), f"{requirement}, but constraints.txt has {pinned[normal(name)]}"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_dvc_keeps_to_itself_and_its_lock_is_not_shipped() -> None:
    config = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")
    assert "analytics = false" in config
    assert "autostage = false" in config
    assert "__pycache__" in (ROOT / ".dvcignore").read_text(encoding="utf-8")
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert not {"dvc.lock", "/dvc.lock", "*.lock"} & set(ignored), "DVC refuses to work with an ignored lock file"
    listed = subprocess.run(["git", "ls-files", "dvc.lock"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not listed.stdout, "dvc.lock is written by the first `make demo`"


def test_adrs_are_numbered_and_say_what_was_decided() -> None:
    found = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [path.name[:4] for path in found] == [f"{number:04d}" for number in range(1, len(found) + 1)]
    for path in found:
        text = path.read_text(encoding="utf-8")
        for heading in ("## Decision", "## Why", "## What it beat"):
            assert heading in text, f"{relative(path)}: {heading}"
