"""What a token selector kept of a picture, as a picture: kept tokens in the colour of their importance, the rest grey.

A plain Molmo keeps every token, so there is nothing to show, and asking for it is an error.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from molmo_model.errors import ConfigError
from molmo_model.eval.answering import Question
from molmo_model.eval.drawing import SMALLEST_SIDE
from molmo_model.eval.inference import Predictor
from molmo_model.nn.he_molmo import generation_inputs
from molmo_model.preprocessing.collator import collate_prompts
from molmo_model.preprocessing.selection import view_size, window_edges
from molmo_model.preprocessing.tiling import layout

FloatArray = npt.NDArray[np.float32]

RAMP = np.array([(43, 60, 150), (120, 70, 170), (224, 74, 106), (255, 145, 40), (255, 228, 90)], dtype=np.float32)
"""Colours of importance 0, 1/4, ... 1."""
TINT = 0.4
"""Share of the colour in a kept token; the rest is the picture."""
GREY = 0.4
"""Brightness of what was left out."""


@dataclass(frozen=True)
class TokenMap:
    """The high-resolution tokens of one picture."""

    importance: FloatArray
    """[rows, columns] of kept tokens, from 0 to 1; NaN where a token was left out."""
    rows: FloatArray
    """[rows + 1] edges of the tokens' windows, as shares of the picture's height."""
    columns: FloatArray
    """[columns + 1] the same of its width."""

    @property
    def kept(self) -> int:
        return int(np.isfinite(self.importance).sum())


def require_selector(predictor: Predictor) -> None:
    """Raises a `ConfigError` where the model has no token selector."""
    if predictor.model.config.selector is None:
        raise ConfigError("the model has no token selector: it reads every image token, so no selection can be shown")


def selected_tokens(predictor: Predictor, question: Question) -> list[TokenMap]:
    """What the model looks at closely when it is asked this, picture by picture.

    Raises:
        ConfigError: the model has no token selector.
        DataError: the question cannot be encoded.
    """
    require_selector(predictor)
    model, preprocessor = predictor.model, predictor.preprocessor
    prompt = preprocessor.encode_prompt(question.example, question.conversation, length=question.length)
    batch = collate_prompts([prompt], preprocessor.config, preprocessor.pad_id)
    with torch.inference_mode(), predictor.autocast():
        _, selection = generation_inputs(model, {name: value.to(model.device) for name, value in batch.items()})
    maps = []
    for number, image in enumerate(question.example.images if selection is not None else ()):
        assert selection is not None
        size, spec = (image.height, image.width), preprocessor.config.tiling
        one = layout(*size, spec)
        importance = np.full(view_size(one, spec), np.nan, dtype=np.float32)
        chosen, weights = selection.choice.chosen[number].cpu(), selection.choice.importance[number].float().cpu()
        importance.flat[chosen[chosen >= 0].numpy()] = weights[chosen >= 0].numpy()
        maps.append(TokenMap(importance, *window_edges(one, spec, size)))
    return maps


def draw_selection(pixels: npt.NDArray[np.uint8], found: TokenMap) -> Image.Image:
    """The picture, what was left out in dark grey, what was kept tinted by its importance, blue for 0 to yellow for 1.

    Args:
        pixels: uint8 [H, W, 3].
    """
    picture = Image.fromarray(pixels)
    factor = max(1, SMALLEST_SIDE // max(1, min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    colours = np.asarray(picture, dtype=np.float32)
    painted = np.repeat(colours.mean(-1, keepdims=True) * GREY, 3, axis=-1)
    boxes = []
    for row, column in zip(*np.nonzero(np.isfinite(found.importance)), strict=True):
        top, bottom = np.round(found.rows[row : row + 2] * picture.height).astype(int)
        left, right = np.round(found.columns[column : column + 2] * picture.width).astype(int)
        tint = _colour(float(found.importance[row, column]))
        painted[top:bottom, left:right] = colours[top:bottom, left:right] * (1 - TINT) + tint * TINT
        boxes.append(((left, top, right - 1, bottom - 1), tuple(tint.round().astype(int).tolist())))
    drawn = Image.fromarray(painted.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for (left, top, right, bottom), colour in boxes:
        if right > left and bottom > top:
            draw.rectangle((left, top, right, bottom), outline=colour)
    return drawn


def _colour(share: float) -> FloatArray:
    place = np.array([share * (len(RAMP) - 1)])
    steps = np.arange(len(RAMP))
    return np.array([np.interp(place, steps, RAMP[:, channel])[0] for channel in range(3)], dtype=np.float32)
