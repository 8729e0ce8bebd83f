"""From `params.yaml` to a model: its configuration, its first weights, and which component a parameter belongs to."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

import molmo_model
from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.model_config import CHATML_END, CONNECTOR_MODULES, CropMode, MessageFormat, ModelConfig
from molmo_model.nn.experts import idle_parameters
from molmo_model.nn.language_model import load_language, text_config
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.nn.pretrained import load_model, require_none_missing
from molmo_model.nn.vision_config import load_vision, vision_config
from molmo_model.nn.vision_encoder import encoder_name

REPOSITORY = Path(molmo_model.__file__).parent.parent
COMPONENTS = ("vision", "connector", "language")


def build_config(model: ModelConfig, image_token_id: int | None = None) -> MolmoConfig:
    """The transformers configuration of a model.

    Args:
        image_token_id: id of `<im_patch>`; None is the third extra id, as the preprocessing has it.

    Raises:
        ConfigError: a name is unknown, a size is missing, or sizes contradict each other or the pretrained parts.
    """
    vision, feature_layers = vision_config(model.vision)
    text = text_config(model.language, _tokenizer_size(model.tokenizer))
    vision.dtype = text.dtype = torch.float32  # the master weights, whatever the pretrained parts were saved in
    connector = model.connector
    return MolmoConfig(
        dtype=torch.float32,
        vision_config=vision,
        text_config=text,
        vision_encoder=encoder_name(model.vision.encoder),
        vision_positions=model.vision.positions.value,
        vision_feature_layers=feature_layers,
        pooling=connector.pooling.value,
        pooling_size=list(connector.pooling_size),
        pooling_num_heads=connector.num_heads,
        pooling_attention_mask=connector.pooling_attention_mask,
        window_position_embedding=connector.window_position_embedding,
        num_queries=connector.num_queries,
        padding_embedding=connector.padding_embedding.value,
        feature_dropout=connector.feature_dropout,
        hierarchical=model.preprocessing.crop_mode is CropMode.hierarchical,
        scale_fusion=connector.scale_fusion.value,
        projector=connector.projector.value,
        projector_hidden_size=connector.projector_hidden_size,
        extra_vocab_size=model.language.extra_vocab_size,
        image_token_id=image_token_id,
        bidirectional_images=model.language.bidirectional_images,
        residual_dropout=model.language.residual_dropout,
        response_residual_dropout=model.language.response_residual_dropout,
        embedding_dropout=model.language.embedding_dropout,
        load_balancing_weight=model.language.load_balancing_weight,
        router_z_weight=model.language.router_z_weight,
        one_image_block=model.language.one_image_block,
        temporal_position_embedding=model.preprocessing.video.temporal_position_embedding,
        temporal_attention_layers=model.preprocessing.video.temporal_attention_layers,
        max_frames=model.preprocessing.video.max_frames,
        frames_per_batch=model.preprocessing.video.frames_per_batch,
        selector=None if model.selector is None else {**asdict(model.selector), "score": model.selector.score.value},
    )


def build_model(model: ModelConfig, seed: int, image_token_id: int | None = None) -> MolmoForConditionalGeneration:
    """A model with its first weights in fp32: drawn from `seed`, pretrained parts loaded over them.

    The same seed gives the same weights, and the caller's random state stays as it was.

    Raises:
        ConfigError: see `build_config`.
        CheckpointError: a pretrained part cannot be loaded whole.
    """
    config = build_config(model, image_token_id)
    built = _first_model(model, config, seed) if model.checkpoint is None else _load_whole(config, model.checkpoint)
    # set as an attribute: transformers takes end and padding of `generate` from here and saves it beside the weights
    built.generation_config = _generation_config(model)
    return built


def _first_model(model: ModelConfig, config: MolmoConfig, seed: int) -> MolmoForConditionalGeneration:
    """Weights drawn from the seed, pretrained parts over them."""
    _check_memory(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = MolmoForConditionalGeneration(config).float()
    if model.vision.pretrained is not None:
        load_vision(built.model.vision_backbone.encoder, model.vision.pretrained)
    if model.language.pretrained is not None:
        load_language(built.model.language_model, built.lm_head, model.language.pretrained)
        built.tie_weights()
    return built


def _check_memory(config: MolmoConfig) -> None:
    """Refuses weights that are more than the machine's memory, before an allocation fails or the system ends it."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        wanted = 4 * sum(parameter.numel() for parameter in MolmoForConditionalGeneration(config).parameters())
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > have:
        raise ConfigError(
            f"the weights take {wanted / 1e9:,.0f} GB in fp32, this machine has {have / 1e9:,.0f} GB; make the sizes "
            "smaller, or assemble on a larger machine"
        )


def _load_whole(config: MolmoConfig, source: str) -> MolmoForConditionalGeneration:
    """The model of a checkpoint folder, which must be what the params describe; what they do not describe, such as the
    norms' epsilon, is the folder's."""
    model, info = load_model(MolmoForConditionalGeneration, source)
    require_none_missing(source, info["missing_keys"], info)
    with torch.device("meta"):
        wanted = MolmoForConditionalGeneration(config)
    differ = _differences(
        {name: list(tensor.shape) for name, tensor in wanted.state_dict().items()},
        {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    )
    ours, theirs = config.to_dict(), model.config.to_dict()
    parts = {"vision_config", "text_config", "vision_encoder", "architectures", "dtype"}  # shapes tell of them
    parts |= {"_name_or_path", "transformers_version"}
    differ += _differences(*({k: v for k, v in values.items() if k not in parts} for values in (ours, theirs)))
    if differ:
        raise CheckpointError(f"checkpoint {source} is another model than the params describe: {'; '.join(differ[:5])}")
    return model


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    names = sorted(wanted.keys() | found.keys())
    return [
        f"{name} is {found.get(name)}, not {wanted.get(name)}" for name in names if wanted.get(name) != found.get(name)
    ]


def component_of(parameter: str) -> str:
    """`vision`, `connector` or `language`: which component's optimizer settings a parameter follows.

    The extra embedding, learned rows and columns, what looks across frames and the token selector belong to the
    connector: they are new, as that is. Names may carry the prefixes of wrappers.
    """
    parts = parameter.split(".")
    if set(CONNECTOR_MODULES) & set(parts):
        return "connector"
    return "vision" if "vision_backbone" in parts else "language"


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters per component; tied ones count once."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def active_parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters per component that one token meets: of a mixture of experts, only the experts that it is sent to."""
    counts = parameter_counts(model)
    for name, idle in idle_parameters(model).items():
        counts[component_of(name)] -= idle
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


def _tokenizer_size(name: str) -> int:
    """Ids that the tokenizer uses: its largest plus one."""
    return max(_tokenizer(name).get_vocab().values()) + 1


def _generation_config(model: ModelConfig) -> GenerationConfig:
    """Greedy, until the token that ends answers in the format that the model is trained with."""
    tokenizer = _tokenizer(model.tokenizer)
    end = tokenizer.eos_token_id
    if model.preprocessing.message_format is MessageFormat.chatml:
        end = tokenizer.convert_tokens_to_ids(CHATML_END)
    return GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=tokenizer.eos_token_id)


def _tokenizer(name: str) -> Any:
    """The tokenizer of a folder, in the working directory or else in the repository, or of a hub id."""
    folders = [folder for folder in (Path(name), REPOSITORY / name) if folder.is_dir()]
    try:
        return AutoTokenizer.from_pretrained(folders[0] if folders else name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name!r} is no folder here and no hub id that can be loaded: {error}") from error
