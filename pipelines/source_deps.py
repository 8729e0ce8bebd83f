"""Writes the source files of every stage into `dvc.yaml`: `python -m pipelines.source_deps` (`make deps`).

The list is the stage's import closure, the same that its code digest covers, so that DVC asks again exactly when the
code could matter. `--check` only says whether the file is current.
"""

import sys
from pathlib import Path
from typing import Any

from molmo_model.source_digest import ROOT, source_closure

DVC_YAML = Path("dvc.yaml")


def source_deps(stage: str) -> list[str]:
    """Source files of a stage, relative to the project, as `dvc.yaml` lists them."""
    return [path.relative_to(ROOT).as_posix() for path in source_closure(f"pipelines.{stage}")]


def template_of(definition: dict[str, Any]) -> dict[str, Any]:
    """The part of a stage of `dvc.yaml` that holds cmd, deps and outs, whether it is a `foreach` or not."""
    template: dict[str, Any] = definition.get("do", definition)
    return template


def main() -> None:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(DVC_YAML)
    stale = []
    for stage, definition in document["stages"].items():
        deps = template_of(definition).setdefault("deps", [])
        others = [dep for dep in deps if not str(dep).endswith(".py")]
        wanted = [*others, *source_deps(stage)]
        if list(deps) != wanted:
            stale.append(stage)
            deps[:] = wanted
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"{DVC_YAML}: source deps of {', '.join(stale)} are out of date; run `make deps`")
    elif stale:
        yaml.dump(document, DVC_YAML)
        print(f"{DVC_YAML}: updated the source deps of {', '.join(stale)}")


if __name__ == "__main__":
    main()
