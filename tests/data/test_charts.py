"""Charts: numbers are the tables', answers follow from what is printed, and no row is on both sides of the split."""

import io
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import vega_datasets
from PIL import Image as PILImage
from PIL import ImageFont

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES, charts
from molmo_model.errors import ConfigError

MAKE = FAMILIES["charts"].make


def config(train=40, evaluation=20, **options):
    return DatasetConfig(family="charts", train_examples=train, eval_examples=evaluation, options=options)


@pytest.fixture(scope="module")
def made():
    return list(MAKE(config(400, 150), 17))


def caption_of(example):
    return next(c for c in example.conversations if c.style == "chart_caption")


def test_no_row_is_on_both_sides(made):
    rows = {side: {row for s, e in made if s == side for row in e.metadata["rows"]} for side in ("train", "eval")}
    assert rows["train"] & rows["eval"] == set()
    split = charts.chart_split()
    all_rows = {
        side: {row.id for blocks in split[side] for block in blocks for row in block.rows} for side in ("train", "eval")
    }
    assert all_rows["train"] & all_rows["eval"] == set()
    assert rows["train"] <= all_rows["train"]
    assert rows["eval"] <= all_rows["eval"]
    assert all(split["train"]) and all(split["eval"])  # every table has blocks on both sides
    assert 0.1 < len(all_rows["eval"]) / sum(map(len, all_rows.values())) < 0.25


def test_titles_tell_apart_what_is_drawn_and_fit():
    titles = Counter(
        (table.file, f"{measure.title}, {block.name}")
        for blocks in charts.chart_split().values()
        for table, found in zip(charts.TABLES, blocks, strict=True)
        for block in found
        for measure in table.measures
    )
    assert max(titles.values()) == 1
    assert max(len(title) for _, title in titles) * charts.GLYPH_WIDTH <= charts.Options().width
    for blocks in charts.chart_split().values():
        for block in [block for found in blocks for block in found]:
            labels = [row.label for row in block.rows]
            assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("file", "title", "column", "decimals"),
    [
        ("barley.json", "Barley", "yield", 1),
        ("seattle-weather.csv", "Max temp C", "temp_max", 1),
        ("us-employment.csv", "Builders k", "construction", 0),
        ("driving.json", "Gas $", "gas", 2),
        ("stocks.csv", "Stock $", "price", 1),
    ],
)
def test_values_are_those_of_the_package(file, title, column, decimals):
    """The package's own loader is the oracle."""
    stem = file.rpartition(".")[0].replace("-", "_")
    table = getattr(vega_datasets.data, stem)()
    seen = 0
    for _, example in MAKE(config(600, 100), 3):
        metadata = caption_of(example).metadata
        if not (example.metadata["rows"][0].startswith(file) and metadata["title"].startswith(f"{title}, ")):
            continue
        for row, value in zip(example.metadata["rows"], metadata["values"], strict=True):
            number = Decimal(str(table[column].iloc[int(row.rpartition("/")[2])]))
            assert Decimal(value) == number.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
            seen += 1
    assert seen > 0


def test_answers_follow_from_what_is_printed(made):
    kinds = Counter()
    for _, example in made:
        metadata = caption_of(example).metadata
        labels, values = metadata["labels"], [Decimal(value) for value in metadata["values"]]
        at = dict(zip(labels, values, strict=True))
        assert 3 <= len(at) == len(labels) <= 6
        printed = ", ".join(f"{label} {value}" for label, value in zip(labels, metadata["values"], strict=True))
        assert caption_of(example).messages[1].text == f"{metadata['title']}: {printed}"
        for question in (c for c in example.conversations if c.style == "chart_qa"):
            asked, answer = question.messages[0].text, question.messages[1].text
            assert answer == question.metadata["answer"]
            kind = question.metadata["question_type"]
            kinds[kind] += 1
            if kind == "value":
                assert Decimal(answer) == at[asked.removeprefix("What is the value of ").removesuffix("?")]
            elif kind in ("highest", "lowest"):
                assert Decimal(answer) == (max if kind == "highest" else min)(values)
            elif kind in ("highest_label", "lowest_label"):
                best = (max if kind == "highest_label" else min)(values)
                assert [label for label in labels if at[label] == best] == [answer]
            elif kind == "count":
                assert int(answer) == len(labels)
                assert ("bars" in asked) == (example.metadata["kind"] == "bar")
            else:
                one, two = asked.removeprefix("What is the difference between ").removesuffix("?").split(" and ")
                assert Decimal(answer) == abs(at[one] - at[two])
    assert set(kinds) == {"value", "highest", "lowest", "highest_label", "lowest_label", "count", "difference"}
    assert not any(
        value.startswith("-0") and float(value) == 0 for _, e in made for value in caption_of(e).metadata["values"]
    )


def test_all_words_and_numbers_can_be_read_off_the_picture(made):
    """Every title, label and value stands in the picture somewhere, letter by letter and uncovered."""
    font = ImageFont.load_default_imagefont()
    for _, example in made[:12] + made[-8:]:
        ink = np.all(np.asarray(PILImage.open(io.BytesIO(example.images[0].data))) == 0, axis=-1)
        metadata = caption_of(example).metadata
        for text in (metadata["title"], *metadata["labels"], *metadata["values"]):
            mask = font.getmask(text)
            glyphs = np.array(mask).reshape(mask.size[::-1]) > 0
            windows = np.lib.stride_tricks.sliding_window_view(ink, glyphs.shape)
            assert (windows == glyphs).all(axis=(2, 3)).any(), (example.id, text)


def test_bars_are_as_high_as_their_values(made):
    for _, example in made[:60]:
        metadata = caption_of(example).metadata
        values = [float(value) for value in metadata["values"]]
        if example.metadata["kind"] != "bar" or min(values) < 0 or max(values) == 0:
            continue
        picture = np.asarray(PILImage.open(io.BytesIO(example.images[0].data))).astype(int)
        coloured = ~(np.all(picture == 255, axis=-1) | np.all(picture == 0, axis=-1))
        slot = 128 / len(values)
        heights = [coloured[:, int(slot * (i + 0.5)) - int(slot * 0.35)].sum() for i in range(len(values))]
        for height, value in zip(heights, values, strict=True):
            assert abs((height - 1) / (max(heights) - 1) - value / max(values)) < 0.03


def test_numbers_in_a_row_stand_at_one_height(made):
    """With `numbers=row` every label and value is read off its own row of pixels, and nothing else changes."""
    font = ImageFont.load_default_imagefont()
    for (_, plain), (_, example) in zip(made[:30], MAKE(config(30, 0, numbers="row"), 17), strict=True):
        assert plain.conversations == example.conversations
        ink = np.all(np.asarray(PILImage.open(io.BytesIO(example.images[0].data))) == 0, axis=-1)
        metadata = caption_of(example).metadata
        for top, words in ((96 - 11, metadata["values"]), (96 - 11 - 16, metadata["labels"])):
            for text in words:
                mask = font.getmask(text)
                glyphs = np.array(mask).reshape(mask.size[::-1]) > 0
                band = ink[top : top + glyphs.shape[0]]
                windows = np.lib.stride_tricks.sliding_window_view(band, glyphs.shape)
                assert (windows == glyphs).all(axis=(2, 3)).any(), (example.id, text)


def test_scale_repeats_every_pixel(made):
    for (_, plain), (_, example) in zip(made[:5], MAKE(config(5, 0, scale=3), 17), strict=True):
        small, large = (np.asarray(PILImage.open(io.BytesIO(e.images[0].data))) for e in (plain, example))
        assert np.array_equal(large, small.repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize(
    ("values", "significant", "expected"),
    [
        (["12.8", "0.4", "9.5"], 2, ["13", "0", "10"]),
        (["2.8", "0.4"], 2, ["2.8", "0.4"]),
        (["7577", "749", "7449"], 2, ["7600", "700", "7400"]),
        (["1.73", "3.15"], 2, ["1.7", "3.2"]),
        (["-0.4", "14.5"], 2, ["0", "15"]),
        (["12.8"], None, ["12.8"]),
    ],
)
def test_rounding_keeps_one_place_for_the_whole_block(values, significant, expected):
    assert [str(v) for v in charts._rounded([Decimal(value) for value in values], significant)] == expected


def test_rounded_charts_ask_for_what_they_print():
    seen = set()
    for _, example in MAKE(config(200, 0, significant=2), 5):
        metadata = caption_of(example).metadata
        assert all(len(value.lstrip("-0.").replace(".", "").rstrip("0")) <= 2 for value in metadata["values"])
        for question in (c for c in example.conversations if c.metadata.get("question_type") == "value"):
            assert question.metadata["answer"] in metadata["values"]
        seen |= set(metadata["values"])
    assert len(seen) > 50


def test_deterministic_and_independent_of_the_number():
    few, many = list(MAKE(config(3, 2), 5)), list(MAKE(config(8, 4), 5))
    assert [e.content_hash() for _, e in few] == [e.content_hash() for _, e in (*many[:3], *many[8:10])]
    assert {e.content_hash() for _, e in MAKE(config(3, 2), 6)} & {e.content_hash() for _, e in few} == set()


def test_options():
    wide = [e for _, e in MAKE(config(30, 0, width=256, height=128, max_values=12), 1)]
    assert {(e.images[0].width, e.images[0].height) for e in wide} == {(256, 128)}
    assert max(len(e.metadata["rows"]) for e in wide) > 6
    with pytest.raises(ConfigError, match=r"width is 64; it must lie in \[128"):
        next(MAKE(config(width=64), 1))
    with pytest.raises(ConfigError, match="numbers is 'below'; known: above, row"):
        next(MAKE(config(numbers="below"), 1))
    with pytest.raises(ConfigError, match="'colour'; known"):
        next(MAKE(config(colour="red"), 1))


def test_fingerprint_names_every_table():
    found = FAMILIES["charts"].fingerprint(config(), 1)
    assert len(found) == len(charts.TABLES) == len(set(found.values()))
