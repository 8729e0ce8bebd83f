"""From `params.yaml` to a model: its configuration, its first weights, and which component a parameter belongs to."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

import molmo_model
from molmo_model.config import lookup
from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.model_config import LanguageConfig, ModelConfig, VisionConfig
from molmo_model.nn.language_model import LANGUAGE_MODELS, text_config
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.vision_encoder import VISION_ENCODERS, VisionEncoder, drop_unused, resolve_layers

REPOSITORY = Path(molmo_model.__file__).parent.parent
COMPONENTS = ("vision", "connector", "language")


def build_config(model: ModelConfig, image_token_id: int | None = None) -> MolmoConfig:
    """The transformers configuration of a model.

    Args:
        image_token_id: id of `<im_patch>`; None is the third extra id, as the preprocessing has it.

    Raises:
        ConfigError: a name is unknown, a size is missing, or sizes contradict each other or the pretrained parts.
    """
    vision, feature_layers = _vision_config(model.vision)
    text = _text_config(model.language, _tokenizer_size(model.tokenizer))
    vision.dtype = text.dtype = torch.float32  # the master weights, whatever the pretrained parts were saved in
    connector = model.connector
    return MolmoConfig(
        dtype=torch.float32,
        vision_config=vision,
        text_config=text,
        vision_encoder=model.vision.encoder,
        vision_feature_layers=feature_layers,
        pooling=connector.pooling.value,
        pooling_size=list(connector.pooling_size),
        pooling_num_heads=connector.num_heads,
        pooling_attention_mask=connector.pooling_attention_mask,
        window_position_embedding=connector.window_position_embedding,
        projector=connector.projector.value,
        projector_hidden_size=connector.projector_hidden_size,
        extra_vocab_size=model.language.extra_vocab_size,
        image_token_id=image_token_id,
        bidirectional_images=model.language.bidirectional_images,
    )


def build_model(model: ModelConfig, seed: int, image_token_id: int | None = None) -> MolmoForConditionalGeneration:
    """A model with its first weights in fp32: drawn from `seed`, pretrained parts loaded over them.

    The same seed gives the same weights, and the caller's random state stays as it was.

    Raises:
        ConfigError: see `build_config`.
        CheckpointError: a pretrained part cannot be loaded whole.
    """
    config = build_config(model, image_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = MolmoForConditionalGeneration(config).float()
    if model.vision.pretrained is not None:
        _load_vision(built, model.vision.pretrained)
    if model.language.pretrained is not None:
        _load_language(built, model.language.pretrained)
    # set as an attribute: transformers takes end and padding of `generate` from here and saves it beside the weights
    built.generation_config = _generation_config(model.tokenizer)
    return built


def component_of(parameter: str) -> str:
    """`vision`, `connector` or `language`: which component's optimizer settings a parameter follows.

    The extra embedding belongs to the connector: it is new, as that is. Names may carry the prefixes of wrappers.
    """
    parts = parameter.split(".")
    if "extra_embedding" in parts or "connector" in parts:
        return "connector"
    return "vision" if "vision_backbone" in parts else "language"


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters per component; tied ones count once."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def restore_buffers(model: nn.Module) -> None:
    """Refills the buffers that no checkpoint holds (pixel mean, rotary tables, position ids) after `to_empty`, and
    leaves every parameter as it is."""
    parameters = list(model.parameters())
    marked = [parameter for parameter in parameters if getattr(parameter, "_is_hf_initialized", False)]
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    _restore(model, None)
    for parameter in set(parameters) - set(marked):
        del parameter._is_hf_initialized  # type: ignore[attr-defined]


def _restore(module: nn.Module, owner: Any) -> None:
    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        _restore(child, owner)
    if owner is not None and next(module.buffers(recurse=False), None) is not None:
        owner._init_weights(module)


def _vision_config(vision: VisionConfig) -> tuple[PreTrainedConfig, list[int]]:
    """The encoder's config cut off after the last feature layer, and the feature layers from 0."""
    spec: VisionEncoder = lookup(VISION_ENCODERS, vision.encoder, "vision encoder")
    where = f"vision encoder {vision.encoder}"
    if vision.pretrained is None:
        config = AutoConfig.for_model(
            spec.model_type,
            image_size=vision.image_size or spec.image_size,
            patch_size=vision.patch_size or spec.patch_size,
            hidden_size=vision.hidden_size or spec.hidden_size,
            intermediate_size=vision.intermediate_size or spec.intermediate_size,
            num_hidden_layers=vision.num_layers or spec.num_layers,
            num_attention_heads=vision.num_heads or spec.num_heads,
        )
        depth = config.num_hidden_layers
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"{where}: num_heads {config.num_attention_heads} does not divide hidden_size {config.hidden_size}"
            )
    else:
        config = _load_config(vision.pretrained, where)
        config = getattr(config, "vision_config", config)
        if config.model_type != spec.model_type:
            raise ConfigError(f"{where}: {vision.pretrained} is a {config.model_type}, not a {spec.model_type}")
        _same_sizes(
            vision, config, where, ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_heads")
        )
        depth = vision.num_layers or min(config.num_hidden_layers, spec.num_layers)
        if depth > config.num_hidden_layers:
            raise ConfigError(f"{where}: num_layers {depth}, but {vision.pretrained} has {config.num_hidden_layers}")
    if config.image_size % config.patch_size:
        raise ConfigError(f"{where}: image_size {config.image_size} is no multiple of patch_size {config.patch_size}")
    layers = resolve_layers(vision.feature_layers or spec.feature_layers, depth, f"{where}: feature_layers")
    for name, value in (("num_hidden_layers", max(layers) + 1), *spec.extra_config):
        setattr(config, name, value)
    return config, layers


def _text_config(language: LanguageConfig, tokenizer_size: int) -> PreTrainedConfig:
    spec = lookup(LANGUAGE_MODELS, language.family, "language model")
    where = f"language model {language.family}"
    if language.pretrained is None:
        return text_config(spec, language, tokenizer_size, where)
    config = _load_config(language.pretrained, where)
    if config.model_type != spec.model_type:
        raise ConfigError(f"{where}: {language.pretrained} is a {config.model_type}, not a {spec.model_type}")
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_key_value_heads")
    _same_sizes(language, config, where, sizes)
    if config.vocab_size < tokenizer_size:
        raise ConfigError(
            f"{where}: {language.pretrained} has {config.vocab_size} embeddings, the tokenizer {tokenizer_size} "
            "tokens; use the tokenizer that belongs to the model"
        )
    return config


def _same_sizes(wanted: Any, config: PreTrainedConfig, where: str, names: tuple[str, ...]) -> None:
    """Refuses sizes in the params that a pretrained part does not have."""
    renamed = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    for name in names:
        asked, found = getattr(wanted, name), getattr(config, renamed.get(name, name))
        if asked is not None and asked != found:
            raise ConfigError(f"{where}: {name} is {asked}, but {wanted.pretrained} has {found}; leave it out")


def _load_config(source: str, where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {source} has no configuration that can be read: {error}") from error


def _load_vision(built: MolmoForConditionalGeneration, source: str) -> None:
    features = built.model.vision_backbone.encoder
    loaded, info = _from_pretrained(AutoModel, source, config=features.vit.config)
    drop_unused(loaded, features.spec)
    kept = set(features.vit.state_dict())
    _require_none_missing(source, [name for name in info["missing_keys"] if name in kept], info)
    features.vit.load_state_dict(loaded.state_dict(), strict=True, assign=True)


def _load_language(built: MolmoForConditionalGeneration, source: str) -> None:
    loaded, info = _from_pretrained(AutoModelForCausalLM, source)
    _require_none_missing(source, info["missing_keys"], info)
    built.model.language_model.load_state_dict(loaded.base_model.state_dict(), strict=True, assign=True)
    built.lm_head.load_state_dict(loaded.get_output_embeddings().state_dict(), strict=True, assign=True)
    built.tie_weights()


def _from_pretrained(auto: Any, source: str, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Model and loading report in fp32; the report is checked here, not printed."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"pretrained weights {source} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def _require_none_missing(source: str, missing: Any, info: dict[str, Any]) -> None:
    if missing or info.get("mismatched_keys"):
        names = sorted(map(str, [*missing, *info.get("mismatched_keys", [])]))
        raise CheckpointError(f"pretrained weights {source} lack {len(names)} of the model's tensors: {names[:5]}")


def _tokenizer_size(name: str) -> int:
    """Ids that the tokenizer uses: its largest plus one."""
    return max(_tokenizer(name).get_vocab().values()) + 1


def _generation_config(tokenizer: str) -> GenerationConfig:
    end = _tokenizer(tokenizer).eos_token_id
    return GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)


def _tokenizer(name: str) -> Any:
    """The tokenizer of a folder, in the working directory or else in the repository, or of a hub id."""
    folders = [folder for folder in (Path(name), REPOSITORY / name) if folder.is_dir()]
    try:
        return AutoTokenizer.from_pretrained(folders[0] if folders else name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r} is no folder here and no hub id that can be loaded: {error}") from error
