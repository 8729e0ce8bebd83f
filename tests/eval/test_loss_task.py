"""Tasks of kind `loss`: what is measured is training's loss, whatever the batch, and it reaches the scores."""

import json
import math
import shutil

import pytest
import torch

from molmo_model.config import Engine, TaskConfig, TaskKind, params_from_dict
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval import predictions, tasks
from molmo_model.eval.answering import Asking, Question
from molmo_model.eval.inference import Predictor
from molmo_model.eval.measuring import loss_of_rows
from molmo_model.preprocessing import prompts
from molmo_model.preprocessing.collator import collate
from pipelines import predict, score
from pipelines.stage import run
from tests.eval.synthetic import tiny_params

CHECKPOINT = "base/step-000000"
CELL = {"checkpoint": CHECKPOINT, "task": "caption_loss"}
MEASURE = Asking(1, measure=True)


def params(**changes):
    settings = tiny_params()
    fields = {"dataset": "digit_scenes", "styles": ["scene_caption", "scene_point"], "metric": "loss"}
    settings.tasks = {"caption_loss": TaskConfig(**{"kind": TaskKind.loss} | fields | changes)}
    return settings


@pytest.fixture
def project(assembled, tmp_path, monkeypatch):
    folder = tmp_path / "project"
    shutil.copytree(assembled, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(assembled):
    return Predictor.load(assembled / "artifacts/checkpoints" / CHECKPOINT)


@pytest.fixture(scope="module")
def questions(assembled):
    """Questions of all styles, so that their lengths differ."""
    reader = ShardReader(assembled / "artifacts/shards/digit_scenes")
    items = tasks.items(TaskConfig(dataset="digit_scenes", metric="loss"), "t", reader)[:9]
    return [Question(reader.read(item.row), item.conversation) for item in items]


def measured(predictor, questions, batch_size, asking=MEASURE):
    predictor.batch_size = batch_size
    found = dict(predictor.answers(questions, questions.__getitem__, asking))
    return [found[index] for index in range(len(questions))]


def test_it_is_the_loss_of_training(predictor, questions):
    """Against the model's own training loss, of each conversation alone and of all packed into rows."""
    preprocessor = predictor.preprocessor
    encoded = [preprocessor.encode(one.example, [one.conversation]) for one in questions]
    found = measured(predictor, questions, 4)

    def training(packs):
        batch = collate(packs, None, preprocessor.config, preprocessor.pad_id)
        with torch.no_grad():
            return predictor.model(**batch, z_loss=0.0, use_cache=False)

    for one, answer in zip(encoded, found, strict=True):
        output = training([[one]])
        assert answer.measured["tokens"] == int((one.labels >= 0).sum()) == answer.tokens
        assert answer.measured["nll"] / answer.measured["tokens"] == pytest.approx(float(output.loss), abs=1e-5)
    packed = training([encoded[:4], encoded[4:]])
    assert sum(one.measured["nll"] for one in found) == pytest.approx(float(packed.cross_entropy_sum), rel=1e-5)


def test_it_is_the_likelihood_of_the_answer_and_its_end(predictor, questions):
    """Against a plain loop that feeds the prompt of generation and then the reference answer, token by token."""
    preprocessor, model = predictor.preprocessor, predictor.model
    for question, answer in zip(questions[:3], measured(predictor, questions[:3], 2), strict=True):
        asked = question.example.conversations[question.conversation]
        prompt = preprocessor.encode_prompt(question.example, question.conversation)
        text = prompts.write(asked, preprocessor.config.prompts)[-1]
        wanted = [*preprocessor.vocabulary.encode(text), preprocessor.eos_id]
        ids, nll, right = prompt.input_ids.tolist(), 0.0, 0
        for token in wanted:
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([ids]),
                    image_ids=torch.tensor([[*prompt.image_ids.tolist(), *[0] * (len(ids) - len(prompt))]]),
                    pixel_values=torch.from_numpy(prompt.pixels),
                    pooling=torch.from_numpy(prompt.pooling),
                ).logits[0, -1]
            nll -= float(logits.log_softmax(-1)[token])
            right += int(logits.argmax() == token)
            ids.append(token)
        assert answer.prompt_tokens == len(prompt)
        assert answer.measured["tokens"] == len(wanted)
        assert answer.measured["right"] == right
        assert answer.measured["nll"] == pytest.approx(nll, rel=1e-5)


def test_it_does_not_depend_on_the_batch(predictor, questions):
    alone = measured(predictor, questions, 1)
    for size in (2, 64):
        for one, other in zip(alone, measured(predictor, questions, size), strict=True):
            assert other.measured["nll"] == pytest.approx(one.measured["nll"], abs=1e-4)
            assert (other.tokens, other.prompt_tokens, other.text) == (one.tokens, one.prompt_tokens, "")


def test_chunks_of_labels_add_up_by_row():
    """Against cross-entropy without chunks; a row without labels has nothing."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 11), torch.randn(4, 6, 8)
    labels = torch.randint(-3, 11, (4, 6))
    labels[2] = -100
    logits = head(hidden).detach()
    for chunk in (1, 5, 1000):
        found = loss_of_rows(head, hidden, labels, chunk)
        for row, sums in enumerate(found):
            kept = labels[row] >= 0
            loss = torch.nn.functional.cross_entropy(logits[row][kept], labels[row][kept], reduction="sum")
            assert sums["nll"] == pytest.approx(float(loss.nan_to_num()), rel=1e-5)
            assert sums["tokens"] == int(kept.sum())
            assert sums["right"] == int((logits[row].argmax(-1) == labels[row])[kept].sum())


@pytest.mark.slow
def test_from_the_model_to_the_scores(project):
    """One row per item with what was measured, and a mean that every token of every answer has the same part in."""
    run(predict.STAGE, params(), **CELL)
    rows = predictions.read_predictions(predict.STAGE.target(CELL) / predictions.FILE)
    assert rows and all(row["prediction"] == "" for row in rows)
    run(score.STAGE, params(), **CELL)
    metrics = json.loads((score.STAGE.target(CELL) / "metrics.json").read_text())
    nll, tokens = (sum(row["measured"][name] for row in rows) for name in ("nll", "tokens"))
    assert metrics["metrics"]["loss"]["mean"] == pytest.approx(nll / tokens, abs=1e-6)
    assert metrics["metrics"]["perplexity"]["mean"] == pytest.approx(math.exp(nll / tokens), abs=1e-4)
    assert metrics["baseline"] is None
    assert 0 < metrics["metrics"]["loss"]["mean"] < 2 * math.log(512)


def test_what_is_measured_is_part_of_the_key(project):
    """The same question answered and measured are two things, and so is one with another reference answer."""
    reader = ShardReader("artifacts/shards/digit_scenes")
    folder = project / "artifacts/checkpoints" / CHECKPOINT

    def keys(settings):
        return predict.plan(settings, CELL, folder, reader).keys

    loss = keys(params())
    assert not set(loss) & set(keys(params(kind=TaskKind.answer)))
    assert not set(loss) & set(keys(params(max_crops=2)))
    assert len(set(loss)) == len(loss)


def test_what_cannot_be_measured_is_refused(project):
    settings = params()
    settings.eval.engine = Engine.openai
    with pytest.raises(ConfigError, match="measures no loss"):
        run(predict.STAGE, settings, **CELL)
    task = {"dataset": "d", "metric": "loss", "kind": "loss", "keep_image_tokens": 0.5}
    raw = {"version": 2, "datasets": {"d": {"family": "charts"}}, "tasks": {"t": task}}
    with pytest.raises(ConfigError, match=r"tasks\.t\.kind.*decodes nothing"):
        params_from_dict(raw, "here")


def test_a_metric_that_does_not_fit_is_refused_before_anything_is_asked(project, monkeypatch):
    monkeypatch.setattr(Predictor, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(EvaluationError, match=r"caption_loss: metric 'clocks' does not fit the references of item"):
        run(predict.STAGE, params(kind=TaskKind.answer, metric="clocks"), **CELL)
    with pytest.raises(ConfigError, match="no answers for metric 'exact_match'"):
        run(predict.STAGE, params(metric="exact_match"), **CELL)
