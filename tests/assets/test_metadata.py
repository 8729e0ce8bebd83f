"""What is shown is escaped, bounded, and never fails what was made."""

import io
import math

from PIL import Image

from tests.assets.project import Project, flow

# isort: split
from molmo_assets.metadata import Picture, describe, draw_curve, markdown_table


def test_cells_cannot_break_out_of_the_table() -> None:
    table = markdown_table(("a", "b"), [{"a": "x | y\nz", "b": "<script>alert(1)</script> ![p](http://elsewhere/)"}])
    lines = table.md_str.splitlines() if table.md_str else []
    assert len(lines) == 3
    assert lines[2].count(" | ") == 1 and "\\|" in lines[2]
    assert "<" not in lines[2] and "\\!\\[p\\]" in lines[2]


def test_long_tables_and_cells_are_cut() -> None:
    table = markdown_table(("n",), [{"n": "9" * 1000}] * 50, limit=3)
    assert table.md_str is not None
    assert table.md_str.count("\n| 9") == 3 and "47 more rows" in table.md_str
    assert "9" * 301 not in table.md_str


def test_pictures_made_here_are_kept() -> None:
    table = markdown_table(("picture",), [{"picture": Picture("![x](data:image/png;base64,AA==)")}])
    assert table.md_str is not None and "![x](data:image/png;base64,AA==)" in table.md_str


def test_a_curve_goes_from_upper_left_to_lower_right_when_the_loss_falls() -> None:
    png = draw_curve([(step, 3.0 - step / 50) for step in range(1, 101)], width=200, height=100)
    with Image.open(io.BytesIO(png)) as image:
        blue = {(x, y) for x in range(200) for y in range(100) if image.getpixel((x, y)) == (0x1F, 0x5F, 0xBF)}
    left, right = min(blue), max(blue)
    assert left[0] < 60 and right[0] > 180 and left[1] < 30 and right[1] > 70


def test_a_curve_of_nothing_finite_is_an_empty_frame() -> None:
    for curve in ([], [(1, math.nan), (2, math.inf)]):
        with Image.open(io.BytesIO(draw_curve(curve))) as image:
            assert image.size == (480, 200)


def test_what_cannot_be_shown_says_so(project: Project) -> None:
    project.produce("models", "shards", "validation")
    item = flow.artefact("validation", "charts", project.params)
    shown = describe(item, item.manifest())
    assert "validation.json" in shown["cannot_be_shown"]
    assert shown["digest"] == item.manifest().digest
