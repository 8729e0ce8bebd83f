"""What stands before the first question of a conversation: a tag that says which kind of answer is wanted.

    system prompt         long_caption               pointing, user_qa      science_qa     vqa2
    none, no_style        -                          -                      -              -
    style                 long_caption:              pointing:              science_qa:    vqa2:
    demo_or_style         -, or 1 in 10 with a tag   -, or 1 in 10          science_qa:    vqa2:
    demo_or_style_v2      -                          -                      -              vqa2:
    style_and_length      long_caption 83:           pointing:              science_qa:    vqa2:
                          or 1 in 10 long_caption :
    style_and_length_v2   the same, or long_caption:

Tag and question are joined by one blank; a tag alone ends with its colon. The blank in `style :` is that of the models
released in 2024 (allenai/molmo `olmo/data/data_formatter.py`, `get_system_prompt`; the later versions, and the colon
without it: allenai/molmo2 `olmo/preprocessing/data_formatter.py`). There every style but pointing gets a length; they
are only used where all is captions, and here a length is said of captions and transcripts alone.

In evaluation nothing is drawn: demo styles have no tag, and captions the length that is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo_model.model_config import SystemPrompt

DEFAULT_LENGTH = 65
"""Length tag of captions in evaluation, as in the released models."""
TAGGED = 0.1
"""Share of training draws in which a demo style has its tag, so that its answers can also be asked for by name."""
WITH_LENGTH = 0.9
"""Share of training draws in which a caption has its length."""
MOST_NOISE = 4.0
"""Standard deviations beyond which the noise on a length is cut off, so that what a prompt costs has a bound."""

CAPTION_STYLES = frozenset(
    {
        *("caption", "scene_caption", "chart_caption", "clip_caption", "long_caption", "short_caption", "transcript"),
        *("video_long_caption", "video_short_caption", "video_transcript", "video_motion_caption"),
        "video_object_caption",
    }
)
"""Styles whose answer's length can be asked for."""
DEMO_STYLES = frozenset(
    {
        *("pointing", "point_count", "point_then_count", "count_then_point", "cosyn_point"),
        *("user_qa", "correction_qa", "text_sft", "long_caption", "short_caption"),
        *("video_long_caption", "video_short_caption", "video_transcript"),
    }
)
"""What a person gets who types a question and nothing else."""
IMAGE_CHOICE_STYLES = frozenset(
    {
        *("a_okvqa_mc", "ai2_diagram", "ai2_diagram_no_letter", "science_qa", "mantis_instruct_mc"),
        *("multi_image_mc", "multi_image_mc_exp"),
    }
)
VIDEO_CHOICE_STYLES = frozenset(
    {
        *("video_multiple_choice", "video_multiple_choice_count_without_pointing"),
        *("video_multiple_choice_multiple_correct", "video_multiple_choice_w_subtitle"),
    }
)
UNTAGGED_STYLES = frozenset({"demo", "android_control"})
"""Never tagged under `demo_or_style`: they stand for no kind of answer, or bring a tag of their own."""

EVAL_STYLES = {
    "eval_short_answer": "vqa2",
    "eval_multiple_choice": "a_okvqa_mc",
    "eval_multi_image_mc": "multi_image_mc",
    "eval_multi_image_mc_exp": "multi_image_mc_exp",
    "video_eval_short_answer": "video_short_answer",
    "video_eval_multiple_choice": "video_multiple_choice",
    "video_eval_multiple_choice_w_subtitle": "video_multiple_choice_w_subtitle",
}
"""Styles that stand in evaluation sets alone, and the training style that they are asked in."""


@dataclass(frozen=True)
class LengthRule:
    """How a caption of L letters is told its length n."""

    unit: int
    """Letters of one n."""
    letters: float = 0.0
    """Standard deviation of the noise, letters: n = (L + noise) // unit."""
    share: float = 0.0
    """Standard deviation of the noise, share of L: n = int(L * (1 + noise) / unit)."""
    unknown: str = ":"
    """What follows the style where no length is said."""

    def number(self, letters: int, noise: float) -> int:
        """n for `noise` standard deviations."""
        if self.share:
            return int(letters * (1 + self.share * noise) / self.unit)
        return max((letters + int(self.letters * noise)) // self.unit, 0)


LENGTH_RULES = {
    SystemPrompt.style_and_length: LengthRule(15, letters=25, unknown=" :"),
    SystemPrompt.style_and_length_v2: LengthRule(15, letters=25),
    SystemPrompt.style_and_length_v3: LengthRule(25, share=0.05),
}


def train_style(style: str) -> str:
    """The style that a conversation is asked in."""
    return EVAL_STYLES.get(style, style)


def default_style(system_prompt: SystemPrompt) -> str:
    """The style of a question that a person asks without naming one."""
    demo = (SystemPrompt.demo_or_style, SystemPrompt.demo_or_style_v2)
    return "demo" if system_prompt in demo else "qa"


def tags(style: str, system_prompt: SystemPrompt, length: int, letters: Sequence[int]) -> tuple[str, ...]:
    """Every tag that a conversation may get, the one for evaluation first; the empty text is none.

    Args:
        style: that of training.
        length: what evaluation says of captions; 0 says nothing.
        letters: of every answer that the conversation may end with.
    """
    if (rule := _length_rule(style, system_prompt)) is None:
        fixed = _fixed(style, system_prompt)
        return (fixed, f"{style}:") if _drawn(style, system_prompt) else (fixed,)
    least, most = min(letters, default=0), max(letters, default=0)
    numbers = range(rule.number(least, -MOST_NOISE), rule.number(most, MOST_NOISE) + 1)
    every = (_with_length(style, rule, length), *(f"{style} {number}:" for number in numbers), style + rule.unknown)
    return tuple(dict.fromkeys(every))


def draw_tag(
    style: str, system_prompt: SystemPrompt, length: int, letters: int, rng: np.random.Generator | None
) -> str:
    """The tag of one conversation; see `tags`. Draws only where there is a choice.

    Args:
        letters: of the answer that the conversation ends with; of no concern without `rng`.
    """
    rule = _length_rule(style, system_prompt)
    if rng is None:
        return _fixed(style, system_prompt) if rule is None else _with_length(style, rule, length)
    if rule is None:
        drawn = _drawn(style, system_prompt) and rng.random() < TAGGED
        return f"{style}:" if drawn else _fixed(style, system_prompt)
    if rng.random() >= WITH_LENGTH:
        return style + rule.unknown
    noise = float(np.clip(rng.standard_normal(), -MOST_NOISE, MOST_NOISE))
    return f"{style} {rule.number(letters, noise)}:"


def _fixed(style: str, system_prompt: SystemPrompt) -> str:
    """The tag of a conversation without length, where nothing is drawn."""
    return "" if style in untagged(system_prompt) or system_prompt in _NEVER else f"{style}:"


_NEVER = (SystemPrompt.none, SystemPrompt.no_style)


def untagged(system_prompt: SystemPrompt) -> frozenset[str]:
    """The styles that have no tag in evaluation, although others have."""
    if system_prompt is SystemPrompt.demo_or_style:
        return DEMO_STYLES | UNTAGGED_STYLES
    if system_prompt is SystemPrompt.demo_or_style_v2:
        return DEMO_STYLES | UNTAGGED_STYLES | IMAGE_CHOICE_STYLES | VIDEO_CHOICE_STYLES
    return frozenset()


def _drawn(style: str, system_prompt: SystemPrompt) -> bool:
    return system_prompt is SystemPrompt.demo_or_style and style in DEMO_STYLES


def _length_rule(style: str, system_prompt: SystemPrompt) -> LengthRule | None:
    return LENGTH_RULES.get(system_prompt) if style in CAPTION_STYLES else None


def _with_length(style: str, rule: LengthRule, length: int) -> str:
    return f"{style} {length}:" if length else style + rule.unknown
