"""Whole checkpoint folders to and from other programs: weights, tokenizer and processor files together.

`export_molmo2` writes what transformers' native Molmo2 loads and serves; `import_folder` reads that, or a folder of the
models released in 2024, and writes a folder as `pipelines.assemble` does. What each can express is said in
`molmo_model.nn.convert_molmo2` and `convert_released`; what is nearly the same comes back as notes, to be shown.
"""

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from molmo_model.config import lookup
from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.model_config import CropMode, MessageFormat
from molmo_model.nn.convert_molmo2 import load_native, longest, require_expressible, to_native
from molmo_model.nn.convert_released import MODEL_TYPE, load_released
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tiling import IMAGE_TOKENS
from molmo_model.preprocessing.tokenizer import load_tokenizer
from molmo_model.processing import TEMPLATE_FILE, MolmoProcessor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE_TOKENS = (*IMAGE_TOKENS, "<low_res_im_start>", "<frame_start>", "<frame_end>", "<|video|>")
"""Extra tokens that the native processor asks for, in id order from the embedding's rows on."""
FILLER = "|<EXTRA_TOKENS_{}>|"
"""Fills a tokenizer up to the embedding's rows, as the released tokenizers are."""
CROPS: dict[str, tuple[Any, ...]] = {
    "crop_mode": (CropMode.overlap_and_resize_c2,),
    "resize": ("siglip",),
    "patch_masks": (False,),
    "tokens_per_window": (1,),
    "selector_tokens": (0,),
    "question_first": (False,),
}
"""What the native image processor does; other values of these fields of `PreprocessorConfig` it does not have."""


def export_molmo2(folder: Path, out: Path, dtype: str = "fp32", max_positions: int | None = None) -> list[str]:
    """Writes a checkpoint as native Molmo2: weights under the released names, tokenizer, processor, chat template.

    Args:
        dtype: a name of `DTYPES`.
        max_positions: positions that the copy is to be used with; None is as many as are equal.

    Returns:
        Notes for the person: what holds only within limits.

    Raises:
        ConfigError: what cannot be expressed, by name.
        CheckpointError: `out` exists, or the checkpoint cannot be read.
    """
    kind = lookup(DTYPES, dtype, "dtype")
    _require_new(out)
    processor = MolmoProcessor.from_pretrained(folder)
    config = processor.config
    # refused before the weights are read, if so
    require_expressible(MolmoConfig.from_pretrained(folder), config.max_images, max_positions)
    _require_native_crops(config)
    model = MolmoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rows, spare = config.vocab_size, model.config.extra_vocab_size
    if len(NATIVE_TOKENS) > spare:
        raise ConfigError(f"extra_vocab_size is {spare}, Molmo2's processor needs {len(NATIVE_TOKENS)} extra tokens")
    native = to_native(model, config.max_images, max_positions).to(kind)
    native.save_pretrained(out)
    extended(processor.tokenizer, rows).save_pretrained(out)
    (out / TEMPLATE_FILE).write_text(processor.chat_template, encoding="utf-8")
    for name, content in processor_files(config, model.config).items():
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    notes = [f"equal up to {max_positions or longest(model.config)} positions"]
    if longest(model.config) < model.config.text_config.max_position_embeddings:
        notes.append("beyond its window the language model has sliding layers, which the native class does not")
    if model.config.tie_word_embeddings:
        notes.append("the head, tied to the embedding here, is a copy of it there")
    if not config.exact_resize:
        notes.append("the model saw images resized within one level of 255 of what the native image processor makes")
    notes.append("films: the native processor samples and marks frames in its own way")
    return notes


def processor_files(config: PreprocessorConfig, model: MolmoConfig) -> dict[str, dict[str, Any]]:
    """The native processor's configuration files by name, with the layout of tokens of this model."""
    side = {"height": config.image_size, "width": config.image_size}
    shared = {
        "size": side,
        "patch_size": config.patch_size,
        "image_mean": list(model.image_mean),
        "image_std": list(model.image_std),
        "resample": 2,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    image = {
        **shared,
        "image_processor_type": "Molmo2ImageProcessor",
        "max_crops": config.max_crops,
        "overlap_margins": list(config.overlap_margins),
        "pooling_size": list(config.pooling_size),
    }
    video = {**shared, "video_processor_type": "Molmo2VideoProcessor", "pooling_size": list(config.video.pooling_size)}
    processor = {
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": True,
        "use_single_crop_start_token": False,
        "video_use_col_tokens": True,
        "use_frame_special_tokens": False,
    }
    return {
        "preprocessor_config.json": {**image, "processor_class": "Molmo2Processor"},
        "video_preprocessor_config.json": {**video, "processor_class": "Molmo2Processor"},
        "processor_config.json": {**processor, "image_processor": image, "video_processor": video},
    }


def extended(tokenizer: PreTrainedTokenizerFast, rows: int) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer with the extra tokens at the ids from `rows` on, and fillers up to there.

    Raises:
        ConfigError: its ids reach beyond `rows`.
    """
    own = _copy(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer)
    used = 1 + max(own.get_vocab().values())
    if used > rows:
        raise ConfigError(f"the tokenizer has {used} ids, the language model {rows} embeddings")
    own.add_tokens([FILLER.format(number) for number in range(rows - used)], special_tokens=True)
    own.add_tokens(list(NATIVE_TOKENS), special_tokens=True)
    found = own.convert_tokens_to_ids(list(NATIVE_TOKENS))
    if found != list(range(rows, rows + len(NATIVE_TOKENS))):
        raise ConfigError(f"the tokenizer gives the image tokens the ids {found}, not {rows} and on; it has gaps")
    return own


def stripped(tokenizer: PreTrainedTokenizerFast, rows: int) -> PreTrainedTokenizerFast:
    """A copy without added tokens of ids from `rows` on: they belong to the extra embedding, not to the text."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < rows]
    return _copy(raw, tokenizer)


def import_folder(source: Path, out: Path) -> list[str]:
    """Writes a folder of native Molmo2, or of a model released in 2024, as a checkpoint of this project.

    Returns:
        Notes for the person: what of the original is done otherwise here.

    Raises:
        ConfigError, CheckpointError: it is neither, or cannot be read whole; or `out` exists.
    """
    _require_new(out)
    raw = _read_json(source / "config.json")
    kind = lookup({"molmo2": _import_native, MODEL_TYPE: _import_released}, str(raw.get("model_type")), "model_type")
    tokenizer = load_tokenizer(str(source), own=True)
    model, config, notes = kind(source, tokenizer)
    preprocessor = Preprocessor(config, stripped(tokenizer, config.vocab_size))
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=preprocessor.eos_id, pad_token_id=preprocessor.pad_id
    )
    model.save_pretrained(out)
    MolmoProcessor(preprocessor).save_pretrained(out)
    return [*notes, f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}"]


def _import_native(
    source: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[MolmoForConditionalGeneration, PreprocessorConfig, list[str]]:
    model = load_native(source)
    processor = _read_json(source / "processor_config.json", {})
    image = processor.get("image_processor") or _read_json(source / "preprocessor_config.json")
    notes = []
    columns = processor.get("image_use_col_tokens", True)
    low = processor.get("use_single_crop_col_tokens")
    if not columns or low is False or processor.get("use_single_crop_start_token", True):
        notes.append(
            "the original's global view has its own start token or no column tokens; here both are alike. "
            "Train it on with this layout before use"
        )
    chatml = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
    if not (source / TEMPLATE_FILE).is_file():
        chatml_note = "chatml" if chatml else "none"
        notes.append(f"no {TEMPLATE_FILE}: message_format {chatml_note} is a guess")
    config = _preprocessor_config(image, model.config, MessageFormat.chatml if chatml else MessageFormat.none, "siglip")
    return model, config, notes


def _import_released(
    source: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[MolmoForConditionalGeneration, PreprocessorConfig, list[str]]:
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in takewhile(vocabulary.__contains__, IMAGE_TOKENS)]
    if len(ids) < 4:
        raise CheckpointError(f"the tokenizer of {source} lacks image tokens; it has {len(ids)} of {IMAGE_TOKENS}")
    model = load_released(source, ids)
    raw = _read_json(source / "preprocessor_config.json")
    image = {
        "size": {"height": raw["base_image_input_size"][0]},
        "patch_size": raw["image_patch_size"],
        "max_crops": raw["max_crops"],
        "overlap_margins": raw["overlap_margins"],
    }
    patches = raw["base_image_input_size"][0] // raw["image_patch_size"]
    image["pooling_size"] = [-(-patches // raw["image_token_length_h"]), -(-patches // raw["image_token_length_w"])]
    notes = [
        "the original begins every question with a blank (' User: ...'), which prompts here do not",
    ]
    return model, _preprocessor_config(image, model.config, MessageFormat.role, "default"), notes


def _preprocessor_config(
    image: Mapping[str, Any], model: MolmoConfig, message_format: MessageFormat, resize: str
) -> PreprocessorConfig:
    return PreprocessorConfig(
        image_size=image["size"]["height"],
        patch_size=image["patch_size"],
        pooling_size=tuple(image["pooling_size"]),
        resize=resize,
        vocab_size=model.text_config.vocab_size,
        max_crops=image["max_crops"],
        overlap_margins=tuple(image["overlap_margins"]),
        message_format=message_format,
        patch_masks=model.padding_embedding != "none",
        shifted_patch_masks=model.padding_embedding != "none",  # those released in 2024 alone have such embeddings
        exact_resize=resize == "siglip",
    )


def _require_native_crops(config: PreprocessorConfig) -> None:
    wrong = [
        f"{name}: {getattr(config, name)}" for name, allowed in CROPS.items() if getattr(config, name) not in allowed
    ]
    if wrong:
        raise ConfigError(f"transformers' Molmo2 image processor cannot express {', '.join(wrong)}")


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; name another folder, or delete it")


def _copy(raw: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)), **special)


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
