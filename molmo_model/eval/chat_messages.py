"""A question as a request of OpenAI's chat API: what the engine `openai` sends (`eval.served`).

The messages hold the texts of the conversation as evaluation words them, choices and templates included, but without
what a model's prompt format puts around them: the tag of the style and the frame of roles. Those are written by the
server, from the chat template that `pipelines.export` puts beside the weights, or by our own server from the
checkpoint's preprocessor. The template is told the style (`chat_template_kwargs`, which vLLM and SGLang know), so what
the model reads is to the letter what `molmo_model.preprocessing.prompts.asked` writes.

Pictures travel as the original bytes of their files and stand in front of all text, as in training.
"""

import base64
from collections.abc import Mapping
from typing import Any

from molmo_model.artifacts import Manifest, digest_of
from molmo_model.data.example import Image
from molmo_model.decoding import DecodingConfig
from molmo_model.errors import EvaluationError
from molmo_model.eval.answering import Asking, Question
from molmo_model.model_config import SystemPrompt
from molmo_model.preprocessing.prompts import PromptFormat, bodies

FINGERPRINT = "molmo-"
"""How `system_fingerprint` begins where the answer comes from `pipelines.serve`; foreign servers have others."""
WITHOUT_TAG = (SystemPrompt.none, SystemPrompt.no_style)
"""Models whose prompts do not depend on the style: servers that know no `chat_template_kwargs` do for them."""
NOT_ANSWERING = ("params.json", "model.safetensors.index.json", "chat_template.jinja")
"""Files of a checkpoint that no answer of this project's code depends on."""


def fingerprint(checkpoint: Manifest) -> str:
    """What tells the answers of one checkpoint from those of another: a digest over its weights, configuration,
    preprocessor and tokenizer."""
    files = {name: entry.sha256 for name, entry in checkpoint.files.items() if "/" not in name}
    return FINGERPRINT + digest_of({name: digest for name, digest in files.items() if name not in NOT_ANSWERING})[:16]


def chat_request(question: Question, form: PromptFormat, model: str, asking: Asking) -> dict[str, Any]:
    """The body of a request to `/chat/completions`, plain JSON.

    Args:
        question: with the bytes of its pictures.
        form: how the checkpoint writes prompts.
        model: what the server calls it.

    Raises:
        DataError: the conversation cannot be written.
        EvaluationError: the example has films, which no message of this API holds.
    """
    require_pictures(question)
    example = question.example
    turns: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(bodies(example.conversations[question.conversation], form))
    ]
    if example.images:
        pictures = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in example.images]
        turns[0]["content"] = [*pictures, {"type": "text", "text": turns[0]["content"]}]
    return {
        "model": model,
        "messages": turns,
        "max_tokens": asking.max_new_tokens,
        **sampling(asking.decoding),
        **_template(question, form),
    }


def unsendable(asking: Asking) -> list[str]:
    """What of a task's settings OpenAI's API has no parameter for, under the names that they have there."""
    decoding = asking.decoding
    reasons = {
        f"num_beams {decoding.num_beams}": decoding.num_beams > 1,
        f"no_repeat_ngram_size {decoding.no_repeat_ngram_size}": decoding.no_repeat_ngram_size != 0,
        f"keep_image_tokens {asking.keep_image_tokens:g}": asking.keep_image_tokens != 1,
        f"max_crops {asking.max_crops}": asking.max_crops is not None,
        f"max_frames {asking.max_frames}": asking.max_frames is not None,
        "kind loss": asking.measure,
    }
    return [reason for reason, holds in reasons.items() if holds]


def require_pictures(question: Question) -> None:
    """Raises `EvaluationError` for an example with films."""
    if question.example.videos:
        raise EvaluationError(
            f"example {question.example.id} has a film; the engine openai sends pictures only, use another one"
        )


def data_uri(image: Image) -> str:
    """A picture's file as text."""
    return f"data:image/{image.format.lower()};base64,{base64.b64encode(image.data).decode('ascii')}"


def sampling(decoding: DecodingConfig) -> dict[str, Any]:
    """The parameters of a request that draw as `decoding` says; those beyond OpenAI's own, under vLLM's names, only
    where they say something."""
    chosen: dict[str, Any] = {"temperature": 0, "seed": decoding.seed}
    if decoding.do_sample:
        chosen |= {"temperature": decoding.temperature, "top_p": decoding.top_p}
        chosen |= {"top_k": decoding.top_k} if decoding.top_k else {}
    if decoding.repetition_penalty != 1.0:
        chosen["repetition_penalty"] = decoding.repetition_penalty
    if decoding.min_new_tokens:
        chosen["min_tokens"] = decoding.min_new_tokens
    return chosen


def _template(question: Question, form: PromptFormat) -> Mapping[str, Any]:
    """What the server's chat template must know besides the messages."""
    if form.system_prompt in WITHOUT_TAG:
        return {}
    style = question.example.conversations[question.conversation].style
    length = {} if question.length is None else {"length": question.length}
    return {"chat_template_kwargs": {"style": style, **length}}
