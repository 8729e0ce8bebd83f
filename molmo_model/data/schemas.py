"""Row and column contracts of the tables that artefacts hold, checked by pandera; a broken one stops the stage.

Rules about single rows and columns stand here and nowhere else. What is only unusual for a whole data set (too few
rows, one answer everywhere) stands in `expectations.py` and only warns. pandera is imported inside the functions: it
takes two seconds.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from molmo_model.config import lookup
from molmo_model.data.example import SPLITS
from molmo_model.errors import DataError

if TYPE_CHECKING:
    import pandas
    import pandera.pandas
    import pyarrow

    Table: TypeAlias = pyarrow.Table | pandas.DataFrame | Sequence[Mapping[str, Any]]

SHOWN = 5
"""Failing rows in the message of an error."""
SHA256 = r"^[0-9a-f]{64}$"
TAR_BLOCK = 512


def check_table(table: "Table", schema: str, source: str | None = None) -> None:
    """Checks a table against a contract of `SCHEMAS`.

    Args:
        table: Arrow table, pandas frame, or rows as mappings (of a JSONL file).
        schema: name of the contract.
        source: what to call the table in errors, such as its path; default: the name of the contract.

    Raises:
        ConfigError: there is no such contract.
        DataError: naming the source, and the first failing rows by number, id, column and value.
    """
    build = lookup(SCHEMAS, schema, "table schema")
    import pandera.errors

    frame = _frame(table)
    if frame.empty and not len(frame.columns):
        return  # a JSONL file without rows has no columns either
    try:
        build().validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        cases = sorted(error.failure_cases.to_dict("records"), key=_place)
        lines = list(dict.fromkeys(_line(case, frame) for case in cases))  # a rule about rows is told for every column
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        found = "".join(f"\n  {line}" for line in lines[:SHOWN])
        number = f"{len(lines)} violation{'s' if len(lines) > 1 else ''}"
        raise DataError(f"{source or schema}: {number} of the contract {schema!r}:{found}{more}") from error


def _frame(table: "Table") -> "pandas.DataFrame":
    import pandas as pd
    import pyarrow as pa

    if isinstance(table, pa.Table):
        return table.to_pandas()
    if isinstance(table, pd.DataFrame):
        return table.reset_index(drop=True)
    return pd.DataFrame(list(table))


def _place(case: Mapping[str, Any]) -> int:
    """Row of a violation; those of the table as a whole come first."""
    import pandas as pd

    return -1 if pd.isna(case["index"]) else int(case["index"])


def _line(case: Mapping[str, Any], frame: "pandas.DataFrame") -> str:
    """One violation in words."""
    row, check, value = _place(case), case["check"], case["failure_case"]
    if row < 0:
        column = f"column {case['column']!r} " if case["schema_context"] == "Column" else ""
        known = {
            "column_in_dataframe": f"column {value!r} is missing",
            "column_in_schema": f"column {value!r} is unknown",
        }
        return known.get(check, f"{column}is {value!r}; must be: {check}")
    name = f" id {frame['id'].iloc[row]!r}" if "id" in frame else ""
    what = f" {case['column']} is {value!r};" if case["schema_context"] == "Column" else ""
    return f"row {row}{name}:{what} must be: {_WORDS.get(check, check)}"


_WORDS = {"not_nullable": "not null", "field_uniqueness": "unique"}
"""What pandera calls its own checks, in words."""


@cache
def _index() -> "pandera.pandas.DataFrameSchema":
    """`index.parquet` of shards: one row per example."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {
            "id": _text(unique=True),
            "split": _text(pa.Check.isin(SPLITS)),
            "shard": _text(pa.Check.str_matches(r"^shards-[\w-]+\.tar$")),
            "offset": _whole(0),
            "size": _whole(1),
            "text_size": _whole(1),
            "sha256": _text(pa.Check.str_matches(SHA256)),
            "xxh3": _whole(0),
            "n_images": _whole(0),
            "widths": _lists(_pixels, "sides of at least 1 pixel"),
            "heights": _lists(_pixels, "sides of at least 1 pixel"),
            "image_sha256": _lists(_hashes, "SHA-256 in hexadecimal"),
            "styles": _lists(_names, "at least one style, none of them empty"),
            "n_conversations": _whole(1),
            "chars": _whole(0),
            **{name: _lists(check, what, required=False) for name, (check, what) in _VIDEO_COLUMNS.items()},
        },
        checks=[
            _rows("one width, height and hash per image", _counts_images),
            _rows("as many facts of each film", _counts_videos),
            _rows("one style per conversation", lambda frame: frame["styles"].map(len) == frame["n_conversations"]),
            _rows("text_size <= size", lambda frame: frame["text_size"] <= frame["size"]),
            _rows("ranges of whole tar blocks that do not overlap", _apart),
        ],
        strict=True,
    )


@cache
def _problems() -> "pandera.pandas.DataFrameSchema":
    """`problems.jsonl` of shards: one row per bad row."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {
            "file": _text(),
            "line": _whole(1),
            "id": pa.Column(None, pa.Check(_text_or_none, element_wise=True, error="text or null"), nullable=True),
            "field": _text(),
            "reason": _text(),
            "known": pa.Column(None, pa.Check(_boolean, element_wise=True, error="true or false")),
        },
        strict=True,
    )


@cache
def _costs() -> "pandera.pandas.DataFrameSchema":
    """`costs.arrow` of a mixture: what one example of one entry costs."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {
            "entry": _whole(0),
            "id": _text(),
            "row": _whole(0),
            "key": _whole(0),
            "tokens": _whole(0),
            "crops": _whole(0),
            "conversations": _lists(lambda items: len(items) > 0 and min(items) >= 0, "at least one conversation"),
            "conversation_tokens": _lists(lambda items: len(items) > 0 and min(items) >= 1, "at least 1 token each"),
        },
        checks=[
            _rows("one cost per conversation", _counts_conversations),
            _rows("an example once per entry", lambda frame: ~frame.duplicated(["entry", "row"], keep="first")),
        ],
        strict=True,
    )


def _measured(value: Any) -> bool:
    """What a task of kind `loss` measures: nats, and whole numbers of tokens."""
    return (
        isinstance(value, Mapping)
        and set(value) == {"nll", "tokens", "right"}
        and 0 <= value["nll"] < float("inf")
        and 0 <= value["right"] <= value["tokens"]
    )


@cache
def _predictions() -> "pandera.pandas.DataFrameSchema":
    """`predictions.jsonl`: one row per evaluation item."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {
            "id": _text(unique=True),
            "example_id": _text(),
            "conversation": _whole(0),
            "style": _text(),
            "prompt": _text(empty=True),
            "prediction": _text(empty=True),
            "references": _mapping(),
            "finish_reason": _text(pa.Check.isin(("stop", "length"))),
            "tokens": _whole(0),
            "prompt_tokens": _whole(1),
            "image": _mapping(),
            "measured": pa.Column(
                None, pa.Check(_measured, element_wise=True, error="nll, tokens and right"), required=False
            ),
        },
        checks=[_rows("id is <example_id>#<conversation>", _item_ids)],
        strict=True,
    )


@cache
def _scores() -> "pandera.pandas.DataFrameSchema":
    """`scores.jsonl`: the scores of one evaluation item."""
    import pandera.pandas as pa

    numbers = pa.Check(_scored, element_wise=True, error="finite numbers by name, none below 0")
    return pa.DataFrameSchema(
        {
            "id": _text(unique=True),
            "scores": pa.Column(None, numbers),
            "parsed": pa.Column(None, pa.Check(_boolean, element_wise=True, error="true or false")),
            # of the rows where they are 1 or nothing they are absent, which pandas calls NaN
            "weight": pa.Column(None, pa.Check.ge(0), nullable=True, required=False),
            "read": pa.Column(
                None,
                pa.Check(_text_or_none, element_wise=True, error="text or null"),
                nullable=True,
                required=False,
            ),
        },
        strict=True,
    )


@cache
def _downloads() -> "pandera.pandas.DataFrameSchema":
    """The list of downloads of a dataset: one row per URL."""
    import pandera.pandas as pa

    from molmo_model.data.downloads import Status

    return pa.DataFrameSchema(
        {
            "url": _text(unique=True),
            "status": _text(pa.Check.isin([status.value for status in Status])),
            "reason": _text(empty=True),
            "http_status": _whole(0),
            "sha256": _text(pa.Check.str_matches(rf"^$|{SHA256}"), empty=True),
            "bytes": _whole(0),
            "format": _text(empty=True),
            "width": _whole(0),
            "height": _whole(0),
        },
        checks=[
            _rows("a reason where it failed, none where it did not", _tells_why),
            _rows("hash, size, format and sides where the status is ok, nowhere else", _content_if_ok),
        ],
        strict=True,
    )


@cache
def _schedule() -> "pandera.pandas.DataFrameSchema":
    """`schedule.parquet` of a mixture: the entry of each position of one period, or what a sampled one has counted."""
    import pandera.pandas as pa

    return pa.DataFrameSchema({"entry": _whole(0)}, strict=True)


@cache
def _packs() -> "pandera.pandas.DataFrameSchema":
    """`packs.parquet` of a mixture: packs of each window of the run."""
    import pandera.pandas as pa

    return pa.DataFrameSchema({"packs": _whole(0)}, strict=True)


@cache
def _image_hashes() -> "pandera.pandas.DataFrameSchema":
    """`image_hashes.parquet` of a validation: one row per distinct picture or film."""
    import pandera.pandas as pa

    from molmo_model.data.image_hashes import KINDS, SIDE

    cells = pa.Check(lambda x: isinstance(x, bytes) and len(x) == SIDE**2, element_wise=True, error=f"{SIDE**2} bytes")
    return pa.DataFrameSchema(
        {
            "image_sha256": _text(pa.Check.str_matches(SHA256), unique=True),
            "kind": _text(pa.Check.isin(KINDS)),
            "width": _whole(1),
            "height": _whole(1),
            "phash": _whole(0),
            "small": pa.Column(None, cells),
        },
        strict=True,
    )


@cache
def _metrics() -> "pandera.pandas.DataFrameSchema":
    """The metrics of `metrics.json`: one row per metric."""
    import pandera.pandas as pa

    return pa.DataFrameSchema(
        {
            "metric": _text(unique=True),
            "mean": _finite(),
            "stderr": _finite(pa.Check.ge(0)),
            "low": _finite(),
            "high": _finite(),
            "n": _whole(1),
        },
        checks=[_rows("low <= mean <= high", _encloses_mean)],
        strict=True,
    )


SCHEMAS: dict[str, Callable[[], "pandera.pandas.DataFrameSchema"]] = {
    "index": _index,
    "problems": _problems,
    "costs": _costs,
    "predictions": _predictions,
    "scores": _scores,
    "downloads": _downloads,
    "schedule": _schedule,
    "packs": _packs,
    "image_hashes": _image_hashes,
    "metrics": _metrics,
}
"""The contracts by name; see `docs/artefacts.md` for what the tables mean."""


def _text(*checks: Any, unique: bool = False, empty: bool = False) -> Any:
    import pandera.pandas as pa

    kind = pa.Check(
        (lambda x: isinstance(x, str)) if empty else (lambda x: isinstance(x, str) and x != ""),
        element_wise=True,
        error="text" if empty else "text that is not empty",
    )
    return pa.Column(None, [kind, *checks], unique=unique)


def _whole(least: int) -> Any:
    import pandas as pd
    import pandera.pandas as pa

    kind = pa.Check(pd.api.types.is_integer_dtype, error="whole numbers")
    return pa.Column(None, [kind, pa.Check.ge(least)])


def _finite(*checks: Any) -> Any:
    import pandas as pd
    import pandera.pandas as pa

    kind = pa.Check(pd.api.types.is_numeric_dtype, error="numbers")
    return pa.Column(None, [kind, pa.Check.in_range(-sys.float_info.max, sys.float_info.max), *checks])


def _lists(good: Callable[[Any], bool], words: str, required: bool = True) -> Any:
    import pandera.pandas as pa

    check = pa.Check(lambda x: hasattr(x, "__len__") and good(x), element_wise=True, error=words)
    return pa.Column(None, check, required=required)


def _mapping() -> Any:
    import pandera.pandas as pa

    return pa.Column(None, pa.Check(lambda x: isinstance(x, dict), element_wise=True, error="an object"))


def _rows(words: str, good: Callable[["pandas.DataFrame"], "pandas.Series"]) -> Any:
    import pandera.pandas as pa

    return pa.Check(good, name=words, error=words)


def _pixels(items: Any) -> bool:
    return len(items) == 0 or min(items) >= 1


def _hashes(items: Any) -> bool:
    return all(len(item) == 64 and set(item) <= set("0123456789abcdef") for item in items)


def _lengths(items: Any) -> bool:
    return len(items) == 0 or min(items) >= 0


def _clips(items: Any) -> bool:
    return all(len(clip) == 0 or (len(clip) == 2 and 0 <= clip[0] < clip[1]) for clip in items)


_VIDEO_COLUMNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "video_widths": (_pixels, "sides of at least 1 pixel"),
    "video_heights": (_pixels, "sides of at least 1 pixel"),
    "video_frames": (_pixels, "at least 1 frame"),
    "video_seconds": (_lengths, "at least 0 seconds"),
    "video_clips": (_clips, "nothing, or a start of at least 0 and an end after it"),
    "video_sha256": (_hashes, "SHA-256 in hexadecimal"),
}
"""Columns of the index where the dataset has films, all or none."""


def _names(items: Any) -> bool:
    return len(items) > 0 and all(items)


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _scored(value: Any) -> bool:
    return isinstance(value, dict) and all(0.0 <= score < math.inf for score in value.values())


def _counts_images(frame: "pandas.DataFrame") -> "pandas.Series":
    good = frame["widths"].map(len) == frame["n_images"]
    for column in ("heights", "image_sha256"):
        good &= frame[column].map(len) == frame["n_images"]
    return good


def _counts_videos(frame: "pandas.DataFrame") -> "pandas.Series":
    present = [frame[name].map(len) for name in _VIDEO_COLUMNS if name in frame]
    good = frame["id"].notna() & (len(present) in (0, len(_VIDEO_COLUMNS)))
    for lengths in present:
        good &= lengths == present[0]
    return good


def _counts_conversations(frame: "pandas.DataFrame") -> "pandas.Series":
    return frame["conversations"].map(len) == frame["conversation_tokens"].map(len)


def _tells_why(frame: "pandas.DataFrame") -> "pandas.Series":
    return (frame["status"] == "ok") == (frame["reason"] == "")


def _content_if_ok(frame: "pandas.DataFrame") -> "pandas.Series":
    ok, good = frame["status"] == "ok", frame["url"].notna()
    for column in ("sha256", "format"):
        good &= (frame[column] != "") == ok
    for column in ("bytes", "width", "height"):
        good &= (frame[column] > 0) == ok
    return good


def _encloses_mean(frame: "pandas.DataFrame") -> "pandas.Series":
    slack = 1e-9  # of rounding
    return (frame["low"] <= frame["mean"] + slack) & (frame["mean"] <= frame["high"] + slack)


def _item_ids(frame: "pandas.DataFrame") -> "pandas.Series":
    return frame["id"] == frame["example_id"] + "#" + frame["conversation"].astype(str)


def _apart(frame: "pandas.DataFrame") -> "pandas.Series":
    """Per row whether its range of the shard is made of whole tar blocks and begins where the one before it ended, or
    later."""
    ordered = frame.sort_values(["shard", "offset"], kind="stable")
    before = (ordered["offset"] + ordered["size"]).groupby(ordered["shard"]).shift(fill_value=0)
    good = (ordered["offset"] >= before) & (ordered["offset"] % TAR_BLOCK == 0) & (ordered["size"] % TAR_BLOCK == 0)
    return good.reindex(frame.index)
