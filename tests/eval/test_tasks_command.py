"""`python -m pipelines.tasks`: groups become sections of params.yaml; own tasks are checked before they are asked."""

import shutil
from pathlib import Path

import pytest
import yaml

from molmo_model.artifacts import write_manifest
from molmo_model.config import params_from_dict
from molmo_model.data.example import Conversation, Example, Message
from molmo_model.data.shards import write_shards
from molmo_model.errors import ConfigError, MolmoError
from molmo_model.source_digest import source_closure
from pipelines import predict, recipe, tasks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("words", "names"), [
    (["group=paper"], 11),
    (["group=low_res,loss", "doc_qa"], None),
    (["chart_qa", "android_control_hl", "crops=24"], 2),
])  # fmt: skip
def test_the_overlay_merges_into_params(tmp_path, words, names):
    params = shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    assert tasks.main([*words, f"out={tmp_path / 'sets.yaml'}"]) == 0
    changed = recipe.apply(tmp_path / "sets.yaml", Path(params))
    raw = yaml.safe_load((tmp_path / "params.yaml").read_text())
    made = params_from_dict(raw, "merged")
    added = {name: task for name, task in made.tasks.items() if task.benchmark}
    assert changed and (names is None or len(added) == names)
    assert all(task.dataset in made.datasets for task in added.values())
    crops = {task.max_crops for task in added.values() if "high_res" in task.groups}
    assert crops <= ({24} if "crops=24" in words else {36})
    assert {task.max_crops for task in added.values() if "high_res" not in task.groups} <= {None}


def test_rows_about_the_same_questions_share_a_dataset():
    made = tasks.overlay(tasks.chosen(["pixmo_count", "android_control_ll", "mmmu", "mmmu_all_images"], []), None)
    assert len(made["datasets"]) == 4
    both = tasks.overlay(tasks.chosen(["chart_qa"], []), None)["datasets"]
    assert both == {"chart_qa_eval": {"family": "chart_qa", "train_examples": 500}}


@pytest.mark.parametrize(("words", "message"), [
    (["group=papers"], "did you mean 'paper'"),
    (["chart_qaa"], "did you mean 'chart_qa'"),
    (["chart_qa", "crops=many"], "whole number"),
    (["chart_qa", "outt=x"], "did you mean 'out'"),
    (["chart_qa", "out=x", "out=y"], "given once"),
])  # fmt: skip
def test_wrong_words_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        tasks.main(words)


def test_the_page_is_what_the_table_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert tasks.main(["page", "check=true"]) == 0, "write it with `python -m pipelines.tasks page`"
    assert tasks.main([]) == 0
    assert "pixmo_cap_loss" in capsys.readouterr().out


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Shards of a person's own questions: half of them have choices in their metadata."""
    monkeypatch.chdir(tmp_path)
    options = {"options": ["cat", "dog"], "answer_index": 1, "answer": "dog"}
    talks = {
        "free": Conversation("free", (Message("user", "What?"), Message("assistant", "a dog"))),
        "pick": Conversation(
            "pick", (Message("user", "Which?", options=("cat", "dog")), Message("assistant", "B")), metadata=options
        ),
    }
    examples = [("eval", Example(f"{style}-{i}", (), (talk,))) for style, talk in talks.items() for i in range(3)]
    folder = tmp_path / "artifacts/shards/mine"
    write_shards(examples, folder, 10**6)
    write_manifest(folder, schema="molmo/shards", version=1, summary={}, params={}, inputs={}, code="c")
    return tmp_path


def params(**changes):
    raw = {"version": 2, "datasets": {"mine": {"family": "chat", "path": "mine.jsonl"}}}
    task = {"dataset": "mine", "metric": "exact_match"} | changes
    return params_from_dict(raw | {"tasks": {"my_task": task}}, "here")


def test_an_own_task_is_checked_against_its_first_references(own):
    (line,) = tasks.check(params(styles=["free"], also=["anls"]))
    assert line == "my_task: exact_match, anls can score the 3 questions looked at"
    (line,) = tasks.check(params(styles=["pick"], metric="multiple_choice", slices=["answer"]))
    assert "multiple_choice" in line


@pytest.mark.parametrize(("changes", "message"), [
    ({"metric": "multiple_choice"}, r"my_task.*'multiple_choice' does not fit.*free-0#0.*choose another metric"),
    ({"metric": "exact_match", "also": ["clocks"]}, r"'clocks' does not fit.*free-0#0"),
    ({"metric": "mathvistas"}, r"did you mean 'mathvista'"),
    ({"metric": "loss"}, r"set `kind: loss`"),
    ({"kind": "loss"}, r"no answers for metric 'exact_match'; use loss"),
    ({"styles": ["fre"]}, r"no conversation of style fre; its styles are free, pick|no conversation of style fre"),
    ({"slices": ["colour"]}, r"my_task\.slices.*'colour'.*answer_index"),
    ({"slices": ["answer_type"]}, r"my_task\.slices: 'answer_type' is sliced by anyway"),
    ({"also": ["exact_match"]}, r"my_task: exact_match stands twice"),
    ({"metric": "pointing"}, r"'pointing' does not fit.*is no points"),
    ({"metric": "points_in_region"}, r"'points_in_region' does not fit.*neither masks"),
    ({"metric": "vqa_accuracy"}, r"'vqa_accuracy' does not fit.*how many people agree"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(own, changes, message):
    with pytest.raises(MolmoError, match=message):
        tasks.check(params(**changes))


def test_shards_that_are_not_there_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tasks.check(params()) == [
        "my_task: not checked, there are no shards in artifacts/shards/mine; run the shards stage"
    ]


def test_answers_do_not_depend_on_the_sources_of_metrics():
    """The check is imported by name; the stage that answers has no metric in its closure."""
    names = {str(path) for path in source_closure(predict.STAGE.module)}
    assert not [name for name in names if "metrics" in name or "fitting" in name or "scoring" in name]
