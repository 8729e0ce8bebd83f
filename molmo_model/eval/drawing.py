"""Draws the points of an answer onto its picture."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from molmo_model.preprocessing.points import Point

COLOUR, HALO = (255, 90, 31), (255, 255, 255)
SMALLEST_SIDE = 384
"""Smaller pictures are enlarged by a whole factor, so that marks do not hide what they mark."""


def draw_points(pixels: npt.NDArray[np.uint8], points: list[Point]) -> Image.Image:
    """The picture with a numbered mark at every point.

    Args:
        pixels: uint8 [H, W, 3].
        points: x, y in percent of width and height.
    """
    picture = Image.fromarray(pixels)
    factor = max(1, SMALLEST_SIDE // max(1, min(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    radius = max(4.0, max(picture.size) / 100)
    for number, (x, y) in enumerate(points, start=1):
        centre = x / 100 * picture.width, y / 100 * picture.height
        draw.circle(centre, radius * 1.5, fill=HALO)
        draw.circle(centre, radius, fill=COLOUR)
        if len(points) > 1:
            place = centre[0] + 1.8 * radius, centre[1] - 1.8 * radius
            size = max(12.0, 2.4 * radius)
            draw.text(place, str(number), fill=COLOUR, font_size=size, stroke_width=2, stroke_fill=HALO, anchor="lm")
    return picture
