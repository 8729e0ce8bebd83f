"""Stage 1 of evaluation: asks one checkpoint the questions of one task and writes its answers.

Answers are journalled as they come, under a key of everything that can change them, so a killed run goes on where it
was, and an answer that any earlier run gave to the same question is not computed again. The only evaluation stage that
needs torch, and only when something is left to ask.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stage import Build, Stage, main, state_root

if TYPE_CHECKING:
    from molmo_model.artifacts import Manifest
    from molmo_model.config import EvalPrecision, Quantization, TaskConfig
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval.inference import Predictor
    from molmo_model.eval.journal import Journal
    from molmo_model.eval.tasks import Item
    from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig


def journals() -> Path:
    """The store of answers that all builds of this stage share: not the state of one of them."""
    return state_root() / "predict" / "journal"


def journal_folder(checkpoint: "Manifest") -> Path:
    """Where the answers of a checkpoint's weights are journalled."""
    from molmo_model.eval.journal import weights_digest

    return journals() / weights_digest(checkpoint)[:20]


def decoding_identity(task: "TaskConfig", quantization: "Quantization") -> dict[str, Any]:
    """All settings of a task and of the evaluation that can change an answer, for the journal's key."""
    from molmo_model.config import to_dict

    return {
        **to_dict(task.decoding),
        "max_new_tokens": task.max_new_tokens,
        "keep_image_tokens": task.keep_image_tokens,
        "quantization": quantization.value,
    }


def build(stage: Build) -> dict[str, Any]:
    """Fills the artefact with `predictions.jsonl` and the training references."""
    from molmo_model.artifacts import read_manifest, verify_file
    from molmo_model.config import lookup
    from molmo_model.data.schemas import check_table
    from molmo_model.data.shard_reader import ShardReader
    from molmo_model.eval import predictions, tasks
    from molmo_model.eval.journal import Journal, identity_of
    from molmo_model.eval.metrics import METRICS
    from molmo_model.source_digest import source_digest

    name, folder = stage.key["task"], stage.inputs["checkpoint"]
    lookup(METRICS, stage.params.tasks[name].metric, f"metric of tasks.{name}.metric")  # before hours of answers
    task, precision = stage.params.tasks[name], stage.params.eval.precision
    checkpoint = read_manifest(folder, "molmo/checkpoint")
    reader = ShardReader(stage.inputs["shards"])
    asked = tasks.items(task, name, reader)
    prompts = _prompts(folder, asked)
    decoding = decoding_identity(task, stage.params.eval.quantization) | _frame_scorer(folder)
    identity = identity_of(checkpoint, source_digest("molmo_model.eval.inference"), decoding, precision.value)
    keys = [identity.key(item.images, prompt) for item, prompt in zip(asked, prompts, strict=True)]
    with Journal(journal_folder(checkpoint), name) as journal:
        for problem in journal.problems:
            print(f"predict: journal: {problem}")
        missing = [index for index, key in enumerate(keys) if journal.get(key) is None]
        if missing:
            for file, entry in checkpoint.files.items():
                if "/" not in file:
                    verify_file(folder / file, entry)
            _ask(stage, journal, [asked[index] for index in missing], [keys[index] for index in missing], reader)
        answers = [journal.get(key) or {} for key in keys]
    rows = [
        _row(item, prompt, answer, task.dataset) for item, prompt, answer in zip(asked, prompts, answers, strict=True)
    ]
    check_table(rows, "predictions")
    predictions.write_jsonl(stage.out / predictions.FILE, rows)
    predictions.write_jsonl(stage.out / predictions.TRAINING_FILE, tasks.training_references(task, reader))
    cut = sum(row["finish_reason"] == "length" for row in rows)
    return {"items": len(rows), "examples": len({row["example_id"] for row in rows}), "cut_off": cut}


def _prompts(folder: Path, asked: "Sequence[Item]") -> list[list[str]]:
    """Per item the texts of its turns, before the answer, as the checkpoint's preprocessor writes them."""
    from molmo_model.preprocessing import prompts

    form = _preprocessor_config(folder).prompts
    return [prompts.asked(item.asked, form) for item in asked]


def _preprocessor_config(folder: Path) -> "PreprocessorConfig":
    """How a checkpoint turns an example into its inputs."""
    import json

    from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig

    path = folder / CONFIG_FILE
    return PreprocessorConfig.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))


def _frame_scorer(folder: Path) -> dict[str, str]:
    """The files of the model that chooses the frames of films, which a checkpoint names and does not hold. One of the
    hub counts by its name, which is in the preprocessor's file."""
    from molmo_model.artifacts import path_digest

    source = Path(_preprocessor_config(folder).video.select_frames_by_query or "")
    if source == Path() or not source.is_dir():
        return {}
    return {"frame_scorer": path_digest(source)}


@lru_cache(maxsize=1)
def _predictor(folder: Path, digest: str, precision: "EvalPrecision", quantization: "Quantization") -> "Predictor":
    """The model of a checkpoint, kept for its next task; `digest` tells a checkpoint from another in its place."""
    from molmo_model.eval.inference import Predictor

    return Predictor.load(folder, precision, quantization=quantization)


def _ask(stage: Build, journal: "Journal", asked: "Sequence[Item]", keys: Sequence[str], reader: "ShardReader") -> None:
    """Computes the missing answers and journals them batch by batch."""
    from dataclasses import asdict
    from itertools import islice

    from tqdm import tqdm

    from molmo_model.eval.answering import Asking, Question

    task, evaluation = stage.params.tasks[stage.key["task"]], stage.params.eval
    digest = stage.stamp["inputs"]["checkpoint"]
    predictor = _predictor(stage.inputs["checkpoint"], digest, evaluation.precision, evaluation.quantization)
    predictor.batch_size = stage.params.runtime.eval_batch_size
    made = {**predictor.made, "ranks": 1, "checkpoint": stage.key["checkpoint"]}
    asking = Asking(task.max_new_tokens, task.decoding, task.keep_image_tokens)
    light = [Question(item.example, item.conversation) for item in asked]

    def read(index: int) -> Question:
        return Question(reader.read(asked[index].row), asked[index].conversation)

    with tqdm(total=len(asked), desc=" ".join(stage.key.values()), unit="answer", mininterval=0.5) as bar:
        answers = predictor.answers(light, read, asking)
        while batch := list(islice(answers, predictor.batch_size)):
            journal.append([(keys[index], asdict(answer)) for index, answer in batch], made)
            bar.update(len(batch))


def _row(item: "Item", prompt: Sequence[str], answer: dict[str, Any], dataset: str) -> dict[str, Any]:
    """One row of `predictions.jsonl`."""
    from molmo_model.eval.tasks import references

    return {
        "id": item.id,
        "example_id": item.example.id,
        "conversation": item.conversation,
        "style": item.asked.style,
        "prompt": "".join(prompt),
        "prediction": answer["text"],
        "references": references(item),
        "finish_reason": answer["finish_reason"],
        "tokens": answer["tokens"],
        "prompt_tokens": answer["prompt_tokens"],
        "image": {"dataset": dataset, "row": item.row, "sha256": list(item.images)},
    }


def _inputs(params: Any, key: Any) -> dict[str, str]:
    return {
        "checkpoint": f"artifacts/checkpoints/{key['checkpoint']}",
        "shards": f"artifacts/shards/{params.tasks[key['task']].dataset}",
    }


STAGE = Stage(
    name="predict",
    schema="molmo/predictions",
    version=1,
    keys=("checkpoint", "task"),
    out="artifacts/predictions/{checkpoint}/{task}",
    params=("eval.precision", "eval.quantization", "tasks.{task}"),
    build=build,
    partitions=lambda params: [
        {"checkpoint": checkpoint, "task": task} for checkpoint, task in product(params.eval.checkpoints, params.tasks)
    ],
    inputs=_inputs,
)

if __name__ == "__main__":
    main(STAGE)
