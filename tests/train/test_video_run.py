"""A VideoOlmo from two clips in a JSONL to a trained checkpoint that answers: the whole way, by the real stages."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, SiglipConfig, SiglipModel

from molmo_model.config import load_params, to_dict
from molmo_model.data.mixture import Mixture
from molmo_model.data.shard_reader import ShardReader
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor
from molmo_model.eval.tasks import items
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.train.job import Job
from molmo_model.train.worker import build_trainer
from pipelines import assemble, mixture, shards
from pipelines.stage import run, stamp
from pipelines.train import STAGE
from tests.data.films import film, real_film
from tests.train.conftest import PARAMS, Never

VIDEO = {
    "max_frames": 5,
    "sampling": "fps_uniform",
    "random_sampling": True,
    "pooling_size": [4, 4],
    "high_res_every": 3,
    "temporal_position_embedding": True,
    "temporal_attention_layers": 1,
    "frames_per_batch": 2,
}


def rows() -> list[dict[str, Any]]:
    """Two films, several clips and questions of each."""

    def row(name: str, question: str, answer: str, **fields: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"id": name, "messages": turns, **fields}

    made = [
        row(f"bike-{n}", "What moves?", "A bike.", video="bikes.mp4", clip_start=float(n), clip_end=n + 2.5)
        for n in range(4)
    ]
    made += [row(f"number-{n}", "Which number?", f"{n}", video="numbers.mkv", clip_start=n / 2) for n in range(4)]
    return [*made, row("both", "Which is longer?", "The first.", videos=["bikes.mp4", "numbers.mkv"])]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP with random weights as transformers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 600, "projection_size": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    model = SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained("molmo_model/preprocessing/tokenizers/bytes512")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def prepare(folder: Path, **video: Any) -> Any:
    """Params, first weights, shards and mixture of a run over the films."""
    (folder / "films").mkdir(parents=True)
    (folder / "films" / "bikes.mp4").write_bytes(real_film("bikes.mp4"))
    ticks = [0, 40, 41, 600, 640, 1800, 1850, 3000, 3100, 3101]
    (folder / "films" / "numbers.mkv").write_bytes(film(ticks, (1, 1000), "matroska"))
    (folder / "films" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    params = copy.deepcopy(PARAMS)
    params["datasets"] = {"clips": {"family": "chat", "path": "films/rows.jsonl", "eval_fraction": 0.0}}
    model, going = params["models"]["tiny"], params["runs"]["go"]
    model["connector"]["window_position_embedding"] = False
    model["preprocessing"]["video"] = {**VIDEO, **video}
    going["mixture"] = {"clips": {"dataset": "clips"}}
    going["train"] |= {"steps": 2, "save_every": 2, "packs_per_step": 2, "processes": 1, "crops_per_pack": 24}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with contextlib.chdir(folder):
        settings = load_params()
        run(assemble.STAGE, settings, model="tiny")
        run(shards.STAGE, settings, dataset="clips")
        run(mixture.STAGE, settings, run="go")
    return settings


def trainer_of(settings: Any, ranks: Any) -> Any:
    job = Job(
        run="go",
        params=to_dict(settings),
        inputs=STAGE.inputs(settings, {"run": "go"}),
        out="a/out",
        work="a/work",
        stamp=stamp(STAGE, settings, {"run": "go"}),
        resume=None,
        timings="a/timings.jsonl",
    )
    job.write()
    return build_trainer(job, settings, ranks, Never())[0]


@pytest.mark.slow
def test_two_films_become_a_model_that_answers(tmp_path, one_rank, monkeypatch):
    monkeypatch.chdir(Path.cwd())
    settings = prepare(tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    reader = ShardReader("artifacts/shards/clips")
    assert len(reader) == 9 and len({name for row in reader.files() for name in row}) == 2
    planned = Mixture.load("artifacts/mixture/go")
    preprocessor = Preprocessor.from_pretrained("artifacts/checkpoints/tiny/step-000000")
    (entry,) = planned.entries
    for place, number in enumerate(entry.rows.tolist()):
        example = reader.read(number)
        encoded = preprocessor.encode(example)
        drawn = preprocessor.encode(example, rng=_generator(number))
        assert entry.crops[place] == len(encoded.pixels) == len(drawn.pixels)
        assert max(len(encoded), len(drawn)) <= entry.tokens[place] + entry.conversation_tokens[place]
    trainer = trainer_of(settings, one_rank)
    before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    batch = trainer.batches.step(1)[0]
    assert {"crop_frames", "crop_videos"} <= set(batch)
    assert trainer.fit(0) == 2
    moved = {
        name for name, tensor in trainer.model.named_parameters() if not torch.equal(_full(tensor), _full(before[name]))
    }
    assert any("temporal.layers.0.o_proj" in name for name in moved) and any(
        "temporal.positions" in name for name in moved
    )
    (saved,) = Path("a/out").glob("step-000002")
    predictor = Predictor.load(saved, device="cpu")
    questions = [Question(reader.read(row)) for row in range(len(reader))]
    together = predictor.answer(questions, 6)
    assert [answer.prompt_tokens for answer in together] == [
        len(predictor.preprocessor.encode_prompt(question.example)) for question in questions
    ]
    for question, answer in zip(questions, together, strict=True):
        assert predictor.answer([question], 6)[0] == answer
        tokens, crops = predictor.cost(question)
        encoded = predictor.preprocessor.encode(question.example)
        assert (tokens, crops) == (len(encoded), len(encoded.pixels))
    shown = next(items(_task("clips"), "t", reader).__iter__())
    assert len(shown.images) == 1 and len(shown.images[0]) == 64 and shown.example.videos[0].data == b"\0"


def _generator(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _task(dataset: str) -> Any:
    from molmo_model.config import TaskConfig

    return TaskConfig(dataset=dataset, metric="em", split="train")


@pytest.mark.slow
def test_the_question_chooses_frames_in_training_and_in_answers(tmp_path, one_rank, monkeypatch, siglip):
    settings = prepare(tmp_path / "w", select_frames_by_query=str(siglip), random_sampling=False)
    monkeypatch.chdir(tmp_path / "w")
    trainer = trainer_of(settings, one_rank)
    assert trainer.fit(0) == 2
    (saved,) = Path("a/out").glob("step-000002")
    predictor = Predictor.load(saved, device="cpu")
    example = next(ex for ex in map(ShardReader("artifacts/shards/clips").read, range(9)) if ex.id == "bike-0")
    asked = [_asked(example, text) for text in ("What moves?", "a red car", "zebra", "how many wheels are there", "!")]
    fine = [tuple(predictor.preprocessor.encode_prompt(one).image_token_counts.tolist()) for one in asked]
    assert len(set(fine)) > 1 and all(sorted(one) == sorted(fine[0]) for one in fine)
    together = predictor.answer([Question(one) for one in asked], 6)
    for one, answer in zip(asked, together, strict=True):
        assert predictor.answer([Question(one)], 6)[0] == answer
    plain = Preprocessor.from_pretrained(saved)
    with pytest.raises(Exception, match="has no frame_scorer"):
        plain.encode(example)


def _asked(example: Any, text: str) -> Any:
    from dataclasses import replace

    from molmo_model.data.example import Conversation, Message

    return replace(example, conversations=(Conversation("chat", (Message("user", text), Message("assistant", "?"))),))
