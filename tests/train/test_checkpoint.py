import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo_model.artifacts import verify
from molmo_model.errors import CheckpointError
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.train.checkpoint import load_state, load_weights, save_weights, weight_tensors
from molmo_model.train.history import SCHEMA
from molmo_model.train.weights import read_shapes

START = Path("artifacts/checkpoints/tiny/step-000000")


def test_a_sharded_model_is_the_one_that_transformers_loads(make_trainer: Any) -> None:
    model = make_trainer().model
    plain = MolmoForConditionalGeneration.from_pretrained(START)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].full_tensor(), tensor), name
    buffers = dict(plain.named_buffers())
    assert buffers and set(buffers) == {name for name, _ in model.named_buffers()}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_checkpoint_loads_everywhere_and_has_equal_bytes_twice(make_trainer: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from molmo_model.preprocessing.preprocessor import Preprocessor

    trainer = make_trainer("runs.go.train.steps=2", "runs.go.train.save_every=2")
    trainer.fit(0)
    folder = Path("a/out/step-000002")
    manifest = verify(folder, SCHEMA)
    assert manifest.summary["step"] == 2 and manifest.summary["run"] == "go"
    assert manifest.params == trainer.stamp["params"] and manifest.inputs == trainer.stamp["inputs"]
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(trainer.model.state_dict()[name].full_tensor(), tensor), name
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert end is not None and loaded.generation_config.eos_token_id == loaded.generation_config.pad_token_id == end
    generation = [(path / "generation_config.json").read_bytes() for path in (START, folder)]
    assert generation[0] == generation[1]
    assert Preprocessor.from_pretrained(folder).config == Preprocessor.from_pretrained(START).config
    digest = manifest.digest
    shutil.rmtree(folder)
    trainer._save(2, trainer.places.out, {})
    assert verify(folder).digest == digest


def test_large_models_are_split_over_files(make_trainer: Any, tmp_path: Path, one_rank: Any) -> None:
    model = make_trainer().model
    folder = tmp_path / "split"
    shutil.copytree(START, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_weights(model, folder, one_rank, file_bytes=100_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < 120_000
    loaded = MolmoForConditionalGeneration.from_pretrained(folder)
    plain = MolmoForConditionalGeneration.from_pretrained(START)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert read_shapes(folder) == read_shapes(START)


def test_weights_of_another_shape_are_refused_by_name(make_trainer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_trainer().model
    tensors = load_file(START / "model.safetensors")
    name = "model.extra_embedding.weight"

    def written(changed: dict[str, torch.Tensor]) -> Path:
        save_file(changed, tmp_path / "model.safetensors")
        return tmp_path

    with pytest.raises(CheckpointError, match=r"model\.extra_embedding\.weight has shape \(3, 32\).*\(16, 32\)"):
        load_weights(model, written({**tensors, name: torch.zeros(3, 32)}))
    with pytest.raises(CheckpointError, match=r"no weights for model\.extra_embedding\.weight"):
        load_weights(model, written({key: value for key, value in tensors.items() if key != name}))
    with pytest.raises(CheckpointError, match="holds surprise"):
        load_weights(model, written({**tensors, "surprise": torch.zeros(1)}))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_weights(model, tmp_path)


def test_tied_weights_lie_once_and_stay_tied(workspace: Path, one_rank: Any) -> None:
    from molmo_model.config import load_params
    from molmo_model.nn.build import build_model
    from molmo_model.train.parallelize import build_sharded_model

    params = load_params()
    params.models["tiny"].language.tie_word_embeddings = True
    plain = build_model(params.models["tiny"], 3)
    folder = workspace / "tied"
    plain.save_pretrained(folder)
    model: Any = build_sharded_model(folder, params.runs["go"].train, one_rank)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert set(weight_tensors(model)) == set(read_shapes(folder))
    assert not any("lm_head" in name for name in read_shapes(folder))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].full_tensor(), tensor), name


def test_a_broken_state_is_named(make_trainer: Any) -> None:
    trainer = make_trainer("runs.go.train.steps=1", "runs.go.train.save_every=1")
    trainer.fit(0)
    (Path("a/out/step-000001/train_state") / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="step-000001/train_state does not fit"):
        load_state(trainer.optimizer, Path("a/out/step-000001"))
