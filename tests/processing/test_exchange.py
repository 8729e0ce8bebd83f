"""Whole folders: export to native Molmo2 and import of both layouts, through the commands that a person types."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.molmo2.configuration_molmo2 import Molmo2Config

from benchmarks import peers
from molmo_model.config import params_from_dict
from molmo_model.errors import CheckpointError, ConfigError
from molmo_model.exchange import NATIVE_TOKENS, export_molmo2, import_folder
from molmo_model.nn.build import build_model
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import CONFIG_FILE, PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer
from molmo_model.processing import MolmoProcessor
from pipelines import export, import_checkpoint
from pipelines.assemble import _as_the_weights_were_trained
from tests.nn.test_convert_released import CONFIGS, random_release, write

BYTES = "molmo_model/preprocessing/tokenizers/bytes512"


def make_checkpoint(folder: Path, preset: str = "demo-native", preprocessing: Any = (), **entry: Any) -> Path:
    entry = {"preset": preset, **entry}
    model = params_from_dict({"version": 2, "models": {"x": entry}}, "test").models["x"]
    built = build_model(model, seed=2)
    built.save_pretrained(folder)
    config = PreprocessorConfig(
        image_size=64,
        patch_size=16,
        pooling_size=(2, 2),
        resize="siglip",
        vocab_size=built.config.text_config.vocab_size,
        overlap_margins=(1, 1),
        max_crops=4,
        **dict(preprocessing),
    )
    MolmoProcessor(Preprocessor(config, load_tokenizer(BYTES))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ours") / "step-000001", preprocessing={"exact_resize": True})


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "molmo2"
    export.main([f"checkpoint={checkpoint}", f"out={out}"])
    return out


def question() -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (70, 150 - 40 * i, 3), dtype=np.uint8)) for i in range(2)]
    images = ({"type": "image", "image": picture} for picture in pictures)
    return [{"role": "user", "content": [*images, {"type": "text", "text": "Read it."}]}]


def test_an_export_has_what_the_native_processor_asks_for(checkpoint: Path, exported: Path) -> None:
    config = Molmo2Config.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    rows = config.text_config.vocab_size
    assert tokenizer.convert_tokens_to_ids(list(NATIVE_TOKENS)) == list(range(rows, rows + len(NATIVE_TOKENS)))
    assert config.image_patch_id == tokenizer.convert_tokens_to_ids("<im_patch>")
    image = json.loads((exported / "preprocessor_config.json").read_text())
    assert (image["size"], image["max_crops"], image["overlap_margins"]) == ({"height": 64, "width": 64}, 4, [1, 1])
    nested = json.loads((exported / "processor_config.json").read_text())
    assert nested["image_processor"] == {name: x for name, x in image.items() if name != "processor_class"}
    assert tokenizer.chat_template == MolmoProcessor.from_pretrained(checkpoint).chat_template
    # the text between the images is tokenized as it is here
    ours = MolmoProcessor.from_pretrained(checkpoint).apply_chat_template(question(), tokenize=True)["input_ids"][0]
    text = tokenizer.apply_chat_template(question(), tokenize=False)
    theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
    mark = tokenizer.convert_tokens_to_ids("<|image|>")
    assert [i for i in theirs if i != mark] == [int(i) for i in ours if i < rows]


def test_an_export_comes_back_as_it_was(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    import_checkpoint.main([f"source={exported}", f"out={tmp_path / 'back'}"])
    before, after = (MolmoForConditionalGeneration.from_pretrained(path) for path in (checkpoint, tmp_path / "back"))
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    old, new = (MolmoProcessor.from_pretrained(path) for path in (checkpoint, tmp_path / "back"))
    first, second = (processor.apply_chat_template(question(), tokenize=True) for processor in (old, new))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert old.tokenizer.get_vocab() == {t: i for t, i in new.tokenizer.get_vocab().items() if "EXTRA" not in t}


def test_an_imported_folder_is_what_a_model_starts_from(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"preset": "demo-native", "checkpoint": str(checkpoint)}
    model = params_from_dict({"version": 2, "models": {"x": entry}}, "test").models["x"]
    built, loaded = build_model(model, seed=9), MolmoForConditionalGeneration.from_pretrained(checkpoint)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, built.state_dict()[name]), name
    found = json.loads((checkpoint / CONFIG_FILE).read_text())
    theirs = PreprocessorConfig.from_json({**found, "max_crops": 3, "shifted_patch_masks": True})
    (checkpoint / CONFIG_FILE).write_text(json.dumps(theirs.to_json()))
    try:
        kept = _as_the_weights_were_trained("x", replace(theirs, max_crops=2, shifted_patch_masks=False), checkpoint)
    finally:
        (checkpoint / CONFIG_FILE).write_text(json.dumps(found))
    assert kept.shifted_patch_masks and kept.max_crops == 2  # what the params cannot say, and what they say
    assert f"models.x.preprocessing: max_crops is 2 here, 3 in {checkpoint}" in capsys.readouterr().out
    model.language.num_layers = 1
    with pytest.raises(CheckpointError, match=r"another model than the params describe: .*layers\.1.* not None"):
        build_model(model, seed=9)


@pytest.mark.parametrize("name", ["7B-D", "E-1B"])
def test_a_released_folder_answers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = {**CONFIGS[name], "vocab_size": 520, "embedding_size": 520}
    tensors = random_release(raw)
    rng = torch.Generator().manual_seed(1)
    head = "lm_head.weight" if name == "E-1B" else "model.transformer.ff_out.weight"
    for key in ("model.transformer.wte.embedding", head):
        tensors[key] = torch.randn(520, tensors[key].shape[1], generator=rng)
    source = write(tmp_path / "release", raw, tensors)
    tokenizer = load_tokenizer(BYTES)
    used = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens([f"|<EXTRA_TOKENS_{i}>|" for i in range(520 - used)], special_tokens=True)
    tokenizer.add_tokens(["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == 522
    tokenizer.save_pretrained(source)
    image = {"base_image_input_size": [32, 32], "image_patch_size": 8, "max_crops": 4, "overlap_margins": [1, 1],
             "image_token_length_h": 2, "image_token_length_w": 2}  # fmt: skip
    (source / "preprocessor_config.json").write_text(json.dumps(image))
    out = tmp_path / "ours"
    import_checkpoint.main([f"source={source}", f"out={out}"])
    assert "begins every question with a blank" in capsys.readouterr().out
    processor = MolmoProcessor.from_pretrained(out)
    assert max(processor.tokenizer.get_vocab().values()) < 520
    assert processor.config.patch_masks and processor.config.message_format.value == "role"
    inputs = processor.apply_chat_template(question(), tokenize=True)
    assert 0 < float(inputs["patch_masks"].mean()) < 1  # letterboxed crops have bars
    model = AutoModelForImageTextToText.from_pretrained(out)
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3 or said[0, -1] == processor.preprocessor.eos_id


def test_refusals_name_what_is_in_the_way(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export_molmo2(checkpoint, exported)
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        export_molmo2(checkpoint, tmp_path / "a", dtype="int8")
    with pytest.raises(ConfigError, match=r"language model qwen2.*window_position_embedding: True.*one_image_block"):
        export_molmo2(make_checkpoint(tmp_path / "demo", "demo"), tmp_path / "b")
    with pytest.raises(ConfigError, match="image processor cannot express resize: default"):
        export_molmo2(make_checkpoint(tmp_path / "c", preprocessing={}), _with_resize(tmp_path / "c"))
    with pytest.raises(ConfigError, match="unknown model_type"):
        import_folder(checkpoint, tmp_path / "d")
    assert not (tmp_path / "b").exists()


def _with_resize(folder: Path) -> Path:
    path = folder / "molmo_preprocessor.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resize": "default"}))
    return folder.parent / "e"


@pytest.mark.parametrize("module", ["export", "import_checkpoint"])
def test_commands_help_and_refuse(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = {"export": export, "import_checkpoint": import_checkpoint}[module]
    command.main(["--help"])
    assert f"python -m pipelines.{module}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        command.main(["surprise=1"])
    assert end.value.code == 2
    assert "is no option" in capsys.readouterr().err


@pytest.mark.slow
def test_the_native_processor_makes_the_same_inputs(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """In the peers' environment, which has the torchvision that the native processor needs."""
    for number, part in enumerate(question()[0]["content"][:2]):
        part["image"].save(tmp_path / f"{number}.png")
    code = f"""
import sys
sys.path.insert(0, {str(peers.REQUIREMENTS.parent)!r})
import molmo2_peer
kept = molmo2_peer.image_processor()  # makes torchvision importable
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(exported)!r})
images = [{{"type": "image", "image": Image.open(f"{tmp_path}/{{n}}.png")}} for n in range(2)]
messages = [{{"role": "user", "content": [*images, {{"type": "text", "text": "Read it."}}]}}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt",
                                       add_generation_prompt=True)
model = AutoModelForImageTextToText.from_pretrained({str(exported)!r})
with torch.no_grad():
    logits = model(**inputs).logits
torch.save({{"input_ids": inputs["input_ids"], "logits": logits}}, {str(tmp_path / "out.pt")!r})
"""
    done = subprocess.run([str(peers.peer_python()), "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    model = MolmoForConditionalGeneration.from_pretrained(checkpoint).eval()
    ours = MolmoProcessor.from_pretrained(checkpoint).apply_chat_template(question(), tokenize=True)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    with torch.no_grad():
        logits = model(**ours).logits
    torch.testing.assert_close(logits, theirs["logits"], atol=2e-5, rtol=0)
