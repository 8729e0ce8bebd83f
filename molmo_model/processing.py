"""A checkpoint folder as transformers' programs know one: processor and chat template around the `Preprocessor`.

Importing this module registers everything, after which a folder loads by itself:

    import molmo_model.processing
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, tokenize=True)
    print(processor.batch_decode(model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1]:]))

The template's text has the tokens that the `Preprocessor` makes of the same conversation. Text that spells a special
token is read as that token where it comes as a prompt, as in all of transformers, and is spelled out where it comes as
messages with `tokenize=True`.
"""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor, BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template

from molmo_model.data.example import Conversation, Example, Image, Message
from molmo_model.errors import ConfigError, DataError
from molmo_model.model_config import CHATML_END, CHATML_START, MessageFormat, SystemPrompt
from molmo_model.nn.molmo import MolmoForConditionalGeneration  # noqa: F401 - registers the model
from molmo_model.nn.molmo_config import MolmoConfig
from molmo_model.preprocessing.collator import collate_prompts
from molmo_model.preprocessing.image import decode_image, upright_rgb
from molmo_model.preprocessing.preprocessor import IGNORE, PREFIX_SEGMENT, Encoded, Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.prompts import bodies, end_of_answer
from molmo_model.preprocessing.system_prompts import (
    CAPTION_STYLES,
    EVAL_STYLES,
    LENGTH_RULES,
    default_style,
    untagged,
)

TEMPLATE_FILE = "chat_template.jinja"
IMAGE = "<|image|>"
"""Where an image's tokens go, in the text of a prompt."""
INPUTS = ("input_ids", "attention_mask")
IMAGE_INPUTS = ("pixel_values", "pooling", "image_token_counts", "patch_masks", "crop_frames", "crop_videos")
"""What of a batch `generate` takes."""
SELECTS = (
    "this model selects image tokens by the question, which transformers' generate has no step for; "
    "ask it with `python -m pipelines.generate`"
)
"""Why a HeMolmo gets no pictures here."""
_TEMPLATE = """\
{%- set seen = namespace(images=0, number=0) -%}
{%- for message in messages -%}{%- if message.content is not string -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set seen.images = seen.images + 1 -%}{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}
{{- @BEGIN@ -}}
{%- for number in range(1, seen.images + 1) -%}
{%- if seen.images > 1 -%}{{- 'Image ' ~ number -}}{%- endif -%}{{- '@IMAGE@' -}}
{%- endfor -%}
{%- for message in messages -%}
{%- set body -%}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message.role == 'assistant' -%}@ANSWER@
{%- else -%}
{%- if loop.first -%}{%- set body = @SYSTEM@ ~ body -%}{%- endif -%}@QUESTION@
{%- endif -%}
{%- endfor -%}
"""
_FRAMES = {
    MessageFormat.none: ("{{- ' ' ~ body -}}", "{{- ('' if loop.first else ' ') ~ body -}}"),
    MessageFormat.role: (
        "{{- ' ' ~ body -}}",
        "{{- ('' if loop.first else ' ') ~ 'User: ' ~ body ~ ' Assistant:' -}}",
    ),
    MessageFormat.chatml: (
        "{{- body -}}",
        f"{{{{- ('' if loop.first else '\\n') ~ '{CHATML_START}user\\n' ~ body ~ '{CHATML_END}\\n"
        f"{CHATML_START}assistant\\n' -}}}}",
    ),
}
"""How an answer and a question are framed, as jinja."""


def chat_template(preprocessor: Preprocessor) -> str:
    """The jinja template that writes what the preprocessor tokenizes: begin, images, then the messages in turn.

    `style` may be given to it where the model was trained with a tag of the style, and `length` where captions were
    tagged with theirs. It writes questions as they come: `MolmoProcessor.apply_chat_template` puts choices and the
    wording that a style has around its questions into them.
    """
    config, tokenizer = preprocessor.config, preprocessor.tokenizer
    begin = tokenizer.bos_token or tokenizer.eos_token
    end = end_of_answer(config.message_format) or tokenizer.eos_token
    said, asked = _FRAMES[config.message_format]
    system = _tag(config.system_prompt, config.caption_length)
    replaced = {"@BEGIN@": repr(begin), "@IMAGE@": IMAGE, "@ANSWER@": f"{said}{{{{- {end!r} -}}}}"}
    replaced |= {"@SYSTEM@": system, "@QUESTION@": asked}
    text = _TEMPLATE
    for name, value in replaced.items():
        text = text.replace(name, value)
    return text


def _tag(system_prompt: SystemPrompt, length: int) -> str:
    """The tag before the first question and the blank behind it, as a jinja expression of `style` and `length`."""
    if system_prompt in (SystemPrompt.none, SystemPrompt.no_style):
        return "''"
    style = f"(style or '{default_style(system_prompt)}')"
    style = f"({dict(sorted(EVAL_STYLES.items()))!r}.get({style}, {style}))"
    tag = f"({style} ~ ': ')"
    if plain := sorted(untagged(system_prompt)):
        return f"('' if {style} in {plain!r} else {tag})"
    if (rule := LENGTH_RULES.get(system_prompt)) is None:
        return tag
    asked = f"({length} if length is undefined or length is none else length)"
    long = f"({style} ~ (' ' ~ {asked} ~ ': ' if {asked} else '{rule.unknown} '))"
    return f"({long} if {style} in {sorted(CAPTION_STYLES)!r} else {tag})"


class MolmoProcessor:
    """Text and images to the inputs of `generate`, and token ids back to text."""

    def __init__(self, preprocessor: Preprocessor, template: str | None = None) -> None:
        self.preprocessor = preprocessor
        self.chat_template = template or chat_template(preprocessor)

    @property
    def tokenizer(self) -> Any:
        return self.preprocessor.tokenizer

    @property
    def config(self) -> PreprocessorConfig:
        return self.preprocessor.config

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "MolmoProcessor":
        """The processor of a checkpoint folder; what else transformers hands over is not needed.

        Raises:
            CheckpointError: the folder has no `molmo_preprocessor.json`.
        """
        path = Path(folder) / TEMPLATE_FILE
        template = path.read_text(encoding="utf-8") if path.is_file() else None
        return cls(Preprocessor.from_pretrained(folder), template)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the preprocessor's config, the tokenizer and `chat_template.jinja`."""
        self.preprocessor.save_pretrained(folder)
        (Path(folder) / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenize: bool = False,
        style: str | None = None,
        length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation as prompt text, or with `tokenize` as the inputs of `generate`.

        Args:
            messages: `{"role": "user" or "assistant", "content": text or parts}` in turn, the last one a question;
                a part is `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`. Images stand in front of
                all text, wherever they were given. A question may have `"options": [text, ...]` to choose from.
            style: task family, for models whose prompts depend on it; None is that of a question as people ask it.
            length: of a caption, in units of 15 letters, for models that were told it (`style_and_length`); 0 says
                nothing, None what the model's evaluation says.
            kwargs: variables of the template; `add_generation_prompt` changes nothing, a question always asks.

        Raises:
            ConfigError: with `tokenize`, images for a model with a token selector.
            DataError: another part or role, or turns out of order.
        """
        images, turns = _read_messages(messages)
        style = style or default_style(self.config.system_prompt)
        talk = Conversation(style, (*turns, Message("assistant", "A")))  # a placeholder: it is not looked at
        if tokenize:
            return self._batch(
                [self.preprocessor.encode_prompt(Example("prompt", tuple(images), (talk,)), length=length)]
            )
        kwargs.setdefault("add_generation_prompt", True)
        written: list[dict[str, Any]] = [
            {"role": turn.role, "content": text}
            for turn, text in zip(turns, bodies(talk, self.config.prompts), strict=True)
        ]
        if images:
            written[0]["content"] = [
                *({"type": "image"} for _ in images),
                {"type": "text", "text": written[0]["content"]},
            ]
        (text,), _ = render_jinja_template(
            [written], chat_template=self.chat_template, style=style, length=length, **kwargs
        )
        return text

    def __call__(self, text: str | Sequence[str], images: Any = None, **kwargs: Any) -> BatchFeature:
        """Prompts, as `apply_chat_template` writes them, to the inputs of `generate`, padded on the left.

        Args:
            images: PIL images, arrays [H, W, 3], encoded files or paths: one list for one prompt, a list of lists for
                several.

        Raises:
            ConfigError: images for a model with a token selector, or whose images come after the question.
            DataError: a prompt does not begin as the template's do, or has other than one mark per image.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if images is None:
            per_text: list[Any] = [[] for _ in texts]
        elif isinstance(text, str):
            per_text = [images if isinstance(images, list | tuple) else [images]]
        else:
            per_text = list(images)
        if len(per_text) != len(texts):
            raise DataError(f"{len(texts)} prompts but {len(per_text)} lists of images; give one list for each prompt")
        pairs = zip(texts, per_text, strict=True)
        return self._batch([self._encode(prompt, [as_image(image) for image in some]) for prompt, some in pairs])

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """The texts of token ids, without special tokens."""
        return [self.decode(row) for row in sequences]

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """The text of token ids, without special tokens."""
        return self.preprocessor.decode(ids.tolist() if hasattr(ids, "tolist") else list(ids))

    def _encode(self, prompt: str, images: Sequence[Image]) -> Encoded:
        """A prompt's text as the preprocessor would have made it of the messages."""
        if self.config.selector_tokens and images:
            raise ConfigError(SELECTS)
        if self.config.question_first or self.config.selector_tokens:
            raise ConfigError("this model's images depend on the question; use apply_chat_template(..., tokenize=True)")
        begin = self.tokenizer.bos_token or self.tokenizer.eos_token
        marks = [f"Image {number}{IMAGE}" for number in range(1, len(images) + 1)] if len(images) > 1 else None
        head = begin + "".join(marks or [IMAGE] * len(images))
        if not prompt.startswith(head) or IMAGE in prompt[len(head) :]:
            raise DataError(
                f"the prompt has {prompt.count(IMAGE)} {IMAGE} for {len(images)} images, or does not begin with "
                f"{head!r}; write it with apply_chat_template"
            )
        blank = Conversation("qa", (Message("user", "?"), Message("assistant", "?")))
        base = self.preprocessor.encode_prompt(Example("prompt", tuple(images), (blank,)))
        prefix = int((base.segment_ids == PREFIX_SEGMENT).sum())
        question = self._text_ids(prompt[len(head) :])
        length = prefix + len(question)
        return dataclasses.replace(
            base,
            input_ids=np.concatenate([base.input_ids[:prefix], question]),
            labels=np.full(length, IGNORE),
            loss_weights=np.zeros(length, dtype=np.float32),
            position_ids=np.arange(length),
            segment_ids=np.concatenate([base.segment_ids[:prefix], np.zeros(len(question), dtype=np.int64)]),
            image_ids=np.concatenate([base.image_ids[:prefix], np.zeros(len(question), dtype=np.int64)]),
            prompt_text=prompt[len(head) :],
        )

    def _text_ids(self, text: str) -> Any:
        """Ids of the messages: special tokens of the template by name, text between them as text."""
        vocabulary = self.preprocessor.vocabulary
        special = {self.tokenizer.eos_token, CHATML_START, CHATML_END} & set(self.tokenizer.get_vocab())
        pieces = re.split("(" + "|".join(map(re.escape, sorted(special))) + ")", text)
        ids = [vocabulary.special_id(piece) if piece in special else vocabulary.encode(piece) for piece in pieces]
        return np.concatenate([np.atleast_1d(np.asarray(piece, dtype=np.int64)) for piece in ids])

    def _batch(self, prompts: list[Encoded]) -> BatchFeature:
        batch = collate_prompts(prompts, self.config, self.preprocessor.pad_id)
        if self.config.selector_tokens and len(batch["pooling"]):
            raise ConfigError(SELECTS)  # `generate` would take none of the selector's arrays, nor the positions
        names = INPUTS + (IMAGE_INPUTS if len(batch["pooling"]) else ())  # `generate` counts positions from the mask
        inputs = {name: batch[name] for name in names if name in batch}
        return BatchFeature({**inputs, "mm_token_type_ids": batch["image_ids"]})


def as_image(source: Any) -> Image:
    """A picture of a PIL image, an array [H, W, 3] of bytes, an encoded file, or a path; one reading for all of them.

    Raises:
        DataError: it is none of these, or cannot be read.
    """
    import PIL.Image

    if isinstance(source, Image):
        return source
    if isinstance(source, np.ndarray):
        source = PIL.Image.fromarray(source)
    if isinstance(source, PIL.Image.Image):
        buffer = io.BytesIO()
        source = upright_rgb(source)
        source.save(buffer, "PNG")
        return Image(buffer.getvalue(), source.width, source.height, "PNG")
    if isinstance(source, str | Path):
        try:
            data, name = Path(source).read_bytes(), str(source)
        except OSError as error:
            raise DataError(f"image {source} cannot be read: {error.strerror}") from error
    elif isinstance(source, bytes):
        data, name = source, "image"
    else:
        raise DataError(f"an image is a {type(source).__name__}; give a PIL image, an array, a file's bytes or a path")
    height, width = decode_image(data, name=name).shape[:2]
    return Image(data, width, height, Path(name).suffix.lstrip(".").upper() or "PNG")


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Image], list[Message]]:
    images, turns = [], []
    for number, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise DataError(f"message {number} is of role {message['role']!r}; user and assistant take turns")
        content = message["content"]
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "image" and number % 2 == 0:
                images.append(as_image(part.get("image", part.get("path"))))
            else:
                raise DataError(f"message {number} has a part of type {part['type']!r}; questions have text and image")
        turns.append(Message(message["role"], text, options=tuple(message.get("options", ()))))
    if len(turns) % 2 == 0:
        raise DataError("the last message is an answer; end with a question")
    return images, turns


AutoProcessor.register(MolmoConfig, MolmoProcessor)
