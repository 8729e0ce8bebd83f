"""PixMo, what programs drew: documents of code (PixMo-Docs, CoSyn-400K), points in them (CoSyn-point) and watch faces.

The pictures stand in the rows, those of the clocks excepted. Columns as the dataset cards describe them and as the
reference readers use them (Molmo's `olmo/data/pixmo_datasets.py`, Molmo2's `olmo/data/academic_image_datasets.py`):

| set | columns |
|---|---|
| `allenai/pixmo-docs` | image, image_id, questions {question [], answer []}; subsets charts, diagrams, tables, other |
| `allenai/CoSyn-400K` | image, id, qa_pairs {question [], explanation [], answer []}; ten subsets |
| `allenai/CoSyn-point` | image, id, questions [], answer_points [{x [], y []}] in percent, names [] |
| `allenai/pixmo-clocks` | example_id, hour_visible, minute_visible, second_visible, shows_seconds, text, and more |
"""

from dataclasses import dataclass, field
from typing import Any

from molmo_model.data.datasets.pixmo import LICENCE
from molmo_model.data.datasets.published import Files, Published, RowError, family
from molmo_model.data.datasets.row_fields import (
    ask,
    facts_of,
    percent_points,
    records,
    subset_of,
    text,
    text_of,
    texts,
    whole,
)
from molmo_model.data.example import Conversation, Example, Message

SPLITS = {"train": "train", "eval": "validation"}


# --- documents

DOCS_STYLES = {
    "charts": "pixmo_docs_charts",
    "diagrams": "pixmo_docs_diagrams",
    "tables": "pixmo_docs_tables",
    "other": "pixmo_docs_other",
}
"""Subsets and their styles."""


@dataclass
class DocsOptions:
    """Which kinds of documents."""

    subsets: list[str] = field(default_factory=list)
    """`charts`, `diagrams`, `tables`, `other`; empty is all."""


def convert_docs(fields: dict[str, Any], files: Files, options: DocsOptions) -> Example:
    """One document with its questions."""
    kind = subset_of(fields, options.subsets)
    talks = []
    for i, one in enumerate(records(fields, "questions", ("question", "answer"))):
        question = text_of(one["question"], f"questions[{i}].question")
        talks.append(ask(DOCS_STYLES[kind], question, text_of(one["answer"], f"questions[{i}].answer")))
    picture, name = files.image(fields.get("image"), "image"), text(fields, "image_id")
    return Example(f"{kind}-{name}", (picture,), tuple(talks), {"image_id": name, "kind": kind})


PIXMO_DOCS = family(
    Published(
        hub="allenai/pixmo-docs",
        revision="bf3c0eae5c8d58fde4c4d569313e0419f9fe0927",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-docs",
        splits=SPLITS,
        subset=tuple(DOCS_STYLES),
    ),
    convert_docs,
    options=DocsOptions,
)

COSYN_STYLES = {
    "chart": ("cosyn_chart", "cosyn_chart_exp"),
    "chemical": ("cosyn_chemical", "cosyn_chemical_exp"),
    "circuit": ("cosyn_circuit", "cosyn_circuit_exp"),
    "diagram": ("cosyn_diagram", "cosyn_diagram_exp"),
    "document": ("cosyn_document", "cosyn_document_exp"),
    "graphic": ("cosyn_graphic", "cosyn_graphic_exp"),
    "math": ("cosyn_math", "cosyn_math_exp"),
    "music": ("cosyn_music", "cosyn_music_exp"),
    "nutrition": ("cosyn_nutrition", "cosyn_nutrition_exp"),
    "table": ("cosyn_table", "cosyn_table_exp"),
}
"""Subsets and their styles, of answers alone and of answers after an explanation."""


@dataclass
class CoSynOptions:
    """Which kinds of documents, and how they are answered."""

    subsets: list[str] = field(default_factory=list)
    """Of the ten kinds; empty is all."""
    explain: bool = True
    """Answers come after their explanations, in styles such as `cosyn_chart_exp`; else alone, in `cosyn_chart`."""


def convert_cosyn(fields: dict[str, Any], files: Files, options: CoSynOptions) -> Example:
    """One document with its questions."""
    kind, talks = subset_of(fields, options.subsets), []
    style = COSYN_STYLES[kind][options.explain]
    parts = ("question", "explanation", "answer") if options.explain else ("question", "answer")
    for i, one in enumerate(records(fields, "qa_pairs", parts)):
        said = {part: text_of(one[part], f"qa_pairs[{i}].{part}") for part in parts}
        answer = Message("assistant", said["answer"], explanation=said.get("explanation"))
        talks.append(Conversation(style, (Message("user", said["question"]), answer)))
    picture, name = files.image(fields.get("image"), "image"), text(fields, "id")
    return Example(f"{kind}-{name}", (picture,), tuple(talks), {"image_id": name, "kind": kind})


COSYN = family(
    Published(
        hub="allenai/CoSyn-400K",
        revision="main",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/CoSyn-400K",
        splits=SPLITS,
        subset=tuple(COSYN_STYLES),
    ),
    convert_cosyn,
    options=CoSynOptions,
)


def convert_cosyn_points(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One document with questions that are answered by points."""
    questions, names, found = texts(fields, "questions"), texts(fields, "names"), fields.get("answer_points")
    if not isinstance(found, list) or not len(questions) == len(names) == len(found):
        count = len(found) if isinstance(found, list) else 0
        raise RowError("answer_points", f"has {count} entries for {len(questions)} questions and {len(names)} names")
    talks = []
    for i, (question, name) in enumerate(zip(questions, names, strict=True)):
        where = f"answer_points[{i}]"
        points = percent_points(records({where: found[i]}, where, ("x", "y")), where)
        messages = (Message("user", question, label=name), Message("assistant", points=points, label=name))
        talks.append(Conversation("cosyn_point", messages, metadata={"count": len(points)}))
    picture, known = files.image(fields.get("image"), "image"), text(fields, "id")
    return Example(known, (picture,), tuple(talks), {"image_id": known})


COSYN_POINT = family(
    Published(
        hub="allenai/CoSyn-point",
        revision="main",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/CoSyn-point",
        splits={"train": "train", "eval": None},
    ),
    convert_cosyn_points,
)


# --- watch faces

TIME_QUESTION = "What time is being shown?"


def convert_clock(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One watch face and the time that it shows."""
    name = text(fields, "example_id")
    seconds = whole(fields, "second_visible") if fields.get("shows_seconds") else -1
    time = {"hour": whole(fields, "hour_visible"), "minute": whole(fields, "minute_visible"), "second": seconds}
    talk = ask("clocks", TIME_QUESTION, text(fields, "text"), time)
    picture = files.image(fields.get("image", f"images/{name}.png"), "image")
    return Example(name, (picture,), (talk,), facts_of(fields, "watchface_id", "watchface_name", "time_format"))


PIXMO_CLOCKS = family(
    Published(
        hub="allenai/pixmo-clocks",
        revision="5adc2dbe82b848ae5b4c81858db60eb10fe180db",
        licence=LICENCE,
        card="https://huggingface.co/datasets/allenai/pixmo-clocks",
        splits=SPLITS,
        by_hand=(
            "copy the repository, which has the times but no pictures, and draw each watch face of facer.io at its "
            "`watch_time` as `images/<example_id>.png` in the copy, or below `image_root`."
        ),
    ),
    convert_clock,
)
