"""The names of the original documentation, accepted in `params.yaml` and in `key=value` overrides.

Whoever knows Molmo from its documents writes `image_model_type: openai` or `image_pooling_2d: "2"`; `resolve` puts the
value where this project keeps it, before anything is checked, so the rest of the house knows one name for each thing.
Giving both names is refused. `MODEL_ALIASES` are read in `models.<name>.vision` (or `vision_backbone`, as the documents
call it), `TRAIN_ALIASES` in `runs.<name>.train`: below the paths that DVC tracks, so that DVC sees them change too.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from molmo_model.errors import ConfigError

Values = dict[str, Any]
"""Dotted path, from the model or from `train`, to the value that is put there."""


@dataclass(frozen=True)
class Alias:
    """Another name of one or several params."""

    path: str
    """Where the value goes."""
    choices: Mapping[str, Values] | None = None
    """What each value stands for; None takes the value as it is."""
    convert: Callable[[Any], Any] | None = None
    """From the original's value to ours; raises ValueError with what to write."""
    note: str = ""
    """For the documentation."""

    def values(self, value: Any, where: str) -> Values:
        """Paths and values of one given value.

        Raises:
            ConfigError: a value that the original does not have.
        """
        if self.choices is not None:
            name = "none" if value is None else str(value).replace("-", "_")
            if name not in self.choices:
                raise ConfigError(f"{where} is {value!r}; known: {', '.join(self.choices)}")
            return dict(self.choices[name])
        try:
            return {self.path: value if self.convert is None else self.convert(value)}
        except ValueError as error:
            raise ConfigError(f"{where} is {value!r}: {error}") from error


def _square(value: Any) -> int:
    """One side of a square size."""
    sides = value if isinstance(value, list | tuple) else [value]
    if not sides or len({str(side) for side in sides}) > 1 or len(sides) > 2 or not isinstance(sides[0], int):
        raise ValueError("crops are square here; write one number of pixels, or the same twice")
    return sides[0]


def _negated(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("write true or false")
    return not value


def _pooling(name: str, size: int | None = None) -> Values:
    found: Values = {"connector.pooling": name}
    return found if size is None else {**found, "connector.pooling_size": [size, size]}


_POOLINGS = {
    "none": _pooling("none", 1),
    "2": _pooling("mean", 2),
    "4": _pooling("mean", 4),
    **{
        name: _pooling(name)
        for name in (
            "mean",
            "attention",
            "attention_meanq",
            "attention_meanq_2x",
            "attention_meanq_4x",
            "attention_2wide",
            "learned_queries",
            "c_abstractor",
            "stack",
        )
    },
}
_PROJECTORS: dict[str, Values] = {
    name: {"connector.projector": ours}
    for name, ours in {"linear": "linear", "mlp": "mlp", "mlpx": "mlpx", "2mlp": "mlpx", "mlpx2": "mlpx"}.items()
}
_PADDING: dict[str, Values] = {
    name: {"connector.padding_embedding": name} for name in ("none", "pad_embed", "regress", "pad_and_partial_pad")
}

MODEL_ALIASES: dict[str, Alias] = {
    "image_model_type": Alias("vision.encoder", note="`openai`, `siglip`, `dino`, `metaclip`, or any `encoder`"),
    "image_default_input_size": Alias("vision.image_size", convert=_square, note="`[336, 336]`; square sizes only"),
    "image_patch_size": Alias("vision.patch_size"),
    "image_emb_dim": Alias("vision.hidden_size"),
    "image_mlp_dim": Alias("vision.intermediate_size"),
    "image_num_layers": Alias("vision.num_layers"),
    "image_num_heads": Alias("vision.num_heads"),
    "vit_load_path": Alias("vision.pretrained", note="hub id or folder of a transformers model"),
    "init_path": Alias("vision.pretrained", note="the same"),
    "vit_layers": Alias("vision.feature_layers"),
    "image_pooling_2d": Alias("connector.pooling", choices=_POOLINGS),
    "image_project_type": Alias("connector.projector", choices=_PROJECTORS),
    "image_projector": Alias("connector.projector", choices=_PROJECTORS),
    "image_padding_embed": Alias("connector.padding_embedding", choices=_PADDING),
    "image_feature_dropout": Alias("connector.feature_dropout"),
    "pooling_attention_mask": Alias("connector.pooling_attention_mask"),
}
"""In `models.<name>.vision` or `models.<name>.vision_backbone`; paths from the model."""

TRAIN_ALIASES: dict[str, Alias] = {
    name: alias
    for prefix, component in (("vit", "vision"), ("connector", "connector"), ("llm", "language"))
    for name, alias in {
        f"{prefix}_freeze": Alias(f"optim.{component}.freeze"),
        f"{prefix}_unfreeze_step": Alias(f"optim.{component}.unfreeze_step"),
        f"ft_{prefix}": Alias(f"optim.{component}.freeze", convert=_negated, note="the opposite: `true` trains it"),
    }.items()
}
"""In `runs.<name>.train`; paths from there."""

SECTIONS = {"vision_backbone": "vision"}
"""Other names of sections of a model."""


def resolve(
    raw: Mapping[str, Any], overrides: Iterable[str], source: str = "params"
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A parsed params file and overrides, with this project's names alone. The arguments stay as they are.

    Raises:
        ConfigError: naming the key, where both names are given, a value is unknown, or the name stands elsewhere.
    """
    found = copy.deepcopy(dict(raw))
    for name, model in _entries(found, "models"):
        where = f"{source}: models.{name}"
        for other, ours in SECTIONS.items():
            if other in model:
                if ours in model:
                    raise ConfigError(f"{where}.{other} is another name of {ours}, which is given too; keep one")
                model[ours] = model.pop(other)
        _move(model, model.get("vision"), MODEL_ALIASES, f"{where}.vision")
    for name, run in _entries(found, "runs"):
        _move(run.get("train"), run.get("train"), TRAIN_ALIASES, f"{source}: runs.{name}.train")
    return found, tuple(one for override in overrides for one in _override(override))


def table() -> str:
    """All names, as a table of the documentation."""
    lines = ["| original name | here | values |", "|---|---|---|"]
    for place, aliases in (("models.<name>.", MODEL_ALIASES), ("runs.<name>.train.", TRAIN_ALIASES)):
        section = "vision." if aliases is MODEL_ALIASES else ""
        for name, alias in aliases.items():
            lines.append(f"| `{place}{section}{name}` | `{place}{alias.path}` | {_described(alias)} |")
    return "\n".join(lines)


def _described(alias: Alias) -> str:
    if alias.choices is None:
        return alias.note
    parts = []
    for name, values in alias.choices.items():
        ours = [f"{path.split('.')[-1]} {value}" for path, value in values.items() if path != alias.path]
        same = values[alias.path] == name and not ours
        parts.append(f"`{name}`" if same else f"`{name}`: {', '.join([f'`{values[alias.path]}`', *ours])}")
    return "; ".join(parts)


def _entries(raw: Mapping[str, Any], section: str) -> list[tuple[str, dict[str, Any]]]:
    entries = raw.get(section)
    return [(name, one) for name, one in entries.items() if isinstance(one, dict)] if isinstance(entries, dict) else []


def _move(root: Any, section: Any, aliases: Mapping[str, Alias], where: str) -> None:
    """Moves the aliases of `section` to their paths below `root`, in place."""
    if not isinstance(section, dict):
        return
    for name in [name for name in section if name in TRAIN_ALIASES and aliases is MODEL_ALIASES]:
        raise ConfigError(f"{where}.{name}: freezing is a matter of a run; write it in runs.<name>.train")
    for name in [name for name in section if name in aliases]:
        for path, value in aliases[name].values(section.pop(name), f"{where}.{name}").items():
            *parents, last = path.split(".")
            place = root
            for parent in parents:
                place = place.setdefault(parent, {})
            if last in place:
                raise ConfigError(f"{where}.{name} is another name of {path}, which is given too; keep one")
            place[last] = value


def _override(override: str) -> list[str]:
    """An override with this project's names: several where one original name stands for several params."""
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if len(parts) < 4 or not separator:
        return [override]
    if parts[0] == "models":
        parts[2] = SECTIONS.get(parts[2], parts[2])
    place = ".".join(parts[:2]) if parts[0] == "models" else ".".join(parts[:3])
    known = {("models", "vision"): MODEL_ALIASES, ("runs", "train"): TRAIN_ALIASES}.get((parts[0], parts[2]), {})
    if len(parts) > 4 or parts[3] not in known:
        return [".".join(parts) + separator + text]
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    given = value["value"] if isinstance(value, dict) else None
    values = known[parts[3]].values(given, key)
    return [f"{place}.{path}={json.dumps(one)}" for path, one in values.items()]
