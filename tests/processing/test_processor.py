"""Processor and chat template: the text of a prompt has exactly the preprocessor's tokens."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from molmo_model.config import params_from_dict
from molmo_model.data.example import Conversation, Example, Message
from molmo_model.errors import ConfigError, DataError
from molmo_model.model_config import MessageFormat, PromptTemplates, SystemPrompt
from molmo_model.nn.build import build_model
from molmo_model.preprocessing.image import decode_image
from molmo_model.preprocessing.preprocessor import Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.system_prompts import default_style
from molmo_model.preprocessing.tokenizer import load_tokenizer
from molmo_model.processing import IMAGE, MolmoProcessor, as_image
from molmo_model.source_digest import ROOT
from tests.preprocessing.examples import saved

BYTES = "molmo_model/preprocessing/tokenizers/bytes512"
TALK = ["What is <this>?", "A cat.", "And  how many\nlegs?", "Four.", "Point at them. "]


def make_preprocessor(**changes: Any) -> Preprocessor:
    tokenizer = load_tokenizer(BYTES)
    if changes.get("message_format") is MessageFormat.chatml:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    sizes = {"image_size": 64, "patch_size": 16, "pooling_size": (2, 2), "resize": "siglip", "vocab_size": 520}
    return Preprocessor(
        PreprocessorConfig(**{**sizes, "overlap_margins": (1, 1), "max_crops": 4, **changes}), tokenizer
    )


def pictures(count: int) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(3)
    return [PIL.Image.fromarray(rng.integers(0, 256, (40 + 30 * i, 90, 3), dtype=np.uint8)) for i in range(count)]


def messages_of(texts: list[str], images: list[Any]) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    out = [{"role": roles[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(texts)]
    out[0]["content"] = [*({"type": "image", "image": image} for image in images), *out[0]["content"]]
    return out


@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("message_format", list(MessageFormat))
@pytest.mark.parametrize("system_prompt", [SystemPrompt.none, SystemPrompt.style])
def test_the_template_s_text_has_the_preprocessor_s_tokens(
    turns: int, count: int, message_format: MessageFormat, system_prompt: SystemPrompt
) -> None:
    processor = MolmoProcessor(make_preprocessor(message_format=message_format, system_prompt=system_prompt))
    images = pictures(count)
    messages = messages_of(TALK[:turns], images)
    text = processor.apply_chat_template(messages, style="chat")
    found = processor(text, images or None)
    roles = ("user", "assistant")
    said = (*(Message(roles[i % 2], text) for i, text in enumerate(TALK[:turns])), Message("assistant", "?"))
    example = Example("x", tuple(map(as_image, images)), (Conversation("chat", said),))
    expected = processor.preprocessor.encode_prompt(example)
    assert found["input_ids"][0].tolist() == expected.input_ids.tolist()
    assert found["mm_token_type_ids"][0].tolist() == expected.image_ids.tolist()
    assert ("pixel_values" in found) is (count > 0)
    if count:
        assert np.array_equal(found["pixel_values"].numpy(), expected.pixels)
        assert np.array_equal(found["pooling"].numpy(), expected.pooling)
    direct = processor.apply_chat_template(messages, tokenize=True, style="chat")
    assert direct.keys() == found.keys()
    for name in direct:
        assert torch.equal(direct[name], found[name]), name


STYLES = [
    "qa",
    "long_caption",
    "user_qa",
    "vqa2",
    "eval_short_answer",
    "science_qa",
    "cosyn_chart_exp",
    "pointing",
    None,
]


@pytest.mark.parametrize("system_prompt", list(SystemPrompt))
@pytest.mark.parametrize("words", [PromptTemplates.none, PromptTemplates.uber_model, PromptTemplates.uber_model_v2])
def test_styles_lengths_and_options_in_text_are_those_in_tokens(
    system_prompt: SystemPrompt, words: PromptTemplates
) -> None:
    """Text and tokens of one request agree, and the tokens are those of an evaluation of the same conversation."""
    processor = MolmoProcessor(make_preprocessor(system_prompt=system_prompt, prompt_templates=words))
    for style in STYLES:
        for length in (None, 0, 7):
            for options in ((), ("a dog", "a cat")):
                messages = [{"role": "user", "content": "How many?", "options": options}]
                text = processor.apply_chat_template(messages, style=style, length=length)
                found = processor(text)["input_ids"][0].tolist()
                direct = processor.apply_chat_template(messages, tokenize=True, style=style, length=length)
                assert found == direct["input_ids"][0].tolist(), (style, length, options)
                talk = Conversation(
                    style or default_style(system_prompt),
                    (Message("user", "How many?", options=options), Message("assistant", "A")),
                )
                evaluated = processor.preprocessor.encode_prompt(Example("x", (), (talk,)), length=length)
                assert evaluated.input_ids.tolist() == found
    if system_prompt is SystemPrompt.style_and_length:
        said = processor.apply_chat_template(messages_of(["Say."], []), style="long_caption", length=7)
        assert said.endswith("long_caption 7: Say.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = params_from_dict({"version": 2, "models": {"x": {"preset": "demo"}}}, "test").models["x"]
    built = build_model(model, seed=1)
    built.save_pretrained(folder)
    vocab = built.config.text_config.vocab_size
    MolmoProcessor(make_preprocessor(vocab_size=vocab)).save_pretrained(folder)
    return folder


def test_a_batch_of_prompts_is_answered_like_each_alone(checkpoint: Path) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, MolmoProcessor)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    images = [pictures(1), [], pictures(3)]
    texts = [processor.apply_chat_template(messages_of(["Read it."], some)) for some in images]
    batch = processor(texts, images)
    assert batch["input_ids"].shape[0] == 3
    said = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    alone = []
    for text, some in zip(texts, images, strict=True):
        one = processor(text, some or None)
        alone.append(model.generate(**one, max_new_tokens=5, do_sample=False)[0, one["input_ids"].shape[1] :])
    assert processor.batch_decode(said) == processor.batch_decode(alone)


def test_what_is_saved_comes_back(checkpoint: Path, tmp_path: Path) -> None:
    processor = MolmoProcessor.from_pretrained(checkpoint)
    processor.save_pretrained(tmp_path)
    again = MolmoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template == (tmp_path / "chat_template.jinja").read_text()
    assert again.config == processor.config
    # any program that knows tokenizers alone gets the same text
    text = again.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=again.chat_template,
                                               tokenize=False)  # fmt: skip
    assert text == again.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.slow
def test_one_import_is_all_that_a_fresh_process_needs(checkpoint: Path) -> None:
    code = f"""
import molmo_model.processing
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(checkpoint)!r})
model = AutoModelForImageTextToText.from_pretrained({str(checkpoint)!r})
inputs = processor.apply_chat_template([{{"role": "user", "content": "Read it."}}], tokenize=True)
print(len(processor.batch_decode(model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1]:])))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1"]


def test_what_does_not_fit_is_refused() -> None:
    processor = MolmoProcessor(make_preprocessor())
    text = processor.apply_chat_template(messages_of(["Hi"], pictures(1)))
    assert text.count(IMAGE) == 1
    with pytest.raises(DataError, match=r"1 <\|image\|> for 2 images"):
        processor(text, pictures(2))
    with pytest.raises(DataError, match="does not begin with"):
        processor("Hi " + IMAGE, pictures(1))
    with pytest.raises(DataError, match="take turns"):
        processor.apply_chat_template([{"role": "assistant", "content": "Hi"}])
    with pytest.raises(DataError, match="end with a question"):
        processor.apply_chat_template(messages_of(["Hi", "Yes"], []))
    with pytest.raises(DataError, match="'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}])
    with pytest.raises(DataError, match="give a PIL image"):
        as_image(3)


def test_pictures_for_a_token_selector_are_refused() -> None:
    processor = MolmoProcessor(make_preprocessor(selector_tokens=4))
    messages = messages_of(["What is it?"], pictures(1))
    with pytest.raises(ConfigError, match=r"python -m pipelines\.generate"):
        processor.apply_chat_template(messages, tokenize=True)
    with pytest.raises(ConfigError, match=r"python -m pipelines\.generate"):
        processor(processor.apply_chat_template(messages), pictures(1))
    text = processor.apply_chat_template(messages_of(["What is it?"], []), tokenize=True)
    assert text.keys() == {"input_ids", "attention_mask", "mm_token_type_ids"}


def turned(orientation: int) -> dict[str, Any]:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


COLOUR = np.random.default_rng(5).integers(0, 256, (24, 40, 4), dtype=np.uint8)
DEEP = np.random.default_rng(6).integers(0, 65536, (24, 40), dtype=np.uint16)
FILES = {
    "jpeg": saved(PIL.Image.fromarray(COLOUR[..., :3]), "JPEG"),
    "turned jpeg": saved(PIL.Image.fromarray(COLOUR[..., :3]), "JPEG", **turned(6)),
    "turned grey png": saved(PIL.Image.fromarray(COLOUR[..., 0]), "PNG", **turned(5)),
    "alpha": saved(PIL.Image.fromarray(COLOUR), "PNG"),
    "turned alpha": saved(PIL.Image.fromarray(COLOUR), "PNG", **turned(8)),
    "transparent colour": saved(PIL.Image.fromarray(COLOUR[..., 0] // 64 * 64), "PNG", transparency=64),
    "16 bits": saved(PIL.Image.fromarray(DEEP), "PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_pil_image_is_read_like_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.bin"
    path.write_bytes(FILES[name])
    by_path = as_image(path)
    with PIL.Image.open(path) as opened:
        size = opened.size
        by_image = as_image(opened)
        assert opened.size == size  # what is the caller's stays as it is
    assert (by_image.width, by_image.height) == (by_path.width, by_path.height)
    assert (size != (by_image.width, by_image.height)) is name.startswith("turned")
    assert np.array_equal(decode_image(by_image.data), decode_image(by_path.data))


def test_transparency_is_white_and_16_bits_keep_their_high_byte() -> None:
    clear = PIL.Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    assert (decode_image(as_image(clear).data) == 255).all()
    for deep in (DEEP, PIL.Image.fromarray(DEEP)):
        assert np.array_equal(decode_image(as_image(deep).data)[..., 0], DEEP >> 8)
