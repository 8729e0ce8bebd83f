"""AndroidControl: screens of a telephone, what a person wants, and the next action.

The makers publish TFRecords of whole episodes, so a table of steps must be built by hand; its columns are those of the
reference's builder (Molmo's `olmo/hf_datasets/android_control.py`): image, ll_instruction (what to do in this step),
hl_instruction (the goal), target_action, target_box ("[left, top, right, bottom]" or empty). Places are percent of the
screen with one decimal, as in `Click(10.5, 20.0)`.
"""

import json
from dataclasses import dataclass
from typing import Any

from molmo_model.data.datasets.published import ROW_KEY, Files, Published, RowError, family
from molmo_model.data.datasets.row_fields import ask, check_choice, text
from molmo_model.data.example import Conversation, Example, is_number

STYLE = "android_control"
MODES = ("ll", "hl_ll", "hl", "hl_cot")
"""The step alone; goal and step; the goal alone; the goal, to be answered by plan and action."""


@dataclass
class AndroidControlOptions:
    """What the model is told."""

    mode: str = "all"
    """One of `ll`, `hl_ll`, `hl`, `hl_cot`, or `all`: a conversation of each."""
    eval_split: str = "val"
    """Split to evaluate on: `val` or `test`."""

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, [*MODES, "all"])
        check_choice("eval_split", self.eval_split, ("val", "test"))


def convert_android_control(fields: dict[str, Any], files: Files, options: AndroidControlOptions) -> Example:
    """One step with the questions that the mode asks."""
    step, goal, action = (text(fields, name) for name in ("ll_instruction", "hl_instruction", "target_action"))
    facts = {"target_action": action, "target_box": _box(fields), "ll_instruction": step, "hl_instruction": goal}
    asked = {
        "ll": (f"low_level: {step}", action),
        "hl_ll": (f"high_level: {goal} low_level: {step}", action),
        "hl": (f"high_level: {goal}", action),
        "hl_cot": (f"high_level_cot: {goal}", f"Plan: {step} Action: {action}"),
    }
    modes = MODES if options.mode == "all" else (options.mode,)
    talks: tuple[Conversation, ...] = tuple(ask(STYLE, *asked[mode], facts | {"mode": mode}) for mode in modes)
    return Example(str(fields[ROW_KEY]), (files.image(fields.get("image"), "image"),), talks)


def _box(fields: dict[str, Any]) -> list[float] | None:
    """Left, top, right and bottom of what the action is about, in percent; None where it is about no place."""
    written = fields.get("target_box")
    if written in (None, "", "None"):
        return None
    try:
        box = json.loads(written) if isinstance(written, str) else written
    except ValueError as error:
        raise RowError("target_box", f"is {written!r}; it must be [left, top, right, bottom]") from error
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        raise RowError("target_box", f"is {written!r}; it must be [left, top, right, bottom]")
    return [float(value) for value in box]


ANDROID_CONTROL = family(
    Published(
        hub=None,
        revision="gresearch/android_control",
        licence="see the card",
        card="https://github.com/google-research/google-research/tree/master/android_control",
        splits={"train": "train", "eval": "val"},
        by_hand=(
            "fetch the TFRecords and `splits.json` from the bucket gs://gresearch/android_control and write a folder "
            "with data/train-*.parquet, data/val-*.parquet and data/test-*.parquet, one row for each step, with the "
            "columns image (bytes), ll_instruction, hl_instruction, target_action and target_box."
        ),
    ),
    convert_android_control,
    options=AndroidControlOptions,
)
