"""The tables of the documentation, made from the tables of the code.

    python -m molmo_model.nn.tables          rewrites the generated blocks of the documents
    python -m molmo_model.nn.tables --check  fails, naming the document, if a block is not what the code says

A block stands between the lines `<!-- table: NAME -->` and `<!-- end: NAME -->`; `BLOCKS` says which function makes it.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel

from molmo_model.aliases import table as original_names_table
from molmo_model.errors import ConfigError
from molmo_model.model_config import VisionConfig
from molmo_model.nn.language_model import ALIASES as LANGUAGE_ALIASES
from molmo_model.nn.language_model import LANGUAGE_MODELS, LanguageModel
from molmo_model.nn.pooling import MANY_TOKENS, POOLINGS, PoolingSpec
from molmo_model.nn.projector import PROJECTORS
from molmo_model.nn.vision_config import vision_config
from molmo_model.nn.vision_encoder import ENCODER_ALIASES, VISION_ENCODERS, VisionEncoder, ViTFeatures, resolve_layers


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its columns not aligned."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def vision_table() -> str:
    """Every vision encoder: where its weights come from, how it sees an image, and what of it is built."""
    head = (
        "`encoder`",
        "published weights",
        "crop, patch",
        "patches",
        "before them",
        "width x blocks",
        "activation, eps",
        "features from blocks",
        "built / published",
    )
    return markdown(head, [_vision_row(name, spec) for name, spec in VISION_ENCODERS.items()])


def _vision_row(name: str, spec: VisionEncoder) -> tuple[str, ...]:
    layers = resolve_layers(spec.feature_layers, spec.num_layers, name)
    side = spec.image_size // spec.patch_size
    stored = "" if spec.stored_size // spec.patch_size == side else f" (stored at {spec.stored_size})"
    activation = "SwiGLU" if spec.swiglu else spec.activation
    built, published = encoder_parameters(name)
    return (
        f"`{name}`",
        f"`{spec.hub_id}`",
        f"{spec.image_size}{stored}, {spec.patch_size}",
        f"{side} x {side} = {side * side}",
        {0: "nothing", 1: "class token"}.get(spec.prefix_tokens, f"class token, {spec.prefix_tokens - 1} registers"),
        f"{spec.hidden_size} x {spec.stored_layers}",
        f"{activation}, {spec.eps:.0e}",
        f"{list(spec.feature_layers)} of {spec.num_layers}: {layers}",
        f"{built / 1e6:.0f}M / {published / 1e6:.0f}M",
    )


def encoder_parameters(name: str) -> tuple[int, int]:
    """Parameters that Molmo builds of an encoder, and of all blocks with the norm behind them at the published size
    (without SigLIP's pooling head and DINOv2's mask token)."""
    spec = VISION_ENCODERS[name]
    whole = spec.stored_size - spec.stored_size % spec.patch_size
    config, layers = vision_config(VisionConfig(encoder=name))
    full, _ = vision_config(
        VisionConfig(encoder=name, image_size=whole, num_layers=spec.stored_layers, feature_layers=[-1])
    )
    with torch.device("meta"):
        return parameters(ViTFeatures(config, name, layers)), parameters(AutoModel.from_config(full))


def pixel_table() -> str:
    """How each encoder's pixels are resized and normalised; encoders that agree share a row."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, spec in VISION_ENCODERS.items():
        groups.setdefault((spec.resize, spec.mean, spec.std), []).append(name)
    rows = [
        (", ".join(f"`{name}`" for name in names), f"`{resize}`", _numbers(mean), _numbers(std))
        for (resize, mean, std), names in groups.items()
    ]
    return markdown(("`encoder`", "resize", "mean", "standard deviation"), rows)


def _numbers(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, tuple) else str(values)


def alias_table() -> str:
    """Other names of encoders."""
    return markdown(("also called", "is"), [(f"`{alias}`", f"`{name}`") for alias, name in ENCODER_ALIASES.items()])


def connector_table() -> str:
    """Every pooling and projector: what it does, its sizes, and its parameters between two layers of an encoder of
    width 1,024 and a language model of width 1,536: windows of 2 x 2 patches, 4 queries, hidden width 4,480."""
    rows = [_pooling_row(name) for name in POOLINGS]
    for name, projector in PROJECTORS.items():
        with torch.device("meta"):
            size = parameters(projector(1024, 4480, 1536))
        rows.append((f"`projector: {name}`", _summary(projector), "", "the language model's", f"{size / 1e6:.1f}M"))
    return markdown(("`connector`", "what it does", "tokens of a window", "width", "parameters"), rows)


def _pooling_row(name: str) -> tuple[str, ...]:
    queries = 4 if name in MANY_TOKENS else 1
    with torch.device("meta"):
        pooling = POOLINGS[name](PoolingSpec(2048, 1024, (1, 1) if name == "none" else (2, 2), 16, True, queries))
    made = getattr(POOLINGS[name], "func", POOLINGS[name])  # a partial of the class, or the class
    size, tokens = parameters(pooling), "`num_queries`" if name in MANY_TOKENS else "1"
    if size:
        factor = pooling.out_features // 1024
        width = "the encoder's" if factor == 1 else f"{factor} times the encoder's"
    else:
        width = "a patch's, all layers" if pooling.out_features == 2048 else "a window's, all patches and layers"
    return (f"`pooling: {name}`", _summary(made), tokens, width, f"{size / 1e6:.1f}M" if size else "none")


def _summary(described: object) -> str:
    """The first sentence of a docstring."""
    return " ".join((inspect.getdoc(described) or "").split("\n\n")[0].split())


def language_table() -> str:
    """Every family of language models: its releases, how a text begins, and how its layers are built."""
    head = (
        "`family`",
        "releases",
        "embedding rows",
        "a text begins with",
        "chat format",
        "norms",
        "norm of queries and keys",
        "layers",
        "rope theta: released, from scratch",
        "tied head",
    )
    return markdown(head, [_language_row(name, spec) for name, spec in LANGUAGE_MODELS.items()])


def _language_row(name: str, spec: LanguageModel) -> tuple[str, ...]:
    layers = "three with a window, one without" if spec.sliding else "all alike"
    return (
        f"`{name}`",
        spec.title,
        "; ".join(f"{rows} ({sizes})" for sizes, rows in spec.released),
        "`{}`".format(spec.begins_with.replace("|", "\\|")) if "|" in spec.begins_with else spec.begins_with,
        f"`{spec.chat_format.value}`",
        "after attention and MLP" if spec.norm_after else "before attention and MLP",
        {"none": "none", "width": "all heads together", "head": "each head"}[spec.qk_norm.value],
        f"{layers}, experts" if spec.experts else layers,
        f"{', '.join(f'{theta:,.0f}' for theta in spec.released_rope_theta)}; {spec.from_scratch_rope_theta:,.0f}",
        spec.released_tied,
    )


def language_alias_table() -> str:
    """Other names of language models."""
    return markdown(("also called", "is"), [(f"`{alias}`", f"`{name}`") for alias, name in LANGUAGE_ALIASES.items()])


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/vision_backbone.md": {
        "vision encoders": vision_table,
        "pixels": pixel_table,
        "names of encoders": alias_table,
        "connector": connector_table,
    },
    "docs/language_model.md": {
        "language models": language_table,
        "names of language models": language_alias_table,
    },
    "docs/guides/original_names.md": {"original names": original_names_table},
}
"""Document to block to the function that makes it."""


def filled(text: str, blocks: dict[str, Callable[[], str]], where: str) -> str:
    """A document's text with its generated blocks as the code has them.

    Raises:
        ConfigError: the document lacks a block's markers.
    """
    for name, make in blocks.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ConfigError(f"{where} must hold the lines {begin!r} and {end!r} once, in this order")
        block = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda found, block=block: block, text)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the repository")
    options = parser.parse_args(arguments)
    stale = []
    for document, blocks in BLOCKS.items():
        path = options.root / document
        before = path.read_text(encoding="utf-8")
        after = filled(before, blocks, document)
        if after != before:
            stale.append(document)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(stale)}", file=sys.stderr)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
