"""Named sizes: how they merge, and that each has as many parameters as the published model."""

import re
from typing import Any

import pytest
import torch
import yaml

from molmo_model.config import load_params, params_from_dict, to_dict
from molmo_model.errors import ConfigError
from molmo_model.nn.build import build_config, parameter_counts
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.presets import PRESETS, merge
from molmo_model.source_digest import ROOT

BYTES = "molmo_model/preprocessing/tokenizers/bytes512"


def model_of(entry: dict[str, Any], *overrides: str):
    return params_from_dict({"version": 2, "models": {"x": entry}}, "test", overrides).models["x"]


def dense(h: int, i: int, layers: int, q: int, kv: int, vocab: int, *, bias: int, qk_norm: int, tables: int = 2) -> int:
    """A transformer with SwiGLU: q and kv are the widths of all query and of all key-value heads."""
    attention = h * q + 2 * h * kv + q * h + bias + qk_norm
    return tables * vocab * h + layers * (attention + 3 * h * i + 2 * h) + h


def clip(h: int = 1024, i: int = 4096, blocks: int = 22) -> int:
    """Patches 14 x 14 x 3 without bias, class token, 577 positions, one norm in front, 22 blocks."""
    block = 4 * (h * h + h) + 2 * h * i + i + h + 4 * h
    return 588 * h + h + 577 * h + 2 * h + blocks * block


def siglip(h: int = 1152, i: int = 4304, blocks: int = 25) -> int:
    """Patches with bias, 729 positions, 25 blocks."""
    block = 4 * (h * h + h) + 2 * h * i + i + h + 4 * h
    return 588 * h + h + 729 * h + blocks * block


def connector(v: int, text: int, hidden: int, padding: int) -> int:
    """Pooling of two layers' features with bias, SwiGLU, padding vectors, 128 extra embeddings."""
    pooling = 3 * (2 * v * v + v) + v * v + v
    return pooling + 2 * v * hidden + hidden * text + padding * 2 * v + 128 * text


# what the language models themselves have, as published; OLMoE: 16 layers of 64 experts of 3 * 2048 * 1024, a router
LANGUAGE = {
    "molmoe-1b": (6_919_161_856, 2 * 50304 * 2048 + 16 * (4 * 2048**2 + 4 * 2048 + 64 * 2048 * (3 * 1024 + 1)) + 2048),
    "molmo-7b-d": (
        7_615_616_512,
        dense(3584, 18944, 28, 3584, 512, 152064, bias=3584 + 2 * 512, qk_norm=0),
    ),
    "molmo-7b-o": (7_298_617_344, dense(4096, 11008, 32, 4096, 4096, 100352, bias=0, qk_norm=2 * 4096)),
    "molmo-72b": (72_706_203_648, dense(8192, 29568, 80, 8192, 1024, 152064, bias=8192 + 2 * 1024, qk_norm=0)),
    # Qwen3-4B has 4,022,468,096 with one table for both ends; Molmo2 has a head of its own
    "molmo2-4b": (4_022_468_096 + 151936 * 2560, dense(2560, 9728, 36, 4096, 1024, 151936, bias=0, qk_norm=2 * 128)),
    "molmo2-8b": (8_190_735_360, dense(4096, 12288, 36, 4096, 1024, 151936, bias=0, qk_norm=2 * 128)),
    "molmo2-o-7b": (7_298_011_136, dense(4096, 11008, 32, 4096, 4096, 100278, bias=0, qk_norm=2 * 4096)),
}


@pytest.mark.parametrize("name", list(LANGUAGE))
def test_published_sizes_have_their_published_parameters(name: str) -> None:
    published, computed = LANGUAGE[name]
    assert computed == published
    config = build_config(model_of({"preset": name, "tokenizer": BYTES}))
    with torch.device("meta"):
        counts = parameter_counts(MolmoForConditionalGeneration(config))
    language = PRESETS[name]["language"]
    first = name.startswith(("molmo-", "molmoe"))
    width = language["intermediate_size"]
    assert counts == {
        "vision": clip() if first else siglip(),
        "connector": connector(1024 if first else 1152, language["hidden_size"], width, 2 if first else 0),
        "language": published,
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("demo")])
def test_small_ones_are_built_and_small(name: str) -> None:
    with torch.device("meta"):
        model = MolmoForConditionalGeneration(build_config(model_of({"preset": name})))
    assert 100_000 < sum(parameter_counts(model).values()) < 500_000


def test_demo_is_the_shipped_model() -> None:
    shipped = to_dict(load_params(ROOT / "params.yaml").models["base"])
    assert to_dict(model_of({"preset": "demo"})) == shipped | {"preset": "demo"}


def test_what_the_model_gives_stands_over_the_preset() -> None:
    model = model_of({"preset": "molmo-7b-d", "vision": {"feature_layers": [-1]}, "language": {"num_layers": 2}})
    assert model.vision.feature_layers == [-1]
    assert (model.language.num_layers, model.language.hidden_size) == (2, 3584)
    assert model.tokenizer == "Qwen/Qwen2-7B"
    again = model_of(to_dict(model))  # a worker reads the params back as they were resolved
    assert again == model


def test_an_override_may_name_the_preset_and_change_it() -> None:
    model = model_of({"preset": "demo"}, "models.x.preset=demo-moe", "models.x.language.num_experts=4")
    assert (model.language.family, model.language.num_experts) == ("olmoe", 4)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset of models\.x 'molmo-7b'; did you mean 'molmo-7"):
        model_of({"preset": "molmo-7b"})


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1, "c": [1]}, "d": 2}
    assert merge(base, {"a": {"c": [2]}, "e": 3}) == {"a": {"b": 1, "c": [2]}, "d": 2, "e": 3}
    assert base == {"a": {"b": 1, "c": [1]}, "d": 2}


def test_the_guide_s_params_are_params() -> None:
    """Every YAML block of the guide, laid over the shipped params, loads; its table has the counts checked above."""
    text = (ROOT / "docs/guides/pretrained.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for block in blocks:
        params = params_from_dict(merge(shipped, yaml.safe_load(block)), "guide")
        assert len(params.models) + len(params.runs) > 3
    for name, (published, _) in LANGUAGE.items():
        assert re.search(rf"\| `{name}` \|.*\| {published:,} \|", text), name
