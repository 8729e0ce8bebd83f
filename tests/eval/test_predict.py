"""Stage 1 with a tiny random model: every item answered once, whatever is killed, batched or edited in between."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo_model.config import EvalPrecision, to_dict
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ArtifactError, CheckpointError, ConfigError
from molmo_model.eval import predictions, tasks
from molmo_model.eval.answering import Question
from molmo_model.eval.inference import Predictor, batches
from molmo_model.eval.journal import read_lines
from molmo_model.eval.ranks import Job
from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig
from pipelines import journal, predict, predict_rank, score
from pipelines.stage import main, run, run_all
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
    (path,) = (project / ".state/predict/journal").rglob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    assert run(predict.STAGE, params(), **CELL) == whole
    assert asked == [3, 3, 2, 1]
    assert f"{path.relative_to(project)}:9: torn last line" in capsys.readouterr().out


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
    settings.tasks["scene_count"].metric = "exact_match"  # scoring's
    settings.tasks["scene_count"].gate.minimum = 0.5
    settings.runtime.eval_batch_size = 1
    assert run(predict.STAGE, settings, **CELL).params == run(predict.STAGE, params(), **CELL).params
    settings.tasks["scene_count"].max_examples = 8  # all there are: part of the stage's params, not of any answer
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


def written():
    """Answers in all files of the journal, with those that a later one has replaced."""
    files = Path(".state/predict/journal").rglob("*.jsonl")
    return [line.entry for path in files for line in read_lines(path) if line.entry is not None]


class InThisProcess:
    """Ranks without processes: each job takes the way through its file."""

    def run(self, jobs, poll):
        for number, job in enumerate(jobs):
            job.write(Path(f"job-{number}.json"))
            assert Job.read(Path(f"job-{number}.json")) == job
            predict_rank.work(Job.read(Path(f"job-{number}.json")))
            poll()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_questions_and_the_artefact_is_the_same(ranks, project, asked, monkeypatch):
    whole = run(predict.STAGE, params(), **CELL)
    forget(project, journal=True)
    del asked[:]
    monkeypatch.setattr(predict, "_processes", lambda count, gpus: InThisProcess())
    settings = params()
    settings.runtime.eval_ranks = ranks
    assert run(predict.STAGE, settings, **CELL) == whole
    assert sum(asked) == len(written()) == 8
    files = {path.stem: len(list(read_lines(path))) for path in Path(".state/predict/journal").rglob("*.rank-*.jsonl")}
    assert files.keys() == {f"scene_count.rank-{rank}" for rank in range(ranks)}
    assert all(files.values())
    assert {entry.made["ranks"] for entry in written()} == {ranks}


def test_parts_fill_the_journal_and_a_plain_run_finds_all(project, asked):
    whole = run(predict.STAGE, params(), **CELL)
    forget(project, journal=True)
    write_params()
    del asked[:]
    for part in ("2/2", "1/2"):
        predict.fill_part([f"part={part}", "task=scene_count"])
        assert not predict.STAGE.target(CELL).exists()
    assert sum(asked) == 8
    assert run(predict.STAGE, params(), **CELL) == whole
    assert sum(asked) == 8
    predict.fill_part(["part=1/2", "task=scene_count"])  # once more: nothing is left
    assert sum(asked) == 8


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", ""])
def test_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="is no part"):
        predict.read_part(text)


def test_overwriting_asks_again_and_keeps_the_history(project, asked):
    first = run(predict.STAGE, params(), **CELL)
    ((_, again),) = run_all(predict.STAGE, params(), CELL, overwrite=True)
    assert again == first
    assert sum(asked) == 16
    assert sorted(entry.turn for entry in written()) == [0] * 8 + [1] * 8
    assert run(predict.STAGE, params(), **CELL) == first
    assert sum(asked) == 16


def test_the_newer_answer_counts_in_every_later_run(project, asked, monkeypatch):
    run(predict.STAGE, params(), **CELL)
    answer = Predictor.answer
    monkeypatch.setattr(Predictor, "answer", lambda *of: [dataclasses.replace(one, text="new") for one in answer(*of)])
    run_all(predict.STAGE, params(), CELL, overwrite=True)
    assert {row["prediction"] for row in rows()} == {"new"}
    forget(project)
    run(predict.STAGE, params(), **CELL)
    assert {row["prediction"] for row in rows()} == {"new"}
    assert sum(asked) == 16


def test_an_overwrite_that_was_interrupted_goes_on(project, asked):
    run(predict.STAGE, params(), **CELL)
    asked.stop_after = 4  # after the first batch of three
    with pytest.raises(KeyboardInterrupt):
        run_all(predict.STAGE, params(), CELL, overwrite=True)
    asked.stop_after = None
    run_all(predict.STAGE, params(), CELL, overwrite=True)  # the same command, which does not begin anew
    assert asked == [3, 3, 2, 3, 3, 2]
    asked.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        run_all(predict.STAGE, params(), CELL, overwrite=True)
    asked.stop_after = None
    run(predict.STAGE, params(), **CELL)  # nor does a plain run forget it
    assert asked == [3, 3, 2] * 3
    assert sorted(entry.turn for entry in written()) == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("words", [["overwrite=true"], ["--overwrite"], ["overwrite=false"], []])
def test_the_command_line_overwrites_on_request(words, project, asked):
    run(predict.STAGE, params(), **CELL)
    write_params()
    main(predict.STAGE, ["task=scene_count", *words])
    assert sum(asked) == (16 if words and "false" not in words[0] else 8)


@pytest.mark.parametrize("words", [["overwrite=yes"], ["overwrite=true", "--overwrite"], ["overwrite="]])
def test_half_a_request_is_refused(words, project, capsys):
    write_params()
    with pytest.raises(SystemExit):
        main(predict.STAGE, ["task=scene_count", *words])
    assert "overwrite" in capsys.readouterr().err


def test_the_journal_knows_what_the_params_need(project):
    run(predict.STAGE, params(), **CELL)
    keys, unknown = journal.needed(params())
    assert {entry.key for entry in written()} < keys
    assert not unknown
    shutil.rmtree("artifacts/checkpoints")
    assert journal.needed(params()) == (set(), {(CHECKPOINT, task) for task in params().tasks})


def test_scoring_anew_asks_nothing(project, asked, monkeypatch):
    run(predict.STAGE, params(), **CELL)
    first = run(score.STAGE, params(), **CELL)
    built = []
    stage = dataclasses.replace(score.STAGE, build=lambda build: built.append(build) or score.STAGE.build(build))
    assert run_all(stage, params(), CELL) == [(CELL, first)]
    assert not built
    assert run_all(stage, params(), CELL, overwrite=True) == [(CELL, first)]
    assert len(built) == 1
    assert asked == [3, 3, 2]


def test_predictions_do_not_depend_on_what_scores_them():
    """An edit of a metric must not touch a single answer."""
    from molmo_model.source_digest import source_closure

    names = [path.as_posix() for path in source_closure("pipelines.predict")]
    assert not [name for name in names if "eval/metrics" in name or "scoring" in name or "report" in name]


def write_params():
    Path("params.yaml").write_text(json.dumps(to_dict(params())))


def command(*words):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "pipelines.predict", "checkpoint=base/step-000000", "task=scene_count", *words]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_killed_for_real_it_asks_only_what_is_missing(project, asked):
    write_params()
    slowly = ("runtime.eval_batch_size=1", "tasks.scene_count.max_new_tokens=200")
    process = command(*slowly)
    while process.poll() is None and len(written_so_far()) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = written_so_far()
    assert 3 <= len(kept) < 8, process.stdout.read()
    settings = params()
    settings.runtime.eval_batch_size = 1
    settings.tasks["scene_count"].max_new_tokens = 200
    resumed = run(predict.STAGE, settings, **CELL)
    assert sum(asked) == 8 - len(kept)
    resumed_bytes = (predict.STAGE.target(CELL) / predictions.FILE).read_bytes()
    forget(project, journal=True)
    assert run(predict.STAGE, settings, **CELL) == resumed
    assert (predict.STAGE.target(CELL) / predictions.FILE).read_bytes() == resumed_bytes


def written_so_far():
    """Keys of whole lines; a line in the middle of being written is none."""
    return {entry.key for entry in written()}


@pytest.mark.slow
def test_processes_of_their_own_give_the_same_artefact(project):
    write_params()
    process = command("runtime.eval_ranks=2")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    ranked = (predict.STAGE.target(CELL) / predictions.FILE).read_bytes()
    assert {entry.made["ranks"] for entry in written()} == {2}
    assert len(list(Path(".state/predict/journal").rglob("*.rank-*.jsonl"))) == 2
    forget(project, journal=True)
    run(predict.STAGE, params(), **CELL)
    assert (predict.STAGE.target(CELL) / predictions.FILE).read_bytes() == ranked
