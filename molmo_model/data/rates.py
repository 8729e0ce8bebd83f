"""What the rates of a mixture mean: the tree of groups and sources of the params, resolved to one rate per source.

A group shares its own rate among its entries: under `flat` in the ratio of their rates, under `root_size` in the ratio
of `rate * sqrt(size)`. A source's size is the number of its examples unless `size` says otherwise: up to 1 it is a
share of that number, above 1 a number of its own (a pseudo-size, to tame a huge set). A group's size is the sum over
its entries, with the same `size` over it. At the top rates count as they are. docs/mixtures.md has an example with all
numbers; the rule is Molmo's (allenai/molmo, `olmo/data/__init__.py`, and molmo2's `olmo/data/data_loader.py`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from molmo_model.config import MixtureEntry, MixtureRule
from molmo_model.data.order import exact_rate


@dataclass(frozen=True)
class Node:
    """A source or a group, resolved."""

    name: str
    groups: tuple[str, ...]
    """Names of the groups that it stands in, from the outermost."""
    rate: Fraction
    """Share of all draws; exact but for square roots, which are the nearest float."""
    size: float
    """What the root-size rule takes for its size."""
    rule: MixtureRule | None = None
    """Of a group."""
    below: tuple["Node", ...] = field(default=())

    @property
    def path(self) -> str:
        """Names from the outermost group to this, joined by `/`."""
        return "/".join((*self.groups, self.name))

    def sources(self) -> "Iterator[Node]":
        """The sources in it, itself if it is one."""
        if not self.below:
            yield self
        for node in self.below:
            yield from node.sources()

    def groups_in_it(self) -> "Iterator[Node]":
        """The groups in it, itself first if it is one, outer before inner."""
        if self.below:
            yield self
        for node in self.below:
            yield from node.groups_in_it()

    def described(self) -> dict[str, Any]:
        """Of a group: its rule, rate and size as plain values."""
        return {"rule": str(self.rule), "rate": round(float(self.rate), 9), "size": round(self.size, 3)}


def resolve_rates(mixture: Mapping[str, MixtureEntry], examples: Mapping[str, int]) -> list[Node]:
    """The rates of all sources; they sum to 1.

    Args:
        mixture: `runs.<run>.mixture` of the params.
        examples: number of examples by source.

    Raises:
        ConfigError: a rate is not a finite number above 0.
    """
    return _shared(mixture, MixtureRule.flat, Fraction(1), examples, ())


def _shared(
    entries: Mapping[str, MixtureEntry],
    rule: MixtureRule,
    rate: Fraction,
    examples: Mapping[str, int],
    groups: tuple[str, ...],
) -> list[Node]:
    weights = {name: exact_rate(name, entry.rate) for name, entry in sorted(entries.items())}
    sizes = {name: size_of(name, entry, examples) for name, entry in entries.items()}
    if rule is MixtureRule.root_size:
        weights = {name: weight * exact_rate(name, math.sqrt(sizes[name])) for name, weight in weights.items()}
    total = sum(weights.values())
    nodes = []
    for name, weight in weights.items():
        entry, own = entries[name], rate * weight / total
        below = _shared(entry.entries, entry.rule, own, examples, (*groups, name)) if entry.entries else []
        nodes.append(Node(name, groups, own, sizes[name], entry.rule if below else None, tuple(below)))
    return nodes


def size_of(name: str, entry: MixtureEntry, examples: Mapping[str, int]) -> float:
    """What the root-size rule takes for the size of a source or a group."""
    below = [size_of(inner, one, examples) for inner, one in entry.entries.items()]
    examples_of = float(sum(below) if below else examples[name])
    if entry.size is None:
        return examples_of
    return examples_of * entry.size if entry.size <= 1 else float(entry.size)


def tree(
    groups: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, Sequence[str]],
    sources: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The resolved mixture as nested plain values, for `mixture.json`.

    Args:
        groups: what to say of each group, by path.
        places: the names of the groups around each source.
        sources: what to say of each source, by name.
    """
    root: dict[str, Any] = {"entries": {}}
    for name, around in places.items():
        node = root
        for depth, group in enumerate(around):
            known = {**groups["/".join(around[: depth + 1])], "entries": {}}
            node = node["entries"].setdefault(group, known)
        node["entries"][name] = dict(sources[name])
    return root["entries"]
