"""What a data set as a whole should look like: one Great Expectations suite over its conversations, which only warns.

Rules about single rows stop a stage and stand in `schemas.py`; here stand statistics that have no right value, only an
unusual one: how many rows were dropped, whether one answer is everywhere, whether evaluation asks what training
teaches. Great Expectations is imported inside the functions: it takes several seconds.
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from molmo_model.data.shard_reader import ShardReader

if TYPE_CHECKING:
    import great_expectations as gx
    import pandas

SAMPLE = 20_000
"""Examples that are looked at, spread evenly over the index; a smaller data set is looked at whole."""
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
STYLE_DIVERGENCE = 0.1
"""Kullback-Leibler divergence, in nats, of evaluation's styles from training's that is still unremarkable."""

Result = dict[str, Any]


def conversations(reader: ShardReader, bad_rows: int) -> "pandas.DataFrame":
    """What the suite looks at: one row per conversation of up to `SAMPLE` examples.

    Columns: `example`, `split`, `style`, `eval_style` (null in training), `prompt_chars`, `answer_chars`, `turns`,
    `images`, `short_side` and `aspect` (longer by shorter side) of the first image (null without one),
    `is_eval`, `is_majority_answer` (the most frequent answer of its style), `is_repeated_image` (the image of an
    earlier example), and the same number in every row: `drop_rate`, of the rows of the source that were bad.
    """
    import pandas as pd

    frame = pd.DataFrame(_facts(reader))
    answers = frame.groupby("style")["answer"].agg(lambda column: min(column.mode()))
    frame["is_majority_answer"] = (frame["answer"] == frame["style"].map(answers)).astype(float)
    frame["eval_style"] = frame["style"].where(frame["split"] == "eval")
    frame["is_eval"] = (frame["split"] == "eval").astype(float)
    frame["drop_rate"] = bad_rows / (bad_rows + len(reader))
    return frame.drop(columns="answer")


def _facts(reader: ShardReader) -> Iterator[dict[str, Any]]:
    index, seen = reader.index, set[str]()
    hashes = reader.files()
    splits = index["split"].to_pylist()
    step = max(1, math.ceil(len(reader) / SAMPLE))
    for row in range(0, len(reader), step):
        example = reader.facts(row)
        repeated = any(image in seen for image in hashes[row])
        seen.update(hashes[row])
        sides = sorted((example.images[0].width, example.images[0].height)) if example.images else None
        for conversation in example.conversations:
            answer = conversation.messages[-1]
            text = answer.text if answer.text is not None else json.dumps(answer.points)
            yield {
                "example": example.id,
                "split": splits[row],
                "style": conversation.style,
                "prompt_chars": sum(len(m.text or m.label or "") for m in conversation.messages[:-1]),
                "answer": text,
                "answer_chars": len(text),
                "turns": len(conversation.messages) // 2,
                "images": len(example.images),
                "short_side": None if sides is None else sides[0],
                "aspect": None if sides is None else sides[1] / sides[0],
                "is_repeated_image": float(repeated),
            }


def suite(frame: "pandas.DataFrame", name: str) -> "gx.ExpectationSuite":
    """The expectations; those on evaluation are left out where the data set holds none out."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    train = frame[frame["split"] == "train"]["style"].value_counts(normalize=True).sort_index()
    expected = [
        gxe.ExpectTableRowCountToBeBetween(min_value=100, meta=_why("fewer teach and measure next to nothing")),
        gxe.ExpectColumnMaxToBeBetween(
            column="drop_rate", max_value=0.01, meta=_why("more bad rows than 1 in 100 point to a fault of the source")
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="is_eval",
            min_value=0.001,
            max_value=0.5,
            meta=_why("without a held-out part nothing can be measured; more than half teaches little"),
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="is_majority_answer",
            max_value=0.9,
            meta=_why("if one answer is nearly always right, a high score means nothing"),
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="is_repeated_image",
            max_value=0.5,
            meta=_why("one image in many examples is cheaper as one example with many conversations"),
        ),
        gxe.ExpectColumnMedianToBeBetween(
            column="answer_chars", max_value=2000, meta=_why("answers of several pages are seldom meant")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="answer_chars", max_value=8000, mostly=0.99, meta=_why("packs cut what does not fit into them")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="short_side", min_value=16, mostly=0.99, meta=_why("smaller images are icons or mistakes")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="aspect", max_value=10, mostly=0.99, meta=_why("strips are squashed beyond recognition")
        ),
    ]
    if frame["is_eval"].any() and len(train):
        expected.append(
            gxe.ExpectColumnKLDivergenceToBeLessThan(
                column="eval_style",
                partition_object={"values": train.index.tolist(), "weights": train.tolist()},
                threshold=STYLE_DIVERGENCE,
                tail_weight_holdout=0.001,
                meta=_why("evaluation should ask what training teaches"),
            )
        )
    if frame["images"].eq(0).all():
        expected = [one for one in expected if getattr(one, "column", "") not in ("short_side", "aspect")]
    return gx.ExpectationSuite(name=name, expectations=expected)


def validate(frame: "pandas.DataFrame", dataset: str, docs: Path) -> list[Result]:
    """Runs the suite, writes Data Docs to `docs`, and returns one result per expectation, in a fixed order.

    A result has `expectation`, `column`, `kwargs`, `why`, `success`, `observed` and, where single values were judged,
    `unexpected_percent`; equal data give equal results.
    """
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    progress: Any = {"globally": False}
    context.variables.progress_bars = progress
    batch = context.data_sources.add_pandas("shards").add_dataframe_asset(dataset)
    definition = batch.add_batch_definition_whole_dataframe("conversations")
    validation = context.validation_definitions.add(
        gx.ValidationDefinition(name=dataset, data=definition, suite=context.suites.add(suite(frame, dataset)))
    )
    shutil.rmtree(docs, ignore_errors=True)
    context.add_data_docs_site(site_name="molmo", site_config=_site(docs))
    checkpoint = gx.Checkpoint(
        name=dataset,
        validation_definitions=[validation],
        actions=[gx.checkpoint.UpdateDataDocsAction(name="docs", site_names=["molmo"])],
        result_format={"result_format": "SUMMARY"},
    )
    run = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame})
    make_offline(docs, f"Data set {dataset}")
    (outcome,) = run.run_results.values()
    results = [_plain(one) for one in outcome.results]
    return sorted(results, key=lambda one: (one["column"] or "", one["expectation"], json.dumps(one["kwargs"])))


def statistics(frame: "pandas.DataFrame", reader: ShardReader) -> dict[str, Any]:
    """Counts and quantiles that a person looks for, as plain JSON."""
    splits = Counter(reader.index["split"].to_pylist())
    return {
        "examples": {split: splits[split] for split in sorted(splits)},
        "looked_at": int(frame["example"].nunique()),
        "styles": {
            split: {style: int(n) for style, n in sorted(part["style"].value_counts().items())}
            for split, part in frame.groupby("split")
        },
        "quantiles": {
            column: {str(q): _rounded(frame[column].quantile(q)) for q in QUANTILES}
            for column in ("prompt_chars", "answer_chars", "turns", "images", "short_side", "aspect")
            if frame[column].notna().any()
        },
    }


def make_offline(docs: Path, title: str) -> None:
    """Takes out of Data Docs what is loaded from other machines, puts a plain style in, and writes a start page that
    needs no scripts: the pages open without a network and tell nobody that they were opened."""
    (docs / "index.html").unlink(missing_ok=True)
    pages = sorted(docs.rglob("*.html"), reverse=True)  # validations before expectations
    for path in [*pages, *docs.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        for remote in (_REMOTE_SCRIPT, _REMOTE_TAG, _REMOTE_URL):
            text = remote.sub("", text)
        path.write_text(text.replace("</head>", f"<style>{_STYLE}</style></head>", 1), encoding="utf-8")
    names = {"validations": "Results", "expectations": "What is expected"}
    links = "".join(
        f'<li><a href="{quote(page.relative_to(docs).as_posix())}">{names[page.relative_to(docs).parts[0]]}</a></li>'
        for page in pages
    )
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    start = f"{head}<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><ul>{links}</ul></body></html>"
    (docs / "index.html").write_text(start + "\n", encoding="utf-8")


_REMOTE_SCRIPT = re.compile(r"<script\b[^>]*\bsrc\s*=\s*[\"']?(?:https?:)?//[^>]*>\s*</script>", re.IGNORECASE)
_REMOTE_TAG = re.compile(r"<(?:link|img)\b[^>]*\b(?:href|src)\s*=\s*[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE)
_REMOTE_URL = re.compile(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)", re.IGNORECASE)
_STYLE = r"""
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left }
.modal, .collapse:not(.show), script, .navbar-toggler, footer, #edit-expectations { display: none }
.fa-check-circle::before { content: "\2713"; color: #17713a } .fa-times::before { content: "\2717"; color: #b3261e }
.fa-exclamation-triangle::before { content: "!"; color: #8a5a00 }
"""


def _why(reason: str) -> dict[str, str]:
    return {"why": reason}


def _site(docs: Path) -> Any:
    return {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "show_cta_footer": False},
    }


def _plain(result: Any) -> Result:
    """One result without times, ids and samples."""
    config = result.expectation_config
    kwargs = {
        key: value for key, value in config.kwargs.items() if key not in ("batch_id", "column", "partition_object")
    }
    observed = result.result.get("observed_value")
    plain: Result = {
        "expectation": config.type,
        "column": config.kwargs.get("column"),
        "kwargs": _rounded(kwargs),
        "why": (config.meta or {}).get("why", ""),
        "success": bool(result.success),
        "observed": _rounded(observed),
    }
    if (percent := result.result.get("unexpected_percent")) is not None:
        plain["unexpected_percent"] = _rounded(percent)
    if (result.exception_info or {}).get("raised_exception"):
        plain["observed"] = "could not be computed"
    return plain


def _rounded(value: Any) -> Any:
    """Plain JSON with numbers of six digits after the point, so that no platform's last bit shows."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() else round(number, 6)
