"""Tables by name: the one way to say that a name is wrong, and which ones are right."""

import difflib
from collections.abc import Mapping
from typing import Any

from molmo_model.errors import ConfigError


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`, or a `ConfigError` that lists the right names."""
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; {suggest(name, table)}")
    return table[name]


def suggest(name: str, table: Any) -> str:
    """The names of a table, the one that was probably meant first."""
    names = sorted(map(str, table)) if isinstance(table, Mapping) else []
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
