"""Files for test servers: the published forms, the metric's reading of answers, and refusals; sets without public
answers are predicted and scored without a number."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from molmo_model.artifacts import write_manifest
from molmo_model.benchmarks import BENCHMARKS
from molmo_model.config import DatasetConfig, TaskConfig, TaskKind, params_from_dict, to_dict
from molmo_model.data.datasets import FAMILIES
from molmo_model.data.example import Example
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval import predictions, submissions, tasks
from molmo_model.eval.fitting import check_task
from molmo_model.eval.metrics.answers import short_answer
from pipelines import predict, report, score, scorecard, submit
from pipelines.stage import run
from tests.data.snapshots import hub_image
from tests.eval import published_sets
from tests.eval.synthetic import tiny_params

CHECKPOINT = "base/step-000000"


def row(name, said, **metadata):
    return {"id": f"{name}#0", "prediction": said, "references": {"metadata": {"question_id": name} | metadata}}


def test_answers_are_read_as_the_metric_reads_them():
    """The vote of several lines comes before the file too."""
    said = {70: "two cups", 7: "net\nNet\nnet", 123: "I see it.\nAnswer: red bus", 9: "  \n"}
    rows = [row(name, text) for name, text in said.items()]
    made = submissions.submission(rows, submissions.FORMATS["vqa"], len(rows))
    assert json.loads(made.text) == [{"question_id": name, "answer": short_answer(said[name])} for name in sorted(said)]
    assert json.loads(made.text)[0]["answer"] == "net"
    assert (made.answers, made.empty) == (4, 1)


def test_the_published_forms():
    rows = [row("12", "8/1/93"), row("7", "a")]
    made = submissions.submission(rows, submissions.FORMATS["doc_vqa"], 2)
    assert json.loads(made.text) == [{"questionId": 7, "answer": "a"}, {"questionId": 12, "answer": "8/1/93"}]
    direct = submissions.submission([row("22Mex", "bus")], submissions.FORMATS["a_okvqa_da"], None)
    assert json.loads(direct.text) == {"22Mex": {"direct_answer": "bus"}}
    options = {"options": ["cab", "bus"]}
    chosen = submissions.submission(
        [row("b", "B", **options), row("a", "the cab", **options), row("c", "none", **options)],
        submissions.FORMATS["a_okvqa_mc"],
        3,
    )
    wanted = {"a": "cab", "b": "bus", "c": ""}
    assert json.loads(chosen.text) == {name: {"multiple_choice": said} for name, said in wanted.items()}
    assert chosen.empty == 1
    assert {one.submission for one in BENCHMARKS.values()} - {None} <= set(submissions.FORMATS)
    assert set(submissions.QUESTIONS) == {name for name, one in BENCHMARKS.items() if one.submission}


@pytest.mark.parametrize(("rows", "wanted", "message"), [
    ([row(1, "a"), row(1, "b")], 2, "1 question ids have several answers, such as '1'"),
    ([row(1, "a")], 2, "1 answers, but the set has 2 questions"),
    ([row(None, "a")], 1, "question_id None"),
    ([row("", "a")], 1, "question_id ''"),
    ([row("x7", "a")], 1, "'x7' is no whole number"),
])  # fmt: skip
def test_what_a_server_would_refuse_is_refused_here(rows, wanted, message):
    with pytest.raises(EvaluationError, match=message):
        submissions.submission(rows, submissions.FORMATS["vqa"], wanted)


def test_a_choice_needs_choices():
    with pytest.raises(EvaluationError, match="has no options"):
        submissions.submission([row("a", "A")], submissions.FORMATS["a_okvqa_mc"], 1)


PRIVATE = {
    "vqa_v2_test": {"image_id": 7, "question_id": 70, "question": "What?", "image": hub_image(1), "answers": None},
    "text_vqa_test": {"image_id": "a", "question_id": 70, "question": "What?", "image": hub_image(1), "answers": []},
    "doc_qa_test": {"questionId": 70, "question": "What?", "image": hub_image(1), "answers": None},
    "info_qa_test": {"questionId": "70", "question": "What?", "image": hub_image(1), "answers": None},
    "a_okvqa_da_test": {"question_id": "70", "question": "What?", "image": hub_image(1), "direct_answers": None}
    | {"difficult_direct_answer": False},
    "a_okvqa_mc_test": {"question_id": "70", "question": "What?", "image": hub_image(1), "choices": ["cab", "bus"]}
    | {"correct_choice_idx": None},
}


def unlabelled(name, folder):
    """Examples of a copy of a test split without answers."""
    benchmark = BENCHMARKS[name]
    place = folder / "InfographicVQA" if benchmark.family == "info_qa" else folder / "data"
    for split in {"train", benchmark.options["eval_split"]}:
        published_sets.table(place / f"{split}-00000-of-00001.parquet", [PRIVATE[name]])
    config = DatasetConfig(family=benchmark.family, path=str(folder), options=dict(benchmark.options), train_examples=0)
    return list(FAMILIES[benchmark.family].make(config, 0))


@pytest.mark.parametrize("name", PRIVATE)
def test_private_labels_can_be_asked_and_give_no_reference(name, tmp_path):
    ((side, example),) = unlabelled(name, tmp_path)
    assert side == "eval" and isinstance(example, Example)
    again = Example.from_json(example.to_json(), [image.data for image in example.images])
    item = tasks.Item(0, tasks.light(again), (), 0)
    references = tasks.references(item)
    assert references["answer"] is None and references["question"] == "What?"
    assert str(references["metadata"]["question_id"]) == "70"
    assert "answer_index" not in references["metadata"] and "answers" not in references["metadata"]


@pytest.fixture
def project(assembled, tmp_path, monkeypatch):
    """A checkpoint, and shards of a test set of one question without its answer."""
    folder = tmp_path / "project"
    shutil.copytree(assembled, folder)
    monkeypatch.chdir(folder)
    shards = folder / "artifacts/shards/documents"
    write_shards(unlabelled("doc_qa_test", tmp_path / "set"), shards, 10**6)
    write_manifest(shards, schema="molmo/shards", version=1, summary={}, params={}, inputs={}, code="c")
    return folder


def params(**changes):
    settings = tiny_params()
    raw = {"documents": {"family": "doc_qa", "options": {"eval_split": "test"}}}
    task = {"docs": {"benchmark": "doc_qa_test", "dataset": "documents", "max_new_tokens": 3} | changes}
    made = params_from_dict({"version": 2, "datasets": raw, "tasks": task}, "here")
    settings.datasets |= made.datasets
    settings.tasks = made.tasks
    return settings


@pytest.mark.slow
def test_from_the_model_to_the_file_and_a_score_that_says_so(project, capsys, monkeypatch):
    cell = {"checkpoint": CHECKPOINT, "task": "docs"}
    run(predict.STAGE, params(), **cell)
    manifest = run(score.STAGE, params(), **cell)
    assert "not public" in capsys.readouterr().out and manifest.summary["mean"] is None
    metrics = json.loads((score.STAGE.target(cell) / "metrics.json").read_text())
    assert metrics["metrics"] == {} and metrics["baseline"] is None
    run(scorecard.STAGE, params(), checkpoint=CHECKPOINT)
    with pytest.raises(EvaluationError, match="1 answers, but the set has 5188"):
        submit.submit(params(), CHECKPOINT, "docs")
    made = submit.submit(params(), CHECKPOINT, "docs", incomplete=True)
    (prediction,) = predictions.read_predictions(predict.STAGE.target(cell) / predictions.FILE)
    assert json.loads(made.text) == [{"questionId": 70, "answer": short_answer(prediction["prediction"])}]
    monkeypatch.setitem(submissions.QUESTIONS, "doc_qa_test", 1)
    assert submit.submit(params(), CHECKPOINT, "docs") == made
    (project / "params.yaml").write_text(yaml.safe_dump(to_dict(params())))
    submit.main([f"checkpoint={CHECKPOINT}", "task=docs"])
    assert (project / "artifacts/submissions" / CHECKPOINT / "docs.json").read_text() == made.text
    with pytest.raises(ConfigError, match="did you mean 'out'"):
        submit.main([f"checkpoint={CHECKPOINT}", "task=docs", "outt=x"])
    with pytest.raises(EvaluationError, match=r"max_examples None.*the params say 5"):
        submit.submit(params(max_examples=5), CHECKPOINT, "docs")
    other = params()
    other.datasets["documents"].family = "info_qa"
    with pytest.raises(ConfigError, match="answers to another set"):
        submit.submit(other, CHECKPOINT, "docs")
    with pytest.raises(ConfigError, match="has no test server; vqa_v2_test"):
        submit.submit(params(benchmark="doc_qa"), CHECKPOINT, "docs")


def test_a_loss_on_answers_that_are_not_public_is_refused(project):
    task = TaskConfig(dataset="documents", metric="loss", kind=TaskKind.loss)
    with pytest.raises(EvaluationError, match="not public; there is nothing to measure"):
        check_task(task, "docs", ShardReader("artifacts/shards/documents"))


def test_a_report_leaves_out_what_has_no_number(capsys):
    def cell(metrics):
        return SimpleNamespace(metrics={"primary": "anls", "metrics": metrics})

    numbers, nothing = cell({"anls": {"mean": 1.0}}), cell({})
    results = {"a": {"x": numbers, "y": numbers}, "b": {"x": numbers, "y": nothing}}
    assert list(report._with_numbers(results)) == ["a"]
    assert "want of a number of every checkpoint: b" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="no task has a number"):
        report._with_numbers({"b": {"x": nothing}})
