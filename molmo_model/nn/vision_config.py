"""The vision encoder's transformers configuration from the params, and its pretrained weights.

A crop of another size than that of the pretrained weights gets their positions interpolated, once, when they are
loaded: the saved model is one of the new size.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig

from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.model_config import VisionConfig, VisionPositions
from molmo_model.nn.positions import resize_positions
from molmo_model.nn.pretrained import load_config, load_model, require_none_missing, same_sizes
from molmo_model.nn.vision_encoder import (
    VISION_ENCODERS,
    VisionEncoder,
    ViTFeatures,
    drop_unused,
    encoder_name,
    resolve_layers,
)

VARIABLE_RESOLUTION = ("siglip2_vision_model", "siglip2")
"""Model types whose checkpoints ("naflex") take patches of any number instead of square crops."""
DERIVED_FIELDS = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
"""Fields of DINOv2's configuration that follow from the number of layers, and contradict another number."""


def vision_config(vision: VisionConfig) -> tuple[PreTrainedConfig, list[int]]:
    """The encoder's config cut off after the last feature layer, and the feature layers from 0.

    Raises:
        ConfigError: an unknown encoder, or sizes that contradict each other or the pretrained weights.
    """
    spec: VisionEncoder = VISION_ENCODERS[encoder_name(vision.encoder)]
    where = f"vision encoder {vision.encoder}"
    if vision.pretrained is None:
        config = _new_config(vision, spec, where)
        depth = config.num_hidden_layers
    else:
        config = _pretrained_config(vision.pretrained, spec, where)
        depth = _pretrained_depth(vision, spec, config, where)
        _same_as_pretrained(vision, spec, config, where)
        config.image_size = vision.image_size or config.image_size
    _check_size(config, where)
    if vision.positions is VisionPositions.rope_2d:
        _check_rotary(vision, config, where)
    layers = resolve_layers(vision.feature_layers or spec.feature_layers, depth, f"{where}: feature_layers")
    fields = {name: value for name, value in config.to_dict().items() if name not in DERIVED_FIELDS}
    fields |= {"num_hidden_layers": max(layers) + 1, **dict(spec.extra_config)}
    return AutoConfig.for_model(**fields), layers


def load_vision(features: ViTFeatures, source: str) -> None:
    """Pretrained weights from a folder or hub id over those of `features`, positions interpolated to its size.

    Raises:
        CheckpointError: weights of a built block are missing, or there are others that the encoder has no place for.
    """
    spec, config = features.spec, copy.deepcopy(features.vit.config)
    config.image_size = _pretrained_config(source, spec, f"pretrained weights {source}").image_size
    config._attn_implementation = None
    loaded, info = load_model(AutoModel, source, config=config)
    drop_unused(loaded, spec)
    state = loaded.state_dict()
    require_none_missing(source, [name for name in info["missing_keys"] if name in state], info)
    _require_none_left_over(source, info["unexpected_keys"], config.num_hidden_layers, spec)
    grid = features.vit.config.image_size // config.patch_size
    table = state[spec.positions]
    resized = resize_positions(table.flatten(0, -2), grid, min(spec.prefix_tokens, 1))
    state[spec.positions] = resized.view(*table.shape[:-2], *resized.shape)
    features.vit.load_state_dict(state, strict=True, assign=True)


def _new_config(vision: VisionConfig, spec: VisionEncoder, where: str) -> Any:
    """Of a model that is built from sizes."""
    hidden = vision.hidden_size or spec.hidden_size
    heads = vision.num_heads or spec.num_heads
    intermediate = vision.intermediate_size or spec.intermediate_size
    if hidden % heads:
        raise ConfigError(f"{where}: num_heads {heads} does not divide hidden_size {hidden}")
    fields: dict[str, Any] = {"intermediate_size": intermediate}
    if spec.mlp_ratio:
        if intermediate % hidden:
            raise ConfigError(
                f"{where}: intermediate_size {intermediate} is no multiple of hidden_size {hidden}; such encoders know "
                f"only whole ratios, take {max(intermediate // hidden, 1) * hidden} or the next one"
            )
        fields = {"mlp_ratio": intermediate // hidden, "use_swiglu_ffn": spec.swiglu}
    return AutoConfig.for_model(
        spec.model_type,
        image_size=vision.image_size or spec.image_size,
        patch_size=vision.patch_size or spec.patch_size,
        hidden_size=hidden,
        num_hidden_layers=vision.num_layers or spec.num_layers,
        num_attention_heads=heads,
        hidden_act=spec.activation,
        layer_norm_eps=spec.eps,
        **fields,
    )


def _pretrained_config(source: str, spec: VisionEncoder, where: str) -> Any:
    """Of the weights in `source`, which may hold a text model beside the vision model. Its crop is cut down to whole
    patches: of 384 pixels in patches of 14, the encoder itself only ever sees 378."""
    config = load_config(source, where)
    config = getattr(config, "vision_config", config)
    if config.model_type in VARIABLE_RESOLUTION:
        raise ConfigError(
            f"{where}: {source} is a {config.model_type} (naflex), which takes patches of varying number and no square "
            f"crops; take the weights for a fixed size, such as {VISION_ENCODERS['siglip2'].hub_id}"
        )
    if config.model_type != spec.model_type:
        raise ConfigError(f"{where}: {source} is a {config.model_type}, not a {spec.model_type}")
    registers = getattr(config, "num_register_tokens", None)
    if registers is not None and 1 + registers != spec.prefix_tokens:
        raise ConfigError(f"{where}: {source} has {registers} register tokens, not {spec.prefix_tokens - 1}")
    config.patch_size = _side(config.patch_size, "patch_size", source, where)
    size = _side(config.image_size, "image_size", source, where)
    config.image_size = size - size % config.patch_size
    return config


def _side(size: Any, name: str, source: str, where: str) -> int:
    sides = {int(side) for side in size} if isinstance(size, Iterable) else {int(size)}
    if len(sides) > 1:
        raise ConfigError(f"{where}: {name} of {source} is {size}; crops and patches are squares")
    return sides.pop()


def _pretrained_depth(vision: VisionConfig, spec: VisionEncoder, config: Any, where: str) -> int:
    """Blocks that negative feature layers count from: those of the weights, but for encoders that Molmo counts
    otherwise."""
    stored = config.num_hidden_layers
    depth = vision.num_layers or (spec.num_layers if stored == spec.stored_layers else stored)
    if depth > stored:
        raise ConfigError(f"{where}: num_layers {depth}, but {vision.pretrained} has {stored}")
    return depth


def _same_as_pretrained(vision: VisionConfig, spec: VisionEncoder, config: Any, where: str) -> None:
    same_sizes(vision, config, where, ("patch_size", "hidden_size", "num_heads"))
    found = config.hidden_size * config.mlp_ratio if spec.mlp_ratio else config.intermediate_size
    asked = vision.intermediate_size
    if asked is not None and asked != found:
        raise ConfigError(f"{where}: intermediate_size is {asked}, but {vision.pretrained} has {found}; leave it out")


def _check_size(config: Any, where: str) -> None:
    size, patch = config.image_size, config.patch_size
    if size % patch:
        near = [side for side in (size - size % patch, size - size % patch + patch) if side]
        raise ConfigError(
            f"{where}: image_size {size} is no multiple of patch_size {patch}; take {' or '.join(map(str, near))}"
        )


def _check_rotary(vision: VisionConfig, config: Any, where: str) -> None:
    if vision.pretrained is not None:
        raise ConfigError(
            f"{where}: positions rope_2d take the place of the learned ones that {vision.pretrained} was trained "
            "with; leave `pretrained` out, or take native or learned_2d"
        )
    width = config.hidden_size // config.num_attention_heads
    if width % 4:
        raise ConfigError(
            f"{where}: positions rope_2d turn pairs by row and column; {width} channels per head are no multiple of 4"
        )


def _require_none_left_over(source: str, names: Iterable[str], built: int, spec: VisionEncoder) -> None:
    """Unexpected tensors may belong to blocks that are not built, to what is behind them, or to a text model, but not
    to what is built."""
    block = re.compile(r"encoder\.layers?\.(\d+)\.")
    left_over = []
    for name in names:
        inner = name.removeprefix("vision_model.")
        if inner in ("embeddings.mask_token", "embeddings.position_ids"):
            continue
        if inner.startswith("embeddings.") or ((found := block.match(inner)) and int(found[1]) < built):
            left_over.append(name)
    if left_over:
        raise CheckpointError(
            f"pretrained weights {source} hold {len(left_over)} tensors that a {spec.model_type} of their "
            f"configuration has no place for: {sorted(left_over)[:5]}"
        )
