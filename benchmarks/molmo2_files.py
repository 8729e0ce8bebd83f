"""Single files of allenai/molmo2, brought at run time and never kept: cloned into `.peers/`, or where `--peer` says.

Its packer and its mixture need little of what they import. What is missing here, or would bring the whole trainer
along, is replaced by empty modules with the few names that are asked for.
"""

import importlib.util
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT

URL = "https://github.com/allenai/molmo2"
COMMIT = "f3cb1085fbb97c4a4d7fdcadd77cf871bf37a88a"
CLONE = ROOT / ".peers" / f"molmo2-{COMMIT[:12]}"


def molmo2(folder: Path | None) -> Path:
    """A folder with molmo2's files: the given one, or a clone of `COMMIT`.

    Raises:
        RuntimeError: it cannot be had; with git's own words.
    """
    if folder is not None:
        if not (folder / "olmo").is_dir():
            raise RuntimeError(f"{folder} is no checkout of {URL}: it has no folder olmo")
        return folder
    if not (CLONE / "olmo").is_dir():
        CLONE.mkdir(parents=True, exist_ok=True)
        for arguments in (["init", "-q"], ["fetch", "-q", "--depth", "1", URL, COMMIT], ["checkout", "-q", COMMIT]):
            done = subprocess.run(["git", *arguments], cwd=CLONE, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(
                    f"the peer {URL} cannot be cloned; give a checkout of {COMMIT[:12]} with --peer DIR:\n{done.stderr}"
                )
    return CLONE


def load(folder: Path, file: str, stand_ins: Mapping[str, Mapping[str, Any]]) -> Any:
    """A module of molmo2 from its file.

    Args:
        file: such as `olmo/data/dynamic_packer.py`.
        stand_ins: names that modules which it imports must have, by module; the modules are empty but for them.
    """
    for name, content in stand_ins.items():
        for depth in range(1, name.count(".") + 2):
            parent = ".".join(name.split(".")[:depth])
            sys.modules.setdefault(parent, types.ModuleType(parent))
        sys.modules[name].__dict__.update(content)
    spec = importlib.util.spec_from_file_location(Path(file).stem + "_of_molmo2", folder / file)
    if spec is None or spec.loader is None or not (folder / file).is_file():
        raise RuntimeError(f"{folder} has no {file}; it is another version of molmo2 than {COMMIT[:12]}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
