"""The engine `slots` against the engine `generate`: the same answers, each asked once, whatever fails on the way."""

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from molmo_model.config import DecodingConfig, Engine, EvalConfig, EvalPrecision, Quantization, TaskConfig, TaskKind
from molmo_model.data.shard_reader import ShardReader
from molmo_model.errors import ConfigError, DataError
from molmo_model.eval import predictions, tasks
from molmo_model.eval.answering import Asking, Question
from molmo_model.eval.engines import MODULES, SLOT_FAMILIES, resolved, slots_refuse
from molmo_model.eval.inference import Predictor
from molmo_model.eval.slot_inference import PACKED_TOKENS, SlotPredictor, _batches
from molmo_model.nn.language_model import LANGUAGE_MODELS
from molmo_model.source_digest import source_closure
from pipelines import predict
from pipelines.stage import run
from tests.eval.synthetic import tiny_params

CHECKPOINT = "artifacts/checkpoints/base/step-000000"
ASKING = Asking(max_new_tokens=7)


@pytest.fixture(scope="module")
def asked(assembled):
    """All questions of two kinds about the tiny dataset's scenes: several about each picture."""
    reader = ShardReader(assembled / "artifacts/shards/digit_scenes")
    params = tiny_params()
    items = [item for name in ("scene_qa", "scene_count") for item in tasks.items(params.tasks[name], name, reader)]
    light = [Question(item.example, item.conversation) for item in items]
    return light, lambda index: Question(reader.read(items[index].row), items[index].conversation)


@pytest.fixture(scope="module")
def load(assembled):
    return lambda engine, precision=EvalPrecision.fp32: engine.load(assembled / CHECKPOINT, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
def test_both_engines_answer_alike(load, asked, precision):
    light, read = asked
    precision = EvalPrecision(precision)
    expected = dict(load(Predictor, precision).answers(light, read, ASKING))
    assert len(expected) == len(light) > 12
    for slots in (3, 64):
        engine = load(SlotPredictor, precision)
        engine.batch_size = slots
        found = list(engine.answers(light, read, ASKING))
        assert sorted(index for index, _ in found) == list(range(len(light)))
        assert engine.made["batch_size"] == min(slots, len(light))
        wrong = [index for index, answer in found if answer != expected[index]]
        assert not wrong if precision is EvalPrecision.fp32 else len(wrong) <= 2, wrong
        assert engine.cache.encoded == len({question.example.id for question in light})


def test_matrices_are_cast_once_to_what_autocast_makes_of_them(load, asked):
    light, read = asked
    plain, ours = load(Predictor, EvalPrecision.bf16), load(SlotPredictor, EvalPrecision.bf16)
    layer = ours.model.model.language_model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == ours.model.lm_head.weight.dtype == torch.bfloat16
    assert (
        layer.input_layernorm.weight.dtype == ours.model.model.language_model.embed_tokens.weight.dtype == torch.float32
    )
    expected = dict(plain.answers(light[:4], read, ASKING))
    plain.model = ours.model  # the cast model through the other engine: the very same numbers
    assert dict(plain.answers(light[:4], read, ASKING)) == expected


def test_the_limits_of_a_task_hold(load, asked):
    light, read = asked
    asking = replace(ASKING, max_crops=1)
    expected = dict(load(Predictor).answers(light[:6], read, asking))
    assert dict(load(SlotPredictor).answers(light[:6], read, asking)) == expected
    assert expected[0].prompt_tokens < dict(load(Predictor).answers(light[:1], read, ASKING))[0].prompt_tokens


def test_an_error_of_a_reader_arrives_and_its_threads_end(load, asked):
    light, read = asked
    before = threading.active_count()

    def torn(index):
        if index == 3:
            raise DataError("shard 7 is short")
        return read(index)

    engine = load(SlotPredictor)
    engine.batch_size = 2
    with pytest.raises(DataError, match="shard 7"):
        list(engine.answers(light, torn, ASKING))
    answers = engine.answers(light, read, ASKING)
    next(answers)
    answers.close()  # whoever asks stops in the middle
    assert threading.active_count() == before
    assert len(list(engine.answers(light, read, ASKING))) == len(light)
    assert list(engine.answers([], read, ASKING)) == []


def test_what_the_slots_do_not_do_is_refused(load, asked, assembled):
    light, read = asked
    engine = load(SlotPredictor)
    for asking in (replace(ASKING, keep_image_tokens=0.5), replace(ASKING, measure=True)):
        with pytest.raises(ConfigError, match="losses and pruned image tokens"):
            list(engine.answers(light, read, asking))
    with pytest.raises(ConfigError, match=r"eval.quantization int8 .* generate"):
        SlotPredictor.load(assembled / CHECKPOINT, quantization=Quantization.int8)


def test_questions_of_one_example_follow_each_other_the_most_expensive_first():
    examples = [SimpleNamespace(id=name) for name in "aabbcacd"]
    questions = [SimpleNamespace(example=example) for example in examples]
    costs = [(10, 1), (30, 1), (20, 1), (25, 1), (30, 2), (11, 1), (5, 2), (PACKED_TOKENS, 1)]
    assert list(_batches(questions, costs, 3)) == [[7], [4, 6, 1], [5, 0, 3], [2]]
    assert list(_batches(questions, costs, 100)) == [[7], [4, 6, 1, 5, 0, 3, 2]]  # as many tokens as one row may have


def test_slots_that_do_not_fit_into_memory(monkeypatch):
    text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    engine = SlotPredictor.__new__(SlotPredictor)
    engine.precision = EvalPrecision.fp32
    engine.model = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, config=SimpleNamespace(text_config=text)
    )
    each = 2 * 2 * 2 * 128 * 8 * 4  # keys and values, layers, heads, places, width, bytes
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    for room, fit in ((100, 64), (20.5, 20)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda room=room: (room * each / 0.7, 0))
        if fit == 64:
            assert engine._fitting(64, 128) == 64
        else:
            with pytest.warns(UserWarning, match="20 slots instead of 64: one of 128 tokens"):
                assert engine._fitting(64, 128) == fit
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (each // 2, 0))
    with pytest.raises(ConfigError, match="no slot fits"):
        engine._fitting(64, 128)


# --- which engine answers


@pytest.mark.slow
def test_the_stage_asks_the_slots_and_keeps_their_answers_apart(assembled, tmp_path, monkeypatch):
    shutil.copytree(assembled, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    cell, rows, made = {"checkpoint": "base/step-000000", "task": "scene_count"}, {}, {}
    for engine in (Engine.auto, Engine.generate):
        params = tiny_params()
        params.eval.engine = engine
        run(predict.STAGE, params, **cell)
        rows[engine] = predictions.read_predictions(predict.STAGE.target(cell) / predictions.FILE)
        text = "".join(path.read_text() for path in predict.journals().rglob("*.jsonl"))
        made[engine] = {name: text.count(f'"{name}"') for name in ("slots", "generate")}
    assert rows[Engine.auto] == rows[Engine.generate]
    assert made[Engine.auto]["slots"] and not made[Engine.auto]["generate"]
    assert made[Engine.generate]["generate"]  # asked again: another engine, another key


@pytest.mark.parametrize(
    ("config", "preprocessor", "task", "reason"),
    [
        ({}, {}, {}, None),
        ({"selector": None}, {"video": {"select_frames_by_query": None}}, {"max_crops": 36}, None),
        ({"selector": {"tokens": 3}}, {}, {}, "HeMolmo"),
        ({"text_config": {"model_type": "mamba"}}, {}, {}, "type mamba"),
        ({}, {"video": {"select_frames_by_query": "google/siglip"}}, {}, "frames of films"),
        ({}, {}, {"keep_image_tokens": 0.5}, "keep_image_tokens is 0.5"),
        ({}, {}, {"kind": TaskKind.loss}, "losses"),
        ({}, {}, {"decoding": {"num_beams": 3}}, "num_beams is 3"),
    ],
)
def test_auto_takes_the_slots_where_they_can(tmp_path, config, preprocessor, task, reason):
    import json

    from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE

    config = {"text_config": {"model_type": "qwen2"}} | config
    task = TaskConfig(**{**task, "decoding": DecodingConfig(**task.get("decoding", {}))})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(preprocessor))
    found = slots_refuse(config, preprocessor, task)
    assert found is None if reason is None else reason in found
    assert resolved(EvalConfig(), task, tmp_path) is (Engine.slots if reason is None else Engine.generate)
    assert resolved(EvalConfig(engine=Engine.generate), task, tmp_path) is Engine.generate
    if reason is not None:
        with pytest.raises(ConfigError, match=r"eval\.engine slots: "):
            resolved(EvalConfig(engine=Engine.slots), task, tmp_path)


def test_every_decoding_setting_is_done_or_refused():
    """Whoever adds a setting decides it here."""
    changed = {"num_beams": 2, "do_sample": True, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    changed |= {"min_new_tokens": 3}
    only_with_those = {"length_penalty", "seed", "temperature", "top_k", "top_p"}
    assert set(DecodingConfig.__dataclass_fields__) == set(changed) | only_with_those
    config = {"text_config": {"model_type": "qwen2"}}
    for name, value in changed.items():
        task = TaskConfig(decoding=DecodingConfig(**{name: value}))
        assert name in (slots_refuse(config, {}, task) or "")
    assert "int4" in (slots_refuse(config, {}, TaskConfig(), Quantization.int4) or "")


def test_the_families_are_those_that_are_built():
    assert {spec.model_type for spec in LANGUAGE_MODELS.values()} == SLOT_FAMILIES


def test_the_choice_needs_no_torch_and_the_key_has_the_engines_sources():
    code = "import sys, molmo_model.eval.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    closure = {path.name for path in source_closure(MODULES["slots"])}
    assert {"slots.py", "static_cache.py", "loading.py", "preprocessor.py"} <= closure
    assert "scoring.py" not in closure and "tasks.py" not in closure
    assert predict.engine_code(Engine.slots) != predict.engine_code(Engine.generate)
