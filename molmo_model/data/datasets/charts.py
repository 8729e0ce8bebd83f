"""Bar and line charts of real tables, with questions that have exact answers.

The tables are those that lie inside the package `vega_datasets`. Rows that belong together (the days of a month, the
varieties of a field) form a block; a chart shows a few rows of one block. About one block in seven of every table is
only ever drawn in evaluation charts and the others only in training charts, whatever the seed, so that no row of an
evaluation chart appears in training.

Every chart is one message tree: `chart_caption` reads the title and all values; `chart_qa` asks for one value, the
highest, the lowest, how many there are, and a difference. Values are printed on the chart, and all answers are exact in
what is printed.

Charts are drawn with Pillow and its built-in bitmap font of 6x11 pixels: fast, and the same with every version.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from molmo_model.artifacts import file_sha256
from molmo_model.config import DatasetConfig
from molmo_model.data.datasets.generated import encode_png, example_generator, held_out, package_folder, positions
from molmo_model.data.datasets.options import check_range, parse_options
from molmo_model.data.example import BadRow, Conversation, Example, Message
from molmo_model.errors import ConfigError, DataError

EVAL_SHARE = 0.15
"""Share of every table's blocks that is held out for evaluation; at least one block."""
MIN_VALUES = 3
"""Fewest values of a chart."""
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 11
"""Pixels of one letter of the bitmap font."""
PAPER, INK = (255, 255, 255), (0, 0, 0)
ROW_PITCH = 16
"""Pixels between rows of words where numbers stand in a row: each row lies within one row of 16-pixel patches."""
NUMBERS = ("above", "row")
COLOURS = ((66, 114, 182), (214, 112, 52), (78, 148, 82), (182, 62, 68), (124, 96, 168), (110, 110, 110))

RawRow = Mapping[str, Any]


@dataclass
class Options:
    """How a chart looks."""

    width: int = 128
    """Pixels. 128x96 is six crops of 64 pixels at 16 pixels per patch with margins of one patch."""
    height: int = 96
    max_values: int = 6
    """Most values of a chart; fewer where their labels would overlap."""
    numbers: str = "above"
    """Where the values are printed: `above` each bar or point, or in a `row` of their own under the labels, as in the
    data table of a spreadsheet's chart. Words that always stand at one height are learned much sooner."""
    significant: int | None = None
    """Numbers of a chart are rounded to the decimal place that leaves the largest of its block this many digits that
    are not padding; None prints them as the table's `Measure` says. What is printed is what is asked."""
    scale: int = 1
    """Every pixel of the drawing becomes this many in width and height, letters included; width and height count
    pixels before."""

    def __post_init__(self) -> None:
        check_range("width", self.width, 128, 2048)
        check_range("height", self.height, 72, 2048)
        check_range("max_values", self.max_values, MIN_VALUES, 24)
        check_range("scale", self.scale, 1, 8)
        if self.significant is not None:
            check_range("significant", self.significant, 1, 9)
        if self.numbers not in NUMBERS:
            raise ConfigError(f"dataset option numbers is {self.numbers!r}; known: {', '.join(NUMBERS)}")


@dataclass(frozen=True)
class Measure:
    """One column of numbers that can be drawn."""

    column: str
    title: str
    """With its unit; at most 21 letters together with the block's name, so that it fits into 128 pixels."""
    decimals: int
    scale: Decimal = Decimal(1)
    """The printed number is the table's times this."""


@dataclass(frozen=True)
class Table:
    """One table: what of it can be drawn, and which rows belong together."""

    file: str
    measures: tuple[Measure, ...]
    block: Callable[[RawRow], str]
    """Name of the block of a row; stands in the title."""
    label: Callable[[RawRow], str]
    """Short name of a row within its block; stands on the horizontal axis."""
    kinds: tuple[str, ...] = ("bar", "line")


@dataclass(frozen=True)
class Row:
    """One row of a block."""

    id: str
    """`<file>/<number of the row, from 0>`."""
    label: str
    values: Mapping[str, Decimal]
    """What is printed, by column; a column without a number in this row is missing."""


@dataclass(frozen=True)
class Block:
    """Rows that may stand in one chart, in the table's order."""

    name: str
    table: Table
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Chart:
    """What is drawn, exactly."""

    kind: str
    title: str
    labels: tuple[str, ...]
    values: tuple[Decimal, ...]
    rows: tuple[str, ...]
    """Ids of the table's rows."""


def make(config: DatasetConfig, seed: int) -> Iterator[tuple[str, Example | BadRow]]:
    """(split, chart) for every example that the params ask for, training first."""
    options = parse_options(Options, config)
    for split, number in positions(config):
        rng = example_generator("charts", seed, split, number)
        chart = _choose(options, split, rng)
        conversations = (_caption(chart), *_questions(chart, rng))
        picture = encode_png(_draw(options, chart, COLOURS[rng.integers(len(COLOURS))]))
        metadata = {"kind": chart.kind, "rows": list(chart.rows)}
        yield split, Example(f"chart-{split}-{number:06d}", (picture,), conversations, metadata)


def fingerprint(config: DatasetConfig, seed: int) -> dict[str, str]:
    """The digest of each table."""
    return {f"vega_datasets {table.file}": file_sha256(_folder() / table.file) for table in TABLES}


MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_ISO = re.compile(r"(?P<year>\d{4})[-/](?P<month>\d\d)[-/](?P<day>\d\d)(?: (?P<hour>\d\d))?")
_NAMED = re.compile(r"(?P<month>[A-Z][a-z]{2}) (?P<day>\d+) (?P<year>\d{4})")


def _date(row: RawRow, column: str) -> dict[str, str]:
    """`year`, `month` (three letters), `day` and `hour` of a date, without leading zeros."""
    text = str(row[column])
    match = _ISO.match(text) or _NAMED.match(text)
    if match is None:
        raise DataError(
            f"vega_datasets: {column} is {text!r}, which is no date; install the version in the constraints file"
        )
    parts = match.groupdict()
    month = parts["month"] if match.re is _NAMED else MONTHS[int(parts["month"]) - 1]
    return {
        "year": parts["year"],
        "month": month,
        "day": str(int(parts["day"])),
        "hour": str(int(parts.get("hour") or 0)),
    }


def _dated(column: str, form: str) -> Callable[[RawRow], str]:
    """A row's date in words, such as `{month} {year}`."""
    return lambda row: form.format(**_date(row, column))


SITES = {
    "University Farm": "Univ Farm",
    "Waseca": "Waseca",
    "Morris": "Morris",
    "Crookston": "Crookston",
    "Grand Rapids": "Gr Rapids",
    "Duluth": "Duluth",
}
VARIETIES = {
    "Manchuria": "Man",
    "Glabron": "Gla",
    "Svansota": "Sva",
    "Velvet": "Vel",
    "Trebi": "Tre",
    "No. 457": "457",
    "No. 462": "462",
    "Peatland": "Pea",
    "No. 475": "475",
    "Wisconsin No. 38": "W38",
}

TABLES = (
    Table(
        "seattle-weather.csv",
        (
            Measure("temp_max", "Max temp C", 1),
            Measure("temp_min", "Min temp C", 1),
            Measure("precipitation", "Rain mm", 1),
            Measure("wind", "Wind m/s", 1),
        ),
        block=_dated("date", "{month} {year}"),
        label=_dated("date", "{day}"),
    ),
    Table(
        "seattle-temps.csv",
        (Measure("temp", "Seattle F", 1),),
        block=_dated("date", "{month} {day}"),
        label=_dated("date", "{hour}h"),
    ),
    Table(
        "sf-temps.csv",
        (Measure("temp", "SF temp F", 1),),
        block=_dated("date", "{month} {day}"),
        label=_dated("date", "{hour}h"),
    ),
    Table(
        "stocks.csv",
        (Measure("price", "Stock $", 1),),
        block=lambda row: f"{row['symbol']} {_date(row, 'date')['year']}",
        label=_dated("date", "{month}"),
    ),
    Table(
        "ohlc.json",
        (Measure("open", "VIX open", 1), Measure("close", "VIX close", 1)),
        block=_dated("date", "{month} {year}"),
        label=_dated("date", "{day}"),
    ),
    Table(
        "us-employment.csv",
        (
            Measure("mining_and_logging", "Mining jobs k", 0),
            Measure("construction", "Builders k", 0),
            Measure("information", "Media jobs k", 0),
            Measure("utilities", "Utilities k", 1),
        ),
        block=_dated("month", "{year}"),
        label=_dated("month", "{month}"),
    ),
    Table(
        "iowa-electricity.csv",
        (Measure("net_generation", "TWh", 1, Decimal("0.001")),),  # the table is in thousands of MWh
        block=lambda row: str(row["source"]),
        label=lambda row: str(row["year"])[:4],
    ),
    Table(
        "barley.json",
        (Measure("yield", "Barley", 1),),
        block=lambda row: f"{SITES[row['site']]} '{str(row['year'])[2:]}",
        label=lambda row: VARIETIES[row["variety"]],
        kinds=("bar",),
    ),
    Table(
        "wheat.json",
        (Measure("wheat", "Wheat price", 1), Measure("wages", "Wages", 1)),
        block=lambda row: f"{int(row['year']) // 50 * 50}-{int(row['year']) // 50 * 50 % 100 + 49}",
        label=lambda row: str(row["year"]),
    ),
    Table(
        "crimea.json",
        (Measure("disease", "Disease", 0), Measure("wounds", "Wounds", 0), Measure("other", "Other", 0)),
        block=lambda row: f"deaths {_date(row, 'date')['year']}",
        label=_dated("date", "{month}"),
    ),
    Table(
        "driving.json",
        (Measure("miles", "Miles driven", 0), Measure("gas", "Gas $", 2)),
        block=lambda row: f"{str(row['year'])[:3]}0s",
        label=lambda row: str(row["year"]),
    ),
)


def _folder() -> Path:
    return package_folder("vega_datasets") / "_data"


def _read(file: str) -> list[RawRow]:
    """The rows of a table; numbers of JSON as exact decimals."""
    text = (_folder() / file).read_text(encoding="utf-8")
    if file.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    rows: list[RawRow] = json.loads(text, parse_float=Decimal, parse_int=Decimal)
    return rows


def _blocks_of(table: Table) -> list[Block]:
    found: dict[str, list[Row]] = {}
    for number, raw in enumerate(_read(table.file)):
        values = {
            measure.column: _printed(raw[measure.column], measure)
            for measure in table.measures
            if raw.get(measure.column) not in (None, "")
        }
        found.setdefault(table.block(raw), []).append(Row(f"{table.file}/{number}", table.label(raw), values))
    return [Block(name, table, tuple(rows)) for name, rows in found.items() if len(rows) >= MIN_VALUES]


def _printed(value: Any, measure: Measure) -> Decimal:
    """The number as it is printed: rounded half up, never minus zero."""
    return (Decimal(value) * measure.scale).quantize(Decimal(1).scaleb(-measure.decimals), ROUND_HALF_UP) + Decimal(0)


@cache
def chart_split() -> dict[str, list[list[Block]]]:
    """The blocks of each split, table by table; a fixed choice, not the seed's."""
    split: dict[str, list[list[Block]]] = {"train": [], "eval": []}
    for table in TABLES:
        blocks = _blocks_of(table)
        count = max(1, round(EVAL_SHARE * len(blocks)))
        chosen = held_out([f"{table.file} {block.name}" for block in blocks], count)
        split["eval"].append([block for block in blocks if f"{table.file} {block.name}" in chosen])
        split["train"].append([block for block in blocks if f"{table.file} {block.name}" not in chosen])
    return split


@cache
def _shares(split: str) -> np.ndarray:
    """How often each table is drawn: by the square root of its rows, so that the large ones do not drown the others."""
    roots = np.sqrt([sum(len(block.rows) for block in blocks) for blocks in chart_split()[split]])
    return roots / roots.sum()


def _choose(options: Options, split: str, rng: np.random.Generator) -> Chart:
    blocks = chart_split()[split][rng.choice(len(TABLES), p=_shares(split))]
    block = blocks[rng.integers(len(blocks))]
    measures = [m for m in block.table.measures if sum(m.column in row.values for row in block.rows) >= MIN_VALUES]
    measure = measures[rng.integers(len(measures))]
    rows = [row for row in block.rows if measure.column in row.values]
    values = _rounded([row.values[measure.column] for row in rows], options.significant)
    letters = max(max(len(row.label), len(str(value))) for row, value in zip(rows, values, strict=True))
    room = min(options.max_values, len(rows), (options.width - 2) // (letters * GLYPH_WIDTH + 2))
    shown = np.sort(rng.permutation(len(rows))[: rng.integers(min(MIN_VALUES, room), room + 1)])
    picked = [rows[i] for i in shown]
    return Chart(
        kind=block.table.kinds[rng.integers(len(block.table.kinds))],
        title=f"{measure.title}, {block.name}",
        labels=tuple(row.label for row in picked),
        values=tuple(values[i] for i in shown),
        rows=tuple(row.id for row in picked),
    )


def _rounded(values: list[Decimal], significant: int | None) -> list[Decimal]:
    """All values rounded half up to one decimal place, so that the largest keeps `significant` digits."""
    if significant is None:
        return values
    place = max(value.adjusted() for value in values) - significant + 1
    unit = Decimal(1).scaleb(place)
    exponent = values[0].as_tuple().exponent
    if isinstance(exponent, int) and place <= exponent:
        return values
    rounded = [value.quantize(unit, ROUND_HALF_UP) + Decimal(0) for value in values]
    return [Decimal(f"{value:f}") for value in rounded]  # 7600, not 7.6E+3


def _draw(options: Options, chart: Chart, colour: tuple[int, int, int]) -> PILImage.Image:
    """The chart, values printed above bars or points or in the lowest row, no axis of numbers."""
    picture = PILImage.new("RGB", (options.width, options.height), PAPER)
    draw = ImageDraw.Draw(picture)
    slot = options.width / len(chart.values)
    centres = [int(slot * (i + 0.5)) for i in range(len(chart.values))]
    heights, base = _heights(options, chart), _base(options, chart)
    if chart.kind == "line":
        draw.line(list(zip(centres, heights, strict=True)), fill=colour, width=2)
    for centre, height in zip(centres, heights, strict=True):
        half = 2 if chart.kind == "line" else int(slot * 0.35)
        top, bottom = (height - 2, height + 2) if chart.kind == "line" else sorted((height, base))
        draw.rectangle((centre - half, top, centre + half, bottom), fill=colour)
    for centre, height, label, value in zip(centres, heights, chart.labels, chart.values, strict=True):
        above = min(height, base) - GLYPH_HEIGHT - 2
        last = options.height - GLYPH_HEIGHT
        in_row = options.numbers == "row"
        _write(draw, options, centre, last if in_row else above, str(value))
        _write(draw, options, centre, last - ROW_PITCH if in_row else last, label)
    _write(draw, options, options.width / 2, 0, chart.title)
    return picture.resize((options.width * options.scale, options.height * options.scale), PILImage.Resampling.NEAREST)


def _base(options: Options, chart: Chart) -> int:
    """Pixel row of zero for bars; for lines the bottom of the plot."""
    if chart.kind == "line":
        return _plot(options)[1]
    return _scaled(options, 0.0, *_limits(chart))


def _heights(options: Options, chart: Chart) -> list[int]:
    """Pixel row of each value."""
    return [_scaled(options, float(value), *_limits(chart)) for value in chart.values]


def _limits(chart: Chart) -> tuple[float, float]:
    """The values at the bottom and at the top of the plot; bars start at zero."""
    low, high = float(min(chart.values)), float(max(chart.values))
    if chart.kind == "bar":
        low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (low, low + 1.0)


def _scaled(options: Options, value: float, low: float, high: float) -> int:
    top, bottom = _plot(options)
    return round(bottom - (value - low) / (high - low) * (bottom - top))


def _plot(options: Options) -> tuple[int, int]:
    """Pixel rows of the plot's top and bottom; words stand above and below."""
    if options.numbers == "row":
        return GLYPH_HEIGHT + 4, options.height - ROW_PITCH - GLYPH_HEIGHT - 4
    return 2 * GLYPH_HEIGHT + 4, options.height - GLYPH_HEIGHT - 4


def _write(draw: ImageDraw.ImageDraw, options: Options, centre: float, top: int, text: str) -> None:
    """Text around a horizontal centre, pushed inside the picture, on paper that hides a line behind it."""
    width = GLYPH_WIDTH * len(text)
    left = min(max(round(centre - width / 2), 0), options.width - width)
    draw.rectangle((left, top, left + width - 1, top + GLYPH_HEIGHT - 1), fill=PAPER)
    draw.text((left, top), text, fill=INK, font=_font())


@cache
def _font() -> ImageFont.ImageFont:
    return ImageFont.load_default_imagefont()


def _caption(chart: Chart) -> Conversation:
    """`Max temp C, Mar 2012: 3 12.8, 7 10.6, 21 9.4`"""
    pairs = ", ".join(f"{label} {value}" for label, value in zip(chart.labels, chart.values, strict=True))
    answer = f"{chart.title}: {pairs}"
    metadata = {
        "answer": answer,
        "answer_type": "chart",
        "title": chart.title,
        "labels": list(chart.labels),
        "values": [str(value) for value in chart.values],
    }
    messages = (Message("user"), Message("assistant", answer))
    return Conversation("chart_caption", messages, metadata=metadata)


def _questions(chart: Chart, rng: np.random.Generator) -> Iterator[Conversation]:
    first, second = rng.permutation(len(chart.values))[:2]
    yield _ask("value", f"What is the value of {chart.labels[first]}?", chart.values[first])
    yield _ask("value", f"What is the value of {chart.labels[second]}?", chart.values[second])
    for kind, extreme in (("highest", max(chart.values)), ("lowest", min(chart.values))):
        yield _ask(kind, f"What is the {kind} value?", extreme)
        if chart.values.count(extreme) == 1:
            label = chart.labels[chart.values.index(extreme)]
            yield _ask(f"{kind}_label", f"Which label has the {kind} value?", label)
    things = "bars" if chart.kind == "bar" else "points"
    yield _ask("count", f"How many {things} are there?", len(chart.values))
    difference = abs(chart.values[first] - chart.values[second])
    question = f"What is the difference between {chart.labels[first]} and {chart.labels[second]}?"
    yield _ask("difference", question, difference)


def _ask(kind: str, question: str, answer: Decimal | int | str) -> Conversation:
    metadata = {
        "answer": str(answer),
        "answer_type": "label" if isinstance(answer, str) else "int" if isinstance(answer, int) else "number",
        "question_type": kind,
    }
    messages = (Message("user", question), Message("assistant", str(answer)))
    return Conversation("chart_qa", messages, metadata=metadata)
