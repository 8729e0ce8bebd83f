"""AdamW with its own learning rate, warm-up, weight decay and clipping for each component of the model.

A component is `vision`, `connector` (with the extra embedding) or `language`; `molmo_model.nn` says which parameter
belongs where. A pretrained tower beside a fresh connector needs this: in Molmo the connector learns 10 to 30 times
faster and warms up 10 times shorter than the rest.

A component can be frozen, for good or until a step from which on it is trained with a schedule of its own. Frozen
parameters take no gradient, so nothing is computed for them, and get no moments: AdamW's begin with the first gradient,
and so does its bias correction, which counts per parameter.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from molmo_model.config import ComponentOptim, OptimConfig
from molmo_model.errors import ConfigError

COMPONENTS = ("vision", "connector", "language")


def component_config(config: OptimConfig, component: str) -> ComponentOptim:
    """The settings of one component."""
    by_name = {"vision": config.vision, "connector": config.connector, "language": config.language}
    return by_name[component]


def first_step(settings: ComponentOptim) -> int | None:
    """The step, from 1, that trains a component first; None never."""
    return settings.unfreeze_step if settings.freeze else 1


def freeze(model: nn.Module, config: OptimConfig, component_of: Callable[[str], str]) -> None:
    """Turns off the gradients of frozen components, also of those that `thaw` turns on later. Call it before the model
    is sharded.

    Raises:
        ConfigError: nothing is left to train in the first step.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not component_config(config, component_of(name)).freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("train.optim freezes vision, connector and language; leave at least one of them to train")


def thaw(optimizer: torch.optim.Optimizer, step: int) -> bool:
    """Turns on the gradients of the components whose training begins by this step; True if there were any.

    Call it in front of the step's forward pass. Under FSDP2 the units have to be told: `parallelize.refresh_units`.
    """
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["first_step"] <= step and not parameter.requires_grad
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return bool(parameters)


def parameter_groups(model: nn.Module, config: OptimConfig, component_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """The optimizer's groups: at most two per component, with and without weight decay; none is empty.

    Norms, biases and embeddings are not decayed. Each group carries `component`, `first_step`, `names` and `params` in
    the order of `model.named_parameters()`, tied parameters once. What is frozen for good is left out.

    Raises:
        ConfigError: a parameter belongs to no component, or to none of the groups.
    """
    undecayed = _undecayed(model)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        component = component_of(name)
        if component not in COMPONENTS:
            raise ConfigError(f"parameter {name} is of component {component!r}; known: {', '.join(COMPONENTS)}")
        settings = component_config(config, component)
        if not parameter.requires_grad and settings.unfreeze_step is None:
            continue
        decay = name not in undecayed
        group = groups.setdefault(
            (component, decay),
            {
                "params": [],
                "names": [],
                "component": component,
                "first_step": first_step(settings) or 1,
                "lr": 0.0,
                "weight_decay": settings.weight_decay if decay else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: (COMPONENTS.index(key[0]), not key[1]))]
    _check_complete(model, ordered)
    return ordered


def build_optimizer(model: nn.Module, config: OptimConfig, component_of: Callable[[str], str]) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; fused, because a DTensor is then dispatched once per group, not per parameter."""
    beta1, beta2 = config.betas
    groups = parameter_groups(model, config, component_of)
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)


def learning_rate(step: int, settings: ComponentOptim, steps: int, final_ratio: float) -> float:
    """Learning rate of optimizer step `step` (1-based): linear from zero over the warm-up, then a cosine.

    The peak is reached exactly at step `warmup_steps`, `final_ratio` of it at the last step. A warm-up that is longer
    than the run simply never ends. A component that is unfrozen later has the schedule of a run that begins with its
    `unfreeze_step` and ends with this one.
    """
    before = (first_step(settings) or 1) - 1
    step, steps = step - before, steps - before
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < 1:
        return 0.0
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int
) -> dict[str, float]:
    """Sets every group's rate for a step and returns the rate of each component that the step trains."""
    rates = {}
    for group in optimizer.param_groups:
        settings = component_config(config, group["component"])
        group["lr"] = learning_rate(step, settings, steps, config.final_ratio)
        if group["first_step"] <= step:
            rates[group["component"]] = group["lr"]
    return rates


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, config: OptimConfig) -> dict[str, float]:
    """Scales each component's gradients to its `max_grad_norm`; returns the norms before that.

    A parameter that got no gradient (a tower whose features no token used) counts as zero; a component that is still
    frozen is left out. The squared norms of all
    components travel in one collective, in float64, so every rank scales by the same bits.
    """
    gradients: dict[str, list[torch.Tensor]] = {}
    shard_group = None
    for group in optimizer.param_groups:
        if not group["params"][0].requires_grad:
            continue
        found = gradients.setdefault(group["component"], [])
        for parameter in group["params"]:
            if parameter.grad is not None:
                shard_group = shard_group or _shard_group(parameter.grad)
                found.append(_local(parameter.grad))
    device = optimizer.param_groups[0]["params"][0].device
    squares = torch.stack([_square_sum(tensors, device) for tensors in gradients.values()])
    if shard_group is not None:
        dist.all_reduce(squares, group=shard_group)
    norms = dict(zip(gradients, squares.sqrt().tolist(), strict=True))
    for component, norm in norms.items():
        limit = component_config(config, component).max_grad_norm
        if norm > limit and math.isfinite(norm) and gradients[component]:
            torch._foreach_mul_(gradients[component], limit / norm)
    return norms


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, create: bool = False, step: int | None = None
) -> dict[str, torch.Tensor]:
    """First and second moments by `<moment>.<parameter name>`, sharded as the parameters are.

    Args:
        create: makes the moments as zeros first, for a load into an optimizer that has not stepped.
        step: with `create`, the steps done: components that are trained later have no moments yet. None is all.
    """
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        if create and step is not None and group["first_step"] > step:
            continue
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if create:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                if create:
                    state[moment] = torch.zeros_like(parameter, requires_grad=False)
                if moment in state:
                    tensors[f"{moment}.{name}"] = state[moment]
    return tensors


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tells AdamW's bias correction how many steps the loaded moments have seen, when `step` are done."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (state := optimizer.state.get(parameter)) and "step" in state:
                state["step"].fill_(float(step - group["first_step"] + 1))


def _undecayed(model: nn.Module) -> set[str]:
    """Names of parameters without weight decay: every vector (norms, biases, class tokens) and every embedding table,
    those of positions included."""
    names = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embedding"):
            names.update(f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))
    return names


def _check_complete(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Every trained parameter is in exactly one group: a forgotten one would silently keep its first value."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := [name for key, name in trained.items() if key not in set(grouped)]:
        raise ConfigError(f"parameters without an optimizer group: {', '.join(missing)}")
    if len(grouped) != len(set(grouped)):
        raise ConfigError("a parameter is in two optimizer groups")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_group(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks over which a gradient is split (with replicas, its own shard group only)."""
    if not isinstance(tensor, DTensor):
        return None
    (dimension,) = (i for i, placement in enumerate(tensor.placements) if isinstance(placement, Shard))
    return tensor.device_mesh.get_group(dimension)


def _square_sum(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares in float64; norms are taken per tensor in fp32 and summed in a fixed order."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch.stack(torch._foreach_norm([tensor.float() for tensor in tensors])).double()
    return norms.square().sum()
