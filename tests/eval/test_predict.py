"""Stage 1 with a tiny random model: every item answered once, whatever is killed, batched or edited in between."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_model.config import EvalPrecision
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ArtifactError, CheckpointError
from molmo_model.eval import predictions, tasks
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor, batches
from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig
from pipelines import predict
from pipelines.stage import run
from tests.eval.synthetic import tiny_params as params

CHECKPOINT = "base/step-000000"
CELL = {"checkpoint": CHECKPOINT, "task": "scene_count"}


@pytest.fixture
def project(assembled, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(assembled, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Batches as they are asked, by number of questions; `stop_after` kills the stage in front of a later batch."""

    class Asked(list):
        stop_after = None

    log = Asked()
    answer = Predictor.answer

    def spy(self, questions, *settings):
        if log.stop_after is not None and len(log) >= log.stop_after:
            raise KeyboardInterrupt
        log.append(len(questions))
        return answer(self, questions, *settings)

    monkeypatch.setattr(Predictor, "answer", spy)
    return log


def rows():
    return predictions.read_predictions(predict.STAGE.target(CELL) / predictions.FILE)


def forget(folder, journal=False):
    """Throws away what the stage made, but not the journal unless told."""
    shutil.rmtree(folder / "artifacts" / "predictions", ignore_errors=True)
    for state in (folder / ".state" / "predict").iterdir():
        if journal or state.name != "journal":
            shutil.rmtree(state)


def test_every_item_has_one_row_in_index_order(project, asked):
    manifest = run(predict.STAGE, params(), **CELL)
    reader = ShardReader(project / "artifacts/shards/digit_scenes")
    items = tasks.items(params().tasks["scene_count"], "scene_count", reader)
    assert [row["id"] for row in rows()] == [item.id for item in items]
    assert [row["references"] for row in rows()] == [tasks.references(item) for item in items]
    assert manifest.summary == {
        "items": 8,
        "examples": 4,
        "cut_off": sum(r["finish_reason"] == "length" for r in rows()),
    }
    assert asked == [3, 3, 2]
    for row in rows():
        assert row["prompt"]
        assert row["tokens"] <= 5
        assert (row["finish_reason"] == "length") == (row["tokens"] == 5)


def test_a_second_run_asks_nothing(project, asked):
    first = run(predict.STAGE, params(), **CELL)
    forget(project)
    assert run(predict.STAGE, params(), **CELL) == first
    assert len(asked) == 3


def test_a_killed_run_goes_on_where_it_was(project, asked):
    asked.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        run(predict.STAGE, params(), **CELL)
    assert not predict.STAGE.target(CELL).exists()
    asked.stop_after = None
    killed = run(predict.STAGE, params(), **CELL)
    assert asked == [3, 3, 2]
    forget(project, journal=True)
    assert run(predict.STAGE, params(), **CELL) == killed


def test_a_torn_journal_is_repaired_and_reported(project, asked, capsys):
    whole = run(predict.STAGE, params(), **CELL)
    forget(project)
    (journal,) = (project / ".state/predict/journal").rglob("*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-5])
    assert run(predict.STAGE, params(), **CELL) == whole
    assert asked == [3, 3, 2, 1]
    assert f"{journal.relative_to(project)}:8: torn last line" in capsys.readouterr().out


def test_answers_do_not_depend_on_the_batch(project, asked):
    found = {}
    for size in (1, 3, 64):
        settings = params()
        settings.runtime.eval_batch_size = size
        run(predict.STAGE, settings, **CELL)
        found[size] = rows()
        forget(project, journal=True)
    assert found[1] == found[3] == found[64]
    assert sum(asked) == 3 * len(found[1])


def test_what_cannot_change_an_answer_asks_nothing_again(project, asked, tmp_path, monkeypatch):
    run(predict.STAGE, params(), **CELL)
    settings = params()
    settings.tasks["scene_count"].metric = "exact_match"  # part of the stage's params, not of any answer
    settings.runtime.eval_batch_size = 1
    assert run(predict.STAGE, settings, **CELL).params != run(predict.STAGE, params(), **CELL).params
    shutil.move(project, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget(Path.cwd())
    run(predict.STAGE, params(), **CELL)
    assert len(asked) == 3


def test_what_can_change_an_answer_asks_again(project, asked):
    run(predict.STAGE, params(), **CELL)
    settings = params()
    settings.tasks["scene_count"].max_new_tokens = 6
    run(predict.STAGE, settings, **CELL)
    assert len(asked) == 6
    settings.eval.precision = EvalPrecision.bf16
    run(predict.STAGE, settings, **CELL)
    assert len(asked) == 9


def test_weights_that_are_not_those_of_the_manifest_are_refused(project):
    weights = project / "artifacts/checkpoints" / CHECKPOINT / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors has SHA-256"):
        run(predict.STAGE, params(), **CELL)


def test_answers_equal_those_of_a_plain_loop_over_logits(project):
    predictor = Predictor.load(f"artifacts/checkpoints/{CHECKPOINT}")
    reader = ShardReader("artifacts/shards/digit_scenes")
    items = tasks.items(params().tasks["scene_qa"], "scene_qa", reader)[:3]
    questions = [Question(reader.read(item.row), item.conversation) for item in items]
    for question, answer in zip(questions, predictor.answer(questions, 4), strict=True):
        prompt = predictor.preprocessor.encode_prompt(question.example, question.conversation)
        ids, images = prompt.input_ids.tolist(), prompt.image_ids.tolist()
        said = []
        while len(said) < 4:
            with torch.no_grad():
                output = predictor.model(
                    input_ids=torch.tensor([ids]),
                    image_ids=torch.tensor([images]),
                    pixel_values=torch.from_numpy(prompt.pixels),
                    pooling=torch.from_numpy(prompt.pooling),
                )
            token = int(output.logits[0, -1].argmax())
            if token == predictor.preprocessor.eos_id:
                break
            said.append(token)
            ids.append(token)
            images.append(0)
        assert answer.text == predictor.preprocessor.decode(said)
        assert (answer.tokens, answer.prompt_tokens) == (len(said), len(prompt))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Predictor.load(tmp_path)


def test_a_damaged_model_is_refused(project):
    """transformers would draw a tensor that is missing at random."""
    folder = project / "artifacts" / "checkpoints" / CHECKPOINT
    weights = folder / "model.safetensors"
    whole, state = weights.read_bytes(), load_file(weights)
    name = next(name for name in state if "q_proj.weight" in name)
    weights.unlink()  # perhaps a link to a file that others share
    save_file({other: value for other, value in state.items() if other != name}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lack 1 of the model's tensors.*{name}"):
        Predictor.load(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Predictor.load(folder)


def test_batches_hold_every_index_once_and_start_with_the_most_expensive():
    costs = [(5, 1), (9, 1), (5, 2), (7, 1), (9, 1)]
    assert list(batches(costs, 2)) == [[1, 4], [3, 2], [0]]
    assert list(batches([], 2)) == []


def test_help_and_answers_from_the_journal_need_no_torch(project):
    run(predict.STAGE, params(), **CELL)
    forget(project)
    code = (
        "import sys; from pipelines import predict\n"
        "early = {'numpy', 'pyarrow', 'torch', 'transformers'} & set(sys.modules)\n"
        "if early: sys.exit(f'imported {early} with the stage')\n"
        "from pipelines.stage import run; from tests.eval.test_predict import CELL, params\n"
        "for name in ('torch', 'transformers'): sys.modules.pop(name, None)\n"
        "sys.modules['molmo_model.eval.inference'] = None\n"
        "run(predict.STAGE, params(), **CELL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_model_that_chooses_frames_asks_again(project, asked, monkeypatch):
    """A checkpoint names that model and does not hold it, so its files count by themselves."""
    scorer = project / "scorer"
    scorer.mkdir()
    (scorer / "model.safetensors").write_bytes(b"one")
    config_file = project / "artifacts/checkpoints" / CHECKPOINT / CONFIG_FILE
    config = PreprocessorConfig.from_json(json.loads(config_file.read_text()), "test")
    video = dataclasses.replace(config.video, high_res_every=2, select_frames_by_query=str(scorer))
    monkeypatch.setattr(predict, "_preprocessor_config", lambda folder: dataclasses.replace(config, video=video))
    run(predict.STAGE, params(), **CELL)
    forget(project)
    run(predict.STAGE, params(), **CELL)
    assert len(asked) == 3
    (scorer / "model.safetensors").write_bytes(b"two")
    forget(project)
    run(predict.STAGE, params(), **CELL)
    assert len(asked) == 6
