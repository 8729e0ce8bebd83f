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
from collections.abc import Collection, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from molmo_model.config import Expectations
from molmo_model.data.example import Conversation
from molmo_model.data.shard_reader import ShardReader

if TYPE_CHECKING:
    import great_expectations as gx
    import pandas

SAMPLE = 20_000
"""Examples that are looked at, spread evenly over the index; a smaller data set is looked at whole."""
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
LONG = 64
"""Characters from which a text is long: nobody writes it twice by chance."""

Result = dict[str, Any]


def conversations(reader: ShardReader, bad_rows: int, seen: Collection[str] = ()) -> "pandas.DataFrame":
    """What the suite looks at: one row per conversation of up to `SAMPLE` examples.

    Args:
        reader: the dataset.
        bad_rows: rows of the source that became no example, dead links among them.
        seen: ids of evaluation examples with a picture that training shows too.

    Columns: `example`, `split`, `style`, `eval_style` (null in training), `prompt_chars`, `answer_chars`, `turns`,
    `images`, `short_side` and `aspect` (longer by shorter side) of the first image (null without one),
    `is_eval`, `is_majority_answer` (the most frequent answer of its style), `is_repeated_image` (the image of an
    earlier example), `is_repeated_question` (asks of the same images what an earlier conversation has asked; null where
    the style's templates ask, and for short questions without an image), `is_repeated_text` (a long answer that an
    earlier example has word for word; null where it is short), and the same number in every row: `drop_rate`, of the
    rows of the source that were bad, and `near_duplicate_rate`, of evaluation's examples that training has seen.
    """
    import pandas as pd

    frame = pd.DataFrame(_facts(reader))
    answers = frame.groupby("style")["answer"].agg(lambda column: min(column.mode()))
    frame["is_majority_answer"] = (frame["answer"] == frame["style"].map(answers)).astype(float)
    frame["eval_style"] = frame["style"].where(frame["split"] == "eval")
    frame["is_eval"] = (frame["split"] == "eval").astype(float)
    frame["drop_rate"] = bad_rows / (bad_rows + len(reader))
    frame["near_duplicate_rate"] = len(seen) / max(len(reader.rows("eval")), 1)
    return frame.drop(columns="answer")


def _facts(reader: ShardReader) -> Iterator[dict[str, Any]]:
    index, seen, asked, said = reader.index, set[str](), set[int](), dict[str, str]()
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
            question = _question(conversation, hashes[row])
            is_long = answer.text is not None and len(text) >= LONG
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
                "is_repeated_question": None if question is None else float(question in asked),
                "is_repeated_text": float(said.setdefault(text, example.id) != example.id) if is_long else None,
            }
            if question is not None:
                asked.add(question)


def _question(conversation: Conversation, files: list[str]) -> int | None:
    """What stands for all that is asked of some files; None where a template asks, or little is asked of nothing."""
    texts = [message.text for message in conversation.messages[:-1]]
    if None in texts or (not files and sum(len(text or "") for text in texts) < LONG):
        return None
    return hash((*files, *texts, *conversation.messages[0].options))


def suite(frame: "pandas.DataFrame", name: str, limits: Expectations) -> "gx.ExpectationSuite":
    """The expectations; those on evaluation are left out where the data set holds none out, and those on pictures, long
    answers and questions where it has none."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    train = frame[frame["split"] == "train"]["style"].value_counts(normalize=True).sort_index()
    expected = [
        gxe.ExpectTableRowCountToBeBetween(
            min_value=limits.min_rows, meta=_why("fewer teach and measure next to nothing")
        ),
        gxe.ExpectColumnMaxToBeBetween(
            column="drop_rate",
            max_value=limits.max_drop_rate,
            meta=_why("bad rows in such numbers point to a fault of the source"),
        ),
        gxe.ExpectColumnMeanToBeBetween(
            column="is_eval",
            min_value=limits.min_eval_share,
            max_value=limits.max_eval_share,
            meta=_why("without a held-out part nothing can be measured; more than half teaches little"),
        ),
        _mean(
            "is_majority_answer",
            limits.max_majority_answer,
            "if one answer is nearly always right, a high score means nothing",
        ),
        _mean(
            "is_repeated_image",
            limits.max_repeated_image,
            "one image in many examples is cheaper as one example with many conversations",
        ),
        _mean(
            "is_repeated_question",
            limits.max_repeated_question,
            "what is asked twice of one picture is learned twice, or answered in two ways",
        ),
        _mean("is_repeated_text", limits.max_repeated_text, "long answers that come again are copies, or boilerplate"),
        gxe.ExpectColumnMaxToBeBetween(
            column="near_duplicate_rate",
            max_value=limits.max_near_duplicates,
            meta=_why("scores on pictures that training has seen count memory"),
        ),
        gxe.ExpectColumnMedianToBeBetween(
            column="answer_chars",
            max_value=limits.median_answer_chars,
            meta=_why("answers of several pages are seldom meant"),
        ),
        _mostly("answer_chars", "packs cut what does not fit into them", most=limits.max_answer_chars),
        _mostly("prompt_chars", "packs cut what does not fit into them", most=limits.max_prompt_chars),
        _mostly("short_side", "smaller images are icons or mistakes", least=limits.min_short_side),
        _mostly("aspect", "strips are squashed beyond recognition", most=limits.max_aspect),
    ]
    if frame["is_eval"].any() and len(train):
        expected.append(
            gxe.ExpectColumnKLDivergenceToBeLessThan(
                column="eval_style",
                partition_object={"values": train.index.tolist(), "weights": train.tolist()},
                threshold=limits.max_style_divergence,
                tail_weight_holdout=0.001,
                meta=_why("evaluation should ask what training teaches"),
            )
        )
    empty = {column for column in _MAYBE_EMPTY if frame[column].isna().all()}
    if not frame["is_eval"].any():
        empty.add("near_duplicate_rate")
    kept = [one for one in expected if getattr(one, "column", "") not in empty]
    return gx.ExpectationSuite(name=name, expectations=kept)


_MAYBE_EMPTY = ("short_side", "aspect", "is_repeated_question", "is_repeated_text")
"""Columns that have nothing to judge in some datasets."""


def _mean(column: str, most: float, why: str) -> Any:
    import great_expectations.expectations as gxe

    return gxe.ExpectColumnMeanToBeBetween(column=column, max_value=most, meta=_why(why))


def _mostly(column: str, why: str, least: float | None = None, most: float | None = None) -> Any:
    import great_expectations.expectations as gxe

    return gxe.ExpectColumnValuesToBeBetween(
        column=column, min_value=least, max_value=most, mostly=0.99, meta=_why(why)
    )


def validate(frame: "pandas.DataFrame", dataset: str, docs: Path, limits: Expectations | None = None) -> list[Result]:
    """Runs the suite, writes Data Docs to `docs`, and returns one result per expectation, in a fixed order.

    Thresholds are those of `limits`, by default the usual ones.

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
        gx.ValidationDefinition(
            name=dataset, data=definition, suite=context.suites.add(suite(frame, dataset, limits or Expectations()))
        )
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
    """Takes out of Data Docs what is loaded from other machines and the controls that would need it, puts a plain style
    in, and writes a start page: the pages open without a network or a script, and tell nobody that they were opened."""
    (docs / "index.html").unlink(missing_ok=True)
    pages = sorted(docs.rglob("*.html"), reverse=True)  # validations before expectations
    for path in [*pages, *docs.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        for remote in (_SCRIPT, _REMOTE_TAG, _REMOTE_URL):
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


_SCRIPT = re.compile(r"<script\b.*?</script>", re.IGNORECASE | re.DOTALL)
"""All of them: they are loaded from elsewhere, or need one that is."""
_REMOTE_TAG = re.compile(r"<(?:link|img)\b[^>]*\b(?:href|src)\s*=\s*[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE)
_REMOTE_URL = re.compile(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)", re.IGNORECASE)
_STYLE = r"""
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left }
.modal, .collapse:not(.show), script, .navbar-toggler, footer, #edit-expectations, [data-toggle=collapse],
.card:has([data-toggle=buttons]) { display: none }
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
