import math

import pytest
import torch
from torch import nn

from molmo_model.config import ComponentOptim, OptimConfig
from molmo_model.errors import ConfigError
from molmo_model.train.optim import (
    build_optimizer,
    clip_gradients,
    freeze,
    learning_rate,
    optimizer_tensors,
    parameter_groups,
    set_learning_rates,
    set_optimizer_step,
)


class WindowPositionEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({"linear": nn.Linear(4, 6), "norm": nn.LayerNorm(6)})
        self.connector = nn.ModuleDict({"linear": nn.Linear(6, 6, bias=False), "places": WindowPositionEmbedding()})
        self.language = nn.ModuleDict({"embed": nn.Embedding(7, 6), "head": nn.Linear(6, 7, bias=False)})


def component_of(name: str) -> str:
    return name.split(".")[0]


def config(**frozen: bool) -> OptimConfig:
    return OptimConfig(
        vision=ComponentOptim(1e-3, 0.1, 10, 1.0, frozen.get("vision", False)),
        connector=ComponentOptim(1e-2, 0.2, 2, 0.5, frozen.get("connector", False)),
        language=ComponentOptim(1e-4, 0.3, 5, 2.0, frozen.get("language", False)),
    )


def test_groups_are_split_by_component_and_decay() -> None:
    groups = parameter_groups(Toy(), config(), component_of)
    assert [(group["component"], group["weight_decay"], group["names"]) for group in groups] == [
        ("vision", 0.1, ["vision.linear.weight"]),
        ("vision", 0.0, ["vision.linear.bias", "vision.norm.weight", "vision.norm.bias"]),
        ("connector", 0.2, ["connector.linear.weight"]),
        ("connector", 0.0, ["connector.places.weight"]),
        ("language", 0.3, ["language.head.weight"]),
        ("language", 0.0, ["language.embed.weight"]),
    ]


def test_every_parameter_of_a_real_model_is_in_one_group() -> None:
    from molmo_model.config import load_params
    from molmo_model.nn.build import build_model
    from molmo_model.nn.build import component_of as real_component_of
    from molmo_model.source_digest import ROOT

    model = load_params(ROOT / "params.yaml").models["base"]
    for tie in (False, True):
        model.language.tie_word_embeddings = tie
        built = build_model(model, 0)
        groups = parameter_groups(built, config(), real_component_of)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in built.named_parameters())
        decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
        assert not any("norm" in name or name.endswith("bias") for name in decayed)
        embeddings = [name for name in decayed if "embed" in name.rpartition(".")[0]]
        assert embeddings == ["model.vision_backbone.encoder.vit.embeddings.patch_embedding.weight"]  # a convolution
        assert ("lm_head.weight" in decayed) is not tie


def test_frozen_components_have_no_group_and_no_gradient() -> None:
    model, settings = Toy(), config(vision=True)
    freeze(model, settings, component_of)
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())
    groups = parameter_groups(model, settings, component_of)
    assert {group["component"] for group in groups} == {"connector", "language"}
    assert all(group["params"] for group in groups)


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave at least one"):
        freeze(Toy(), config(vision=True, connector=True, language=True), component_of)


def test_an_unknown_component_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vision\.linear\.weight.*'audio'"):
        parameter_groups(Toy(), config(), lambda name: "audio")


def test_learning_rate_warms_up_from_zero_and_ends_at_its_ratio() -> None:
    settings = ComponentOptim(learning_rate=2.0, warmup_steps=4)
    rates = [learning_rate(step, settings, 12, 0.1) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx((2.0 + 0.2) / 2)  # half-way from step 4 to step 12
    assert rates[-1] == pytest.approx(0.2)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert learning_rate(1, ComponentOptim(learning_rate=2.0, warmup_steps=0), 10**9, 0.1) == pytest.approx(2.0)
    assert learning_rate(3, ComponentOptim(learning_rate=2.0, warmup_steps=30), 3, 0.1) == pytest.approx(0.2)


def test_each_component_follows_its_own_warm_up() -> None:
    optimizer = build_optimizer(Toy(), config(), component_of)
    rates = set_learning_rates(optimizer, config(), 2, 100)
    assert rates == {"vision": pytest.approx(2e-4), "connector": pytest.approx(1e-2), "language": pytest.approx(4e-5)}
    assert all(group["lr"] == rates[group["component"]] for group in optimizer.param_groups)


def test_clipping_is_per_component() -> None:
    model = Toy()
    optimizer = build_optimizer(model, config(), component_of)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    model.language.embed.weight.grad = None  # got no gradient in this step
    for parameter in model.language.head.parameters():
        parameter.grad *= 0.01
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected = {
        part: math.sqrt(sum(float((g.double() ** 2).sum()) for name, g in before.items() if name.startswith(part)))
        for part in ("vision", "connector", "language")
    }
    norms = clip_gradients(optimizer, config())
    assert norms == pytest.approx(expected, rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            limit = {"vision": 1.0, "connector": 0.5, "language": 2.0}[component_of(name)]
            scale = min(1.0, limit / expected[component_of(name)])
            torch.testing.assert_close(parameter.grad, before[name] * scale)
    assert expected["language"] < 2.0  # so one component was left alone


def test_moments_survive_being_copied_into_a_fresh_optimizer() -> None:
    def one_step(model: Toy, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rates(optimizer, config(), seed, 10)
        optimizer.step()

    torch.manual_seed(0)
    first = Toy()
    old = build_optimizer(first, config(), component_of)
    one_step(first, old, 1)
    second = Toy()
    second.load_state_dict(first.state_dict())
    new = build_optimizer(second, config(), component_of)
    assert not optimizer_tensors(new)
    loaded = optimizer_tensors(new, create=True)
    for name, tensor in optimizer_tensors(old).items():
        loaded[name].copy_(tensor)
    set_optimizer_step(new, 1)
    one_step(first, old, 2)
    one_step(second, new, 2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
