"""The first checkpoint of a model: what lies in it, and that two builds are one."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from molmo_model.artifacts import read_manifest, verify
from molmo_model.config import Params
from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.errors import ConfigError
from molmo_model.model_config import CropMode, PaddingEmbedding, Pooling, Projector, ScaleFusion
from molmo_model.nn.generation import generate
from molmo_model.nn.molmo import MolmoForConditionalGeneration
from molmo_model.preprocessing.collator import collate, collate_prompts
from molmo_model.preprocessing.preprocessor import Preprocessor
from pipelines.assemble import STAGE
from pipelines.stage import differences, run


@pytest.fixture
def params(make_params):
    return Params(seed=3, models={"tiny": make_params()})


def test_checkpoint_is_whole_and_deterministic(params, tmp_path, monkeypatch):
    digests = []
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        digests.append(run(STAGE, params, model="tiny").digest)
    assert digests[0] == digests[1]
    step = Path("artifacts/checkpoints/tiny/step-000000")
    manifest = verify(step, "molmo/checkpoint")
    assert set(manifest.files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "molmo_preprocessor.json",
        "params.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert manifest.summary["step"] == 0 and set(manifest.summary["parameters"]) == {"vision", "connector", "language"}
    assert read_manifest(step.parent, "molmo/checkpoints").params == manifest.params
    model = AutoModelForImageTextToText.from_pretrained(step)
    tokenizer = AutoTokenizer.from_pretrained(step)
    preprocessor = Preprocessor.from_pretrained(step)
    assert preprocessor.config.im_patch_id == model.config.image_token_id
    assert preprocessor.config.image_size == model.config.vision_config.image_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for file in step.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes() or file.name in ("params.json", "manifest.json")
    assert differences(STAGE, params, {"model": "tiny"}) == []


def test_seed_and_pretrained_parts_are_part_of_the_identity(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    vision = SiglipVisionModel(SiglipVisionConfig(**sizes, num_attention_heads=4))
    vision.save_pretrained("vision")
    params.models["tiny"].vision.pretrained = "vision"
    run(STAGE, params, model="tiny")
    params.seed = 4
    assert differences(STAGE, params, {"model": "tiny"}) == ["params seed: made with 3, now 4"]
    params.seed = 3
    with torch.no_grad():
        vision.embeddings.patch_embedding.bias += 1
    vision.save_pretrained("vision")
    (difference,) = differences(STAGE, params, {"model": "tiny"})
    assert difference.startswith("inputs vision.pretrained: made with")


def test_a_padding_embedding_without_padding_is_refused(params, tmp_path, monkeypatch):
    """SigLIP's crops are squashed; letterboxed on demand, the same model is fine."""
    monkeypatch.chdir(tmp_path)
    params.models["tiny"].connector.padding_embedding = PaddingEmbedding.pad_embed
    with pytest.raises(ConfigError, match="padding_embedding is pad_embed, but resize 'siglip' leaves no padding"):
        run(STAGE, params, model="tiny")
    params.models["tiny"].preprocessing.resize = "default"
    run(STAGE, params, model="tiny")
    config = Preprocessor.from_pretrained("artifacts/checkpoints/tiny/step-000000").config
    assert config.patch_masks and config.resize == "default" and config.tokens_per_window == 1


def test_too_few_extra_ids_are_refused(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params.models["tiny"].language.extra_vocab_size = 4
    with pytest.raises(ConfigError, match="extra_vocab_size is 4, but there are 6 image tokens"):
        run(STAGE, params, model="tiny")


def test_an_error_names_the_model(params, tmp_path, monkeypatch):
    """The rooms know their part alone, the params may hold many models."""
    monkeypatch.chdir(tmp_path)
    params.models["tiny"].connector.num_heads = 5
    with pytest.raises(ConfigError, match=r"models\.tiny: .*connector\.num_heads .* 5 does not divide .* 32"):
        run(STAGE, params, model="tiny")


VARIANTS = {
    "plain": {},
    "queries": {"connector": {"pooling": Pooling.learned_queries, "num_queries": 3}},
    "abstractor": {"connector": {"pooling": Pooling.c_abstractor, "num_queries": 4, "pooling_size": [0, 0]}},
    "hierarchical": {"mode": CropMode.hierarchical, "connector": {"scale_fusion": ScaleFusion.concat}},
    "letterboxed": {"encoder": "clip", "connector": {"padding_embedding": PaddingEmbedding.pad_and_partial_pad}},
    "all": {
        "encoder": "clip",
        "mode": CropMode.hierarchical,
        "connector": {
            "pooling": Pooling.learned_queries,
            "num_queries": 2,
            "padding_embedding": PaddingEmbedding.regress,
            "projector": Projector.mlpx,
        },
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_preprocessor_feeds_the_model(variant, make_params, tmp_path, monkeypatch):
    """Real encodings of two examples, packed, equal the examples alone, and reach every parameter; and prompts are
    answered."""
    monkeypatch.chdir(tmp_path)
    options = dict(VARIANTS[variant])
    mode = options.pop("mode", CropMode.overlap_and_resize_c2)
    params = Params(seed=3, models={"tiny": make_params(**options)})
    params.models["tiny"].preprocessing.crop_mode = mode
    run(STAGE, params, model="tiny")
    step = "artifacts/checkpoints/tiny/step-000000"
    model, preprocessor = MolmoForConditionalGeneration.from_pretrained(step).eval(), Preprocessor.from_pretrained(step)
    config, pad = preprocessor.config, preprocessor.pad_id
    examples = [example("a", 40, 70, ["7", "AB"]), example("b", 90, 30, ["CDE"])]
    encoded = [preprocessor.encode(one, list(range(len(one.conversations))), None, None) for one in examples]
    length = sum(len(one) for one in encoded) + 5
    packed = model(**collate([encoded], length, config, pad))
    alone = [model(**collate([[one]], len(one), config, pad)) for one in encoded]
    assert packed.weight_sum.item() == pytest.approx(sum(one.weight_sum.item() for one in alone), rel=1e-6)
    torch.testing.assert_close(packed.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=0)
    packed.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    tokens = sum((one.input_ids == config.im_patch_id).sum() for one in encoded)
    assert tokens == sum(len(one.pooling) for one in encoded) * model.config.num_queries
    assert ("patch_masks" in collate([encoded], length, config, pad)) == (model.config.padding_embedding != "none")
    prompts = [preprocessor.encode_prompt(one, 0) for one in examples]
    together = generate(model, collate_prompts(prompts, config, pad), 6, [preprocessor.eos_id])
    assert together == [
        generate(model, collate_prompts([prompt], config, pad), 6, [preprocessor.eos_id])[0] for prompt in prompts
    ]


def example(name: str, width: int, height: int, answers: list[str]) -> Example:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    image = Image(file.getvalue(), width, height, "PNG")
    conversations = [
        Conversation("scene_qa", (Message("user", "WHAT", None, None), Message("assistant", answer, None, None)))
        for answer in answers
    ]
    return Example(name, (image,), tuple(conversations), {})
