"""Which engine answers: what `eval.engine` stands for at a checkpoint and a task. No torch here.

`auto` is decided by the checkpoint and the task's settings alone, never by the machine: a colleague with other hardware
finds the same keys in the journal.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molmo_model.config import Engine, EvalConfig, Quantization, TaskConfig, TaskKind
from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Asking
from molmo_model.eval.chat_messages import unsendable
from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE

MODULES = {
    Engine.slots.value: "molmo_model.eval.slot_inference",
    Engine.generate.value: "molmo_model.eval.inference",
    Engine.openai.value: "molmo_model.eval.served",
}
"""The sources of an engine are part of every answer's key."""
SLOT_FAMILIES = frozenset({"llama", "qwen2", "qwen3", "olmo", "olmo2", "olmo3", "olmoe"})
"""`model_type` of the language models whose layers the slots can run."""


def resolved(evaluation: EvalConfig, task: TaskConfig, folder: Path) -> Engine:
    """The engine that `eval.engine` stands for.

    Args:
        folder: the checkpoint's.

    Raises:
        ConfigError: the slots, or a server, are asked for by name and cannot do it; says why.
    """
    if evaluation.engine is Engine.openai and (why_not := served_refuses(evaluation, task)) is not None:
        raise ConfigError(f"eval.engine openai: {why_not}")
    if evaluation.engine not in (Engine.auto, Engine.slots):
        return evaluation.engine
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    preprocessor = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    why_not = slots_refuse(config, preprocessor, task, evaluation.quantization)
    if why_not is None:
        return Engine.slots
    if evaluation.engine is Engine.slots:
        raise ConfigError(f"eval.engine slots: {why_not}; take generate, or auto, which does where it must")
    return Engine.generate


def served_refuses(evaluation: EvalConfig, task: TaskConfig) -> str | None:
    """Why the engine `openai` cannot answer; None where it can."""
    asking = Asking(
        task.max_new_tokens,
        task.decoding,
        task.keep_image_tokens,
        measure=task.kind is TaskKind.loss,
        max_crops=task.max_crops,
        max_frames=task.max_frames,
    )
    if not evaluation.served_model:
        return "eval.served_model is missing, the name that the server calls the model by"
    if evaluation.quantization is not Quantization.none:
        return f"eval.quantization {evaluation.quantization.value} is up to the server; leave it out"
    reasons = unsendable(asking)
    return f"a server cannot be asked for {', '.join(reasons)}; take another engine" if reasons else None


def slots_refuse(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    task: TaskConfig,
    quantization: Quantization = Quantization.none,
) -> str | None:
    """Why the engine `slots` cannot answer; None where it can.

    Args:
        config: the checkpoint's `config.json`.
        preprocessor: its preprocessor's file.
    """
    decoding, family = task.decoding, config.get("text_config", {}).get("model_type")
    reasons = {
        "losses are measured, not answered": task.kind is not TaskKind.answer,
        "the checkpoint selects its image tokens (HeMolmo)": config.get("selector") is not None,
        f"a language model of type {family} is none of {', '.join(sorted(SLOT_FAMILIES))}": family not in SLOT_FAMILIES,
        "a model chooses the frames of films (video.select_frames_by_query)": bool(
            (preprocessor.get("video") or {}).get("select_frames_by_query")
        ),
        f"keep_image_tokens is {task.keep_image_tokens}": task.keep_image_tokens != 1,
        f"decoding.num_beams is {decoding.num_beams}": decoding.num_beams != 1,
        "decoding.do_sample is true": decoding.do_sample,
        f"decoding.repetition_penalty is {decoding.repetition_penalty}": decoding.repetition_penalty != 1,
        f"decoding.no_repeat_ngram_size is {decoding.no_repeat_ngram_size}": decoding.no_repeat_ngram_size != 0,
        f"decoding.min_new_tokens is {decoding.min_new_tokens}": decoding.min_new_tokens != 0,
        f"quantization is {quantization.value}": quantization is not Quantization.none,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
