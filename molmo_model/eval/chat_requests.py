"""Requests of OpenAI's chat API as questions to our model: what `pipelines.serve` takes, and what it refuses.

A request is trusted with nothing: every field is checked, pictures are bounded before they are decoded. A parameter
that would change the answer and cannot be honoured is refused by name, never passed over; one that asks for nothing
(`n: 1`, `presence_penalty: 0`) or that is only for the sender's books (`user`, `metadata`) is passed over.

Questions are put as evaluation puts them. Beyond OpenAI's parameters there are `style`, `options` and `length`, as of
`pipelines.generate`: the question is worded as questions of that style are. With `chat_template_kwargs` (`style`,
`length`) the messages are taken to the letter, as servers with the checkpoint's chat template take them; that is how
the engine `openai` sends questions whose wording is done (`eval.chat_messages`).
"""

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from molmo_model.artifacts import digest_of
from molmo_model.config import DecodingConfig, read_decoding
from molmo_model.data.example import UNLABELLED_STYLES, Conversation, Example, Image, Message
from molmo_model.errors import ConfigError, DataError
from molmo_model.eval.answering import Asking, Question
from molmo_model.preprocessing.image import decode_image

MAX_IMAGE_BYTES = 32 * 2**20
"""Of one picture's file."""
MAX_IMAGES = 64
"""Of one request. How many of them have room is up to the model's positions."""
MAX_MESSAGES = 200
MAX_LETTERS = 1_000_000
"""Of all texts of a request together."""
MAX_STOPS = 16
SEEDS = 10**18
"""Different seeds that the params know; others are taken modulo that."""
NAME_LETTERS = 100
"""Of a style's name."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "min_p": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
}
"""Parameters with the values at which they ask for nothing; `null` always is one."""
IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"),
        *("request_id", "priority", "cache_salt"),
    }
)
"""Parameters that no answer depends on."""
READ = frozenset(
    {
        *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"),
        *("repetition_penalty", "min_tokens", "stop", "stream", "stream_options"),
        *("style", "options", "length", "chat_template_kwargs"),
    }
)


class RequestError(Exception):
    """Why a request is refused, in OpenAI's terms.

    Attributes:
        status: of HTTP.
        param: the parameter at fault, if it is one.
        code: a word for programs.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Rules:
    """What a server takes."""

    model: str
    """The only model's name."""
    style: str
    """Of questions that name none."""
    fetch: Callable[[str], bytes] | None = None
    """A picture at an http or https URL; None refuses those. Raises `DataError`."""
    max_new_tokens: int = 256
    """Where a request does not say."""


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered."""

    question: Question
    asking: Asking
    verbatim: bool = False
    """The messages are worded already: only tag and frame are put around them."""
    stop: tuple[str, ...] = ()
    """The answer ends in front of the first of these."""
    stream: bool = False
    usage: bool = False
    """A stream ends with the usage."""


def parse_json(body: bytes) -> Any:
    """A request's body.

    Raises:
        RequestError: it is no JSON, or JSON of a depth or with numbers that none needs.
    """
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from error


def read_request(raw: Any, rules: Rules) -> ChatRequest:
    """The question in a request's body.

    Raises:
        RequestError: naming the parameter at fault.
    """
    if not isinstance(raw, dict):
        _refuse("the body must be a JSON object", None)
    raw = {name: value for name, value in raw.items() if value is not None}
    _check_names(raw)
    if (model := raw.get("model")) != rules.model:
        message = f"the model {str(model)[:NAME_LETTERS]!r} is not served here, only {rules.model!r}"
        raise RequestError(message, "model", "model_not_found", 404)
    options = _object(raw.get("stream_options", {}), "stream_options")
    try:
        question, verbatim = read_question(raw, rules)
        return ChatRequest(
            question,
            read_asking(raw, rules.max_new_tokens),
            verbatim,
            _stops(raw.get("stop", [])),
            _flag(raw.get("stream", False), "stream"),
            _flag(options.get("include_usage"), "stream_options.include_usage"),
        )
    except (DataError, ConfigError) as error:
        raise RequestError(str(error)) from error


def read_asking(raw: Mapping[str, Any], max_new_tokens: int) -> Asking:
    """How the answer is to be generated: greedy unless there is a temperature above 0.

    Args:
        max_new_tokens: where the request does not say.

    Raises:
        RequestError, ConfigError: naming the parameter at fault.
    """
    asked = {_whole(raw[name], name, 1) for name in ("max_tokens", "max_completion_tokens") if name in raw}
    if len(asked) > 1:
        _refuse(f"max_tokens and max_completion_tokens are {sorted(asked)}; give one of them", "max_tokens")
    temperature, top_p = _number(raw.get("temperature", 0), "temperature"), _number(raw.get("top_p", 1), "top_p")
    seed, top_k = _whole(raw.get("seed", 0), "seed", None), _whole(raw.get("top_k", 0), "top_k", -1)
    settings = {
        "repetition_penalty": _number(raw.get("repetition_penalty", 1), "repetition_penalty"),
        "min_new_tokens": _whole(raw.get("min_tokens", 0), "min_tokens", 0),
    }
    if temperature:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": max(top_k, 0)}
        settings |= {**drawn, "seed": seed % SEEDS}
    most = asked.pop() if asked else max_new_tokens
    return Asking(most, _decoding(settings, most))


def read_question(raw: Mapping[str, Any], rules: Rules) -> tuple[Question, bool]:
    """The messages as the question of an example, and whether they are to be taken to the letter.

    Raises:
        RequestError, DataError: naming the message at fault.
    """
    verbatim, given = "chat_template_kwargs" in raw, raw
    if verbatim:
        given = _object(raw["chat_template_kwargs"], "chat_template_kwargs")
        if unknown := sorted(set(given) - {"style", "length"}):
            _refuse(
                f"the chat template knows style and length, not {unknown[0][:NAME_LETTERS]!r}", "chat_template_kwargs"
            )
        if twice := sorted({"style", "options", "length"} & set(raw)):
            _refuse(f"{twice[0]} words a question that chat_template_kwargs takes to the letter; give one", twice[0])
    style = given.get("style") or rules.style
    if not isinstance(style, str) or len(style) > NAME_LETTERS:
        _refuse("style must be the name of a task family", "style")
    length = _whole(given["length"], "length", 0) if given.get("length") is not None else None
    images, turns = _messages(raw.get("messages"), rules)
    options = _options(raw.get("options", []))
    turns[-1] = Message("user", turns[-1].text, options=options)
    # the answer is not looked at; it stands there because a conversation ends with one
    answer = Message("assistant", options[0] if style in UNLABELLED_STYLES and options else "A")
    talk = Conversation(style, (*turns, answer))
    # engines take questions of one example to be about the same pictures, and then read those once
    name = "request-" + digest_of([image.sha256 for image in images])[:16]
    return Question(Example(name, tuple(images), (talk,)), length=length), verbatim


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A text up to the first of `stops`, and whether one is in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _messages(raw: Any, rules: Rules) -> tuple[list[Image], list[Message]]:
    """Pictures and turns, user and assistant in turn, the last one a question."""
    if not isinstance(raw, list) or not 0 < len(raw) <= MAX_MESSAGES:
        _refuse(f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    images: list[Image] = []
    turns: list[Message] = []
    for place, message in enumerate(raw):
        where, role = f"messages[{place}]", ("user", "assistant")[place % 2]
        said = _object(message, where).get("role")
        if said in ("system", "developer"):
            _refuse(
                f"{where} is of role {said}: this model knows no system prompt, and leaving it out would change the "
                "answer; write it into the question",
                "messages",
            )
        if said != role:
            _refuse(f"{where} is of role {str(said)[:NAME_LETTERS]!r}; user and assistant take turns", "messages")
        text = _content(message.get("content"), where, images if role == "user" else None, rules)
        turns.append(Message(role, text or (None if role == "user" else text)))
    if (letters := sum(len(turn.text or "") for turn in turns)) > MAX_LETTERS:
        _refuse(f"the messages have {letters} letters, more than {MAX_LETTERS}", "messages", 413)
    if len(turns) % 2 == 0:
        _refuse("the last message is an assistant's; end with a question", "messages")
    return images, turns


def _content(raw: Any, where: str, images: list[Image] | None, rules: Rules) -> str:
    """The text of a message; its pictures are put into `images`, None where it may have none."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        _refuse(f"{where}.content must be text or a list of parts", "messages")
    text = ""
    for number, part in enumerate(raw):
        place = f"{where}.content[{number}]"
        kind = _object(part, place).get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image_url" and images is not None:
            if len(images) == MAX_IMAGES:
                _refuse(f"{place}: a request has {MAX_IMAGES} images at most", "messages")
            images.append(_image(part.get("image_url"), f"{place}.image_url", rules))
        else:
            _refuse(
                f"{place} is of type {str(kind)[:NAME_LETTERS]!r}; a question has parts of type text and image_url, an "
                "answer of type text",
                "messages",
            )
    return text


def _image(raw: Any, where: str, rules: Rules) -> Image:
    """A picture, decoded once to know that it can be. `detail` is not looked at: the model has its own crops."""
    url = raw if isinstance(raw, str) else _object(raw, where).get("url")
    if not isinstance(url, str):
        _refuse(f"{where}.url must be text", "messages")
    if url[:5].lower() == "data:":
        data = _data(url, where)
    elif rules.fetch is None or url[:7].lower() not in ("http://", "https:/"):
        _refuse(f"{where}.url must be a data: URI with base64; this server opens no URLs", "messages")
    else:
        data = rules.fetch(url)
    pixels = decode_image(data, name=where)
    return Image(data, pixels.shape[1], pixels.shape[0], "PNG")  # the format is a label; decoding looks at the bytes


def _data(url: str, where: str) -> bytes:
    """The bytes of a `data:` URI."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        _refuse(f"{where}.url is no data:image/...;base64,... URI", "messages")
    if len(body) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        _refuse(f"{where}: the file has more than {MAX_IMAGE_BYTES} bytes; make it smaller", "messages", 413)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        _refuse(f"{where}.url is no valid base64: {error}", "messages")


def _check_names(raw: Mapping[str, Any]) -> None:
    """Refuses what would change the answer and cannot be honoured."""
    for name, value in raw.items():
        if name in READ or name in IGNORED:
            continue
        if name not in NEUTRAL:
            _refuse(f"the parameter {name[:NAME_LETTERS]!r} is not known here; leave it out", name[:NAME_LETTERS])
        if value not in NEUTRAL[name]:
            neutral = " or ".join(json.dumps(one) for one in NEUTRAL[name])
            _refuse(f"{name} must be {neutral}: this server cannot do otherwise", name)


def _decoding(settings: Mapping[str, Any], max_new_tokens: int) -> DecodingConfig:
    """Checked as in the params."""
    return read_decoding([f"{name}={json.dumps(value)}" for name, value in settings.items()], max_new_tokens, "request")


def _stops(raw: Any) -> tuple[str, ...]:
    stops = [raw] if isinstance(raw, str) else raw
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(one, str) and one for one in stops):
        _refuse(f"stop must be a text, or a list of at most {MAX_STOPS}, none of them empty", "stop")
    return tuple(stops)


def _options(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(option, str) for option in raw):
        _refuse("options must be a list of texts", "options")
    return tuple(raw)


def _object(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        _refuse(f"{where} must be a JSON object", where.partition("[")[0])
    return raw


def _flag(raw: Any, name: str) -> bool:
    if raw is not None and not isinstance(raw, bool):
        _refuse(f"{name} must be true or false", name)
    return bool(raw)


def _number(raw: Any, name: str) -> float:
    if not isinstance(raw, int | float) or isinstance(raw, bool) or abs(raw) > 1e9 or not math.isfinite(raw):
        _refuse(f"{name} must be a number", name)
    return float(raw)


def _whole(raw: Any, name: str, least: int | None) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or abs(raw) > 2**63:
        _refuse(f"{name} must be a whole number", name)
    if least is not None and raw < least:
        _refuse(f"{name} is {raw}; it must be at least {least}", name)
    return int(raw)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _refuse(message: str, param: str | None, status: int = 400) -> NoReturn:
    raise RequestError(message, param, status=status)
