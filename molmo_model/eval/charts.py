"""Line charts and histograms as small SVG text: always the same bytes, readable in light and dark, no plotting library.

Colours are classes (`s0`, `s1`, ... for series); the page that holds a chart gives them meaning, and `standalone` adds
a style of its own.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 34
"""Margins in SVG units around the plot area."""
LETTER = 7
"""SVG units that a letter of an axis is wide, at most."""
COLOURS = 6
"""Series colours before they repeat."""

STYLE = """
svg{font:11px system-ui,sans-serif;background:#fff}
text{fill:#3b4252}.grid{stroke:#d8dee9;stroke-width:1}.base{stroke:#6b7280;stroke-dasharray:4 4;fill:none}
.line{fill:none;stroke-width:2}.band{opacity:.16;stroke:none}
.s0{stroke:#2458d3;color:#2458d3}.s1{stroke:#c2410c;color:#c2410c}.s2{stroke:#0f7a5c;color:#0f7a5c}
.s3{stroke:#8b36b8;color:#8b36b8}.s4{stroke:#b3123f;color:#b3123f}.s5{stroke:#57606f;color:#57606f}
.dot,.band{fill:currentColor}
"""


@dataclass(frozen=True)
class Point:
    """A value at a step, with an interval if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a chart; `colour` is a number of the palette."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    dots: bool = True


@dataclass(frozen=True)
class _Scale:
    """Maps data to the plot area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> str:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return f"{HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    baseline: float | None = None,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    x_label: str = "step",
) -> str:
    """One SVG element: lines, dots, interval whiskers, and a dashed baseline.

    Args:
        title: for screen readers and as tooltip.
        series: lines; points are drawn in order of x.
        baseline: a value to draw across, such as the majority answer's.
        y_range: lowest and highest value shown; None takes that of the data.
        percent: label the vertical axis in percent.
    """
    points = [point for line in series for point in line.points]
    scale = _scale(points, baseline, y_range)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_axes(scale, sorted({point.x for point in points}), percent, x_label),
    ]
    if baseline is not None:
        y = scale.y(baseline)
        parts.append(f'<path class="base" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
    for line in series:
        parts += _line(line, scale, percent)
    return "".join([*parts, "</svg>"])


def histogram(title: str, values: Sequence[float], *, bins: int = 24, x_label: str, percent: bool = False) -> str:
    """One SVG element: how many values fall into each of up to `bins` equal stretches; whole numbers keep bins of
    whole width.

    Args:
        title: for screen readers and as tooltip.
        values: finite numbers.
        percent: label the horizontal axis in percent.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    whole = all(float(value).is_integer() for value in values)
    width = max(1, math.ceil((high - low + 1) / bins)) if whole else (high - low) / bins or 1.0
    counts = Counter(min(int((value - low) / width), bins - 1) for value in values)
    last = max(counts, default=0) + 1
    scale = _Scale(low, low + width * last, 0, max(counts.values(), default=1) * 1.05)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_axes(scale, _marks(scale.x_low, scale.x_high, whole), False, x_label, percent_x=percent, counts=True),
        '<g class="s0">',
    ]
    for number, count in sorted(counts.items()):
        left, right = float(scale.x(low + number * width)), float(scale.x(low + (number + 1) * width))
        top = float(scale.y(count))
        tip = f"{low + number * width:g} to {low + (number + 1) * width:g}: {count}"
        place = (
            f'x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 1):.1f}" height="{HEIGHT - BOTTOM - top:.1f}"'
        )
        parts.append(f'<rect class="dot" {place}><title>{tip}</title></rect>')
    return "".join([*parts, "</g></svg>"])


def standalone(svg: str) -> str:
    """A chart as a file of its own."""
    head, _, rest = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE.strip()}</style>{rest}\n'


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = 150) -> tuple[Point, ...]:
    """At most `most` points: means over stretches of equal length, so that a long curve stays small and honest."""
    if len(points) <= most:
        return tuple(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(Point(group[-1].x, math.fsum(point.y for point in group) / len(group)) for group in groups)


def _scale(points: Sequence[Point], baseline: float | None, y_range: tuple[float, float] | None) -> _Scale:
    xs = [point.x for point in points] or [0.0, 1.0]
    if y_range is None:
        ys = [point.y for point in points] + ([] if baseline is None else [baseline]) or [0.0, 1.0]
        y_range = min(0.0, *ys), max(ys) * 1.05 or 1.0
    return _Scale(min(0.0, *xs), max(xs), *y_range)


def _marks(low: float, high: float, whole: bool) -> list[float]:
    """Ticks; of whole numbers no halves."""
    return [value for value in ticks(low, high) if not whole or float(value).is_integer()]


def _axes(
    scale: _Scale, xs: Sequence[float], percent: bool, x_label: str, percent_x: bool = False, counts: bool = False
) -> list[str]:
    parts = []
    for value in _marks(scale.y_low, scale.y_high, counts):
        y = scale.y(value)
        label = f"{value * 100:.0f}%" if percent else f"{value:g}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{label}</text>')
    shown = xs if len(xs) <= 6 else ticks(scale.x_low, scale.x_high)
    for value in shown:
        label = f"{value * 100:g}%" if percent_x else f"{value:g}"
        is_cut = float(scale.x(value)) + len(label) * LETTER / 2 > WIDTH  # 15000 would be read as 1500
        x, anchor = (f"{WIDTH - 1}", "end") if is_cut else (scale.x(value), "middle")
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _line(line: Series, scale: _Scale, percent: bool) -> list[str]:
    points = sorted(line.points, key=lambda point: point.x)
    if not points:
        return []
    path = "L".join(f"{scale.x(point.x)} {scale.y(point.y)}" for point in points)
    parts = [f'<g class="s{line.colour % COLOURS}">', f'<path class="line" d="M{path}"/>']
    for point in points:
        if point.low is not None and point.high is not None:
            parts.append(f'<path class="whisker" d="M{scale.x(point.x)} {scale.y(point.low)}V{scale.y(point.high)}"/>')
        if line.dots:
            value = f"{point.y * 100:.1f}%" if percent else f"{point.y:g}"
            tip = escape(f"{line.name}, step {point.x:g}: {value}")
            place = f'cx="{scale.x(point.x)}" cy="{scale.y(point.y)}"'
            parts.append(f'<circle class="dot" {place} r="3.5"><title>{tip}</title></circle>')
    return [*parts, "</g>"]
