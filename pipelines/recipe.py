"""Merges a recipe, a file with only the keys that differ, into `params.yaml`; comments and order stay.

usage: python -m pipelines.recipe RECIPE [params=params.yaml]

RECIPE   a YAML file such as recipes/long.yaml: mappings are merged key by key, lists and plain values replaced
params   the file that is changed

Prints every key that changed. A key that the params do not know, or a value that contradicts another, is refused and
nothing is written. To go back, undo the change to the file (`git checkout params.yaml`).

Not a stage: writes no artefact. Exit codes: 0 merged, 2 refused with a message.
"""

import copy
import io
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from molmo_model.artifacts import write_text_atomic
from molmo_model.errors import ConfigError
from pipelines.stage import exit_on_error

ABSENT = "(absent)"
LINE_LENGTH = 4096
"""Wide enough that no line of a hand-written file is folded."""


def parse(argv: Sequence[str]) -> tuple[Path, Path]:
    """Recipe and params file of a command line.

    Raises:
        ConfigError: no recipe, several, or an unknown option.
    """
    recipes, params = [], Path("params.yaml")
    for argument in argv:
        name, separator, value = argument.partition("=")
        if not separator:
            recipes.append(Path(argument))
        elif name == "params" and value:
            params = Path(value)
        else:
            raise ConfigError(f"{argument!r} is no option; write params=FILE")
    if len(recipes) != 1:
        raise ConfigError(f"{len(recipes)} recipes given; name one, such as recipes/long.yaml")
    return recipes[0], params


def merge(params: MutableMapping[str, Any], recipe: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Merges in place; yields (dotted key, old value, new value) of every change."""
    for name, new in recipe.items():
        here = f"{key}.{name}".lstrip(".")
        old = params.get(name, ABSENT)
        if isinstance(old, MutableMapping) and isinstance(new, Mapping):
            yield from merge(old, new, here)
        elif old != new or type(old) is bool is not type(new):
            params[name] = copy.deepcopy(new)
            yield here, old, new


def apply(recipe: Path, params: Path) -> list[str]:
    """Changes the params file; returns one line for each changed key.

    Raises:
        ConfigError: a file is missing or no mapping, or the merged params are not valid; the file is then unchanged.
    """
    from molmo_model.config import migrate, params_from_dict

    document, overlay = _load(params), _load(recipe)
    source = f"{recipe} merged into {params}"
    params_from_dict(migrate(_plain(document), str(params)), str(params))
    changes = list(merge(document, overlay))
    params_from_dict(migrate(_plain(document), source), source)
    if changes:
        text = io.StringIO()
        _yaml().dump(document, text)
        write_text_atomic(params, text.getvalue())
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, old, new in changes]


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = LINE_LENGTH
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(path: Path) -> MutableMapping[str, Any]:
    from ruamel.yaml.error import YAMLError

    try:
        document = _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, MutableMapping):
        raise ConfigError(f"{path} holds a {type(document).__name__}; it must be a mapping")
    return document


def _plain(value: Any) -> Any:
    """Without the types that remember how a value was written."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    return value


def _shown(value: Any) -> str:
    return value if value is ABSENT else str(_plain(value))


def main() -> None:
    """Entry point of `python -m pipelines.recipe`."""
    argv = sys.argv[1:]
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        sys.exit(0 if argv else 2)
    with exit_on_error("recipe"):
        recipe, params = parse(argv)
        changed = apply(recipe, params)
        print("\n".join(changed) if changed else f"{params} already says all of {recipe}")


if __name__ == "__main__":
    main()
