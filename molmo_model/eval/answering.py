"""What stage 1 of evaluation asks of an engine: questions in, answers out, in whatever order suits it.

The engines are `eval.inference` (transformers' `generate`), `eval.slot_inference` (our decoder) and `eval.served` (a
server with OpenAI's API). No torch here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from molmo_model.data.example import Example
from molmo_model.decoding import DecodingConfig


@dataclass(frozen=True)
class Question:
    """The last question of one conversation of an example."""

    example: Example
    conversation: int = 0
    length: int | None = None
    """About how long a caption is asked for; see `Preprocessor.encode_prompt`."""


@dataclass(frozen=True)
class Answer:
    """What the model said, or what was measured on the reference answer."""

    text: str
    finish_reason: str
    """`stop` if the model ended its answer, `length` if it was cut off."""
    tokens: int
    """Tokens of the answer, without the one that ends it."""
    prompt_tokens: int
    """Tokens in front of it, those of images included."""
    measured: Mapping[str, float] | None = None
    """Of a task of kind `loss`: `nll` (sum over the answer's tokens, nats), `tokens` and `right` (greedy hits)."""


@dataclass(frozen=True)
class Asking:
    """How a task asks: all of it can change an answer."""

    max_new_tokens: int
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    keep_image_tokens: float = 1.0
    """Share of each image's tokens that the language model sees."""
    measure: bool = False
    """Measure the loss on the reference answers instead of asking for one."""
    max_crops: int | None = None
    """Most crops of a picture, in place of the checkpoint's; `eval.limits` makes the preprocessor."""
    max_frames: int | None = None
    """Most frames of a film, in place of the checkpoint's."""


class Answering(Protocol):
    """An engine with one model."""

    @property
    def made(self) -> Mapping[str, Any]:
        """Circumstances that should not change an answer (device, threads, slots), recorded beside every answer."""
        ...

    def answers(
        self, questions: Sequence[Question], read: Callable[[int], Question], asking: Asking
    ) -> Iterator[tuple[int, Answer]]:
        """Answers with the numbers of their questions, each once, as they come.

        Args:
            questions: without the bytes of pictures and films (`eval.tasks.Item.example`): for costs and order.
            read: the question of a number, with the bytes; called once, shortly before it is needed.
        """
        ...
