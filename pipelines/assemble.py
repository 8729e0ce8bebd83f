"""Assembles the first weights of one model: random ones drawn from the seed, or pretrained parts put together.

Reads the tokenizer and, where the params name them, pretrained parts; writes `artifacts/checkpoints/<model>` with one
checkpoint, `step-000000`, of the same layout as a trained one: a folder that transformers loads, the tokenizer and
`molmo_preprocessor.json`. Runs start from it.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.artifacts import path_digest, write_manifest, write_text_atomic
from molmo_model.config import checkpoint_name
from pipelines.stage import Build, Key, Stage, main

if TYPE_CHECKING:
    from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig

CHECKPOINT_SCHEMA = "molmo/checkpoint"
CHECKPOINT_VERSION = 1


def build(build: Build) -> dict[str, Any]:
    """Writes `step-000000` and returns the number of parameters per component."""
    from molmo_model.nn.build import build_model, parameter_counts
    from molmo_model.nn.vision_encoder import VISION_ENCODERS
    from molmo_model.preprocessing.preprocessor import Preprocessor
    from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
    from molmo_model.preprocessing.tokenizer import load_tokenizer
    from molmo_model.processing import MolmoProcessor

    name = build.key["model"]
    config = build.params.models[name]
    with _naming(name):
        model = build_model(config, build.params.seed)
        preprocessing = PreprocessorConfig.build(
            config.preprocessing,
            image_size=model.config.vision_config.image_size,
            patch_size=model.config.vision_config.patch_size,
            pooling_size=model.config.pooling_size,
            resize=VISION_ENCODERS[model.config.vision_encoder].resize,
            vocab_size=model.config.text_config.vocab_size,
            tokens_per_window=model.config.num_queries,
            patch_masks=model.config.padding_embedding != "none",
            equal_windows=model.model.vision_backbone.connector.equal_windows,
            selector=config.selector,
        )
        if config.checkpoint is not None:
            preprocessing = _as_the_weights_were_trained(name, preprocessing, Path(config.checkpoint))
    if config.selector is not None:
        _check_positions(name, preprocessing.tiling, model.config.text_config.max_position_embeddings)
    _check_padding(name, preprocessing.resize, model.config.padding_embedding)
    _check_extra_ids(name, preprocessing.special_ids, preprocessing.im_patch_id, model.config)
    step = build.out / Path(checkpoint_name(name, 0)).name
    model.save_pretrained(step)
    with _naming(name):
        processor = MolmoProcessor(Preprocessor(preprocessing, load_tokenizer(config.tokenizer)))
    processor.save_pretrained(step)
    write_text_atomic(step / "params.json", json.dumps(build.stamp["params"], indent=1, sort_keys=True) + "\n")
    summary: dict[str, Any] = {"step": 0, "parameters": parameter_counts(model)}
    write_manifest(step, schema=CHECKPOINT_SCHEMA, version=CHECKPOINT_VERSION, summary=summary, **build.stamp)
    return {"steps": [0], "parameters": summary["parameters"]}


def _as_the_weights_were_trained(name: str, config: "PreprocessorConfig", folder: Path) -> "PreprocessorConfig":
    """Takes from a checkpoint's preprocessor what the params cannot say, and prints in what else the two differ."""
    from dataclasses import asdict, replace

    from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig

    path = folder / CONFIG_FILE
    theirs = PreprocessorConfig.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
    config = replace(config, shifted_patch_masks=theirs.shifted_patch_masks)
    for field, value in asdict(config).items():
        if value != (other := asdict(theirs)[field]):
            print(f"assemble: models.{name}.preprocessing: {field} is {value} here, {other} in {folder}")
    return config


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of which model of the params an error is: the rooms that raise it know only its part."""
    from molmo_model.errors import MolmoError

    try:
        yield
    except MolmoError as error:
        raise type(error)(f"models.{name}: {error}") from error


def _check_padding(name: str, resize: str, padding_embedding: str) -> None:
    """A padding embedding marks the bars of letterboxed crops; squashed crops have none, and it would never be told
    anything."""
    from molmo_model.errors import ConfigError
    from molmo_model.preprocessing.image import RESIZE_METHODS

    if padding_embedding != "none" and not RESIZE_METHODS[resize].letterbox:
        raise ConfigError(
            f"models.{name}.connector.padding_embedding is {padding_embedding}, but resize {resize!r} leaves no "
            "padding; set preprocessing.resize to `default`, or padding_embedding to none"
        )


def _check_positions(name: str, tiling: Any, positions: int) -> None:
    """A selected token keeps its position in the whole view, so positions go far beyond the tokens of a sequence."""
    from molmo_model.errors import ConfigError
    from molmo_model.preprocessing.selection import longest_view

    if (longest := longest_view(tiling)) >= positions:
        raise ConfigError(
            f"models.{name}: an image has up to {longest} positions, however few tokens are selected, but the language "
            f"model {positions}; raise language.max_position_embeddings or lower preprocessing.max_crops"
        )


def _check_extra_ids(name: str, special_ids: dict[str, int], im_patch: int, config: Any) -> None:
    """The preprocessor's image tokens must be what the model takes them for."""
    from molmo_model.errors import ConfigError

    rows = config.text_config.vocab_size + config.extra_vocab_size
    if max(special_ids.values()) >= rows:
        raise ConfigError(
            f"models.{name}.language.extra_vocab_size is {config.extra_vocab_size}, "
            f"but there are {len(special_ids)} image tokens; raise it to at least that"
        )
    if im_patch != config.image_token_id:
        raise ConfigError(
            f"model {name}: <im_patch> is {im_patch} in the preprocessor, {config.image_token_id} in the model"
        )


def partitions(params: Any) -> list[dict[str, str]]:
    return [{"model": name} for name in params.models]


def fingerprints(params: Any, key: Key) -> dict[str, str]:
    """Digests of the tokenizer and the pretrained parts where they are folders here, else their hub ids."""
    from molmo_model.preprocessing.tokenizer import tokenizer_folder

    model = params.models[key["model"]]
    sources = {
        "checkpoint": model.checkpoint,
        "vision.pretrained": model.vision.pretrained,
        "language.pretrained": model.language.pretrained,
        "preprocessing.video.select_frames_by_query": model.preprocessing.video.select_frames_by_query,
    }
    folders = {name: Path(source) for name, source in sources.items() if source is not None}
    folder = tokenizer_folder(model.tokenizer)
    return {
        "tokenizer": model.tokenizer if folder is None else path_digest(folder),
        **{name: path_digest(path) if path.is_dir() else str(path) for name, path in folders.items()},
    }


STAGE = Stage(
    name="assemble",
    schema="molmo/checkpoints",
    version=1,
    keys=("model",),
    out="artifacts/checkpoints/{model}",
    params=("models.{model}", "seed"),
    build=build,
    partitions=partitions,
    fingerprints=fingerprints,
)

if __name__ == "__main__":
    main(STAGE)
