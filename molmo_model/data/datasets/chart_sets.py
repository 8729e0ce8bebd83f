"""Charts, figures and tables: ChartQA, DVQA, FigureQA, PlotQA, TabMWP.

DVQA, FigureQA and PlotQA ask many questions about one drawing, which become one message tree.

Columns are those of the cards named in each `Published`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from molmo_model.data.datasets.family import Family
from molmo_model.data.datasets.published import ROW_KEY, SPLIT_KEY, Files, Published, RowError, each, family
from molmo_model.data.datasets.row_fields import ask, check_choice, choose, records, text, text_of, texts, whole
from molmo_model.data.datasets.vqa import answered
from molmo_model.data.example import Conversation, Example

Fields = dict[str, Any]

HUMAN, AUGMENTED = 7398, 20901
"""Training questions of ChartQA that people wrote, and those that a model wrote."""
CHART_QA_PARTS = ("human", "augmented")
"""In the order of the card's class label `human_or_machine`."""


@dataclass
class ChartOptions:
    """Which part of ChartQA is read, and what it weighs."""

    parts: str = "both"
    """`human`, `augmented` or `both`."""
    weighted: bool = False
    """Human questions weigh 1.477 and augmented ones 0.523, so that both parts of the training set weigh the same in
    total though there are 2.8 times as many augmented ones."""
    eval_split: str = "val"
    """`val` or `test`."""

    def __post_init__(self) -> None:
        check_choice("parts", self.parts, ("both", *CHART_QA_PARTS))
        check_choice("eval_split", self.eval_split, ("val", "test"))


@dataclass
class TableOptions:
    """How questions of TabMWP are asked."""

    include_options: bool = False
    """Questions that have choices offer them; the answer is then a letter."""


def _chart_qa(fields: Fields, files: Files, options: ChartOptions) -> Example | list[Example]:
    label = whole(fields, "human_or_machine")
    if label not in (0, 1):
        raise RowError("human_or_machine", f"is {label}; it must be 0 (human) or 1 (machine)")
    if options.parts not in ("both", CHART_QA_PARTS[label]):
        return []
    facts = {"is_human": label == 0, "answers": texts(fields, "label")}
    talk = answered("chart_qa", fields | facts, ("is_human",), question="query")
    if options.weighted:
        share = AUGMENTED if label == 0 else HUMAN
        talk = Conversation(talk.style, talk.messages, 2 * share / (HUMAN + AUGMENTED), talk.metadata)
    return Example(fields[ROW_KEY], (files.image(fields.get("image"), "image"),), (talk,))


def _pairs(style: str) -> Callable[[Fields, Files, Any], Example]:
    """A `convert` for rows `image` and `qa`, a list of `question` and `answer`."""

    def convert(fields: Fields, files: Files, options: Any) -> Example:
        found = records(fields, "qa", ("question", "answer"))
        if not found:
            raise RowError("qa", "is empty")
        talks = []
        for i, pair in enumerate(found):
            answer = text_of(pair["answer"], f"qa[{i}].answer")
            talks.append(ask(style, text_of(pair["question"], f"qa[{i}].question"), answer, {"answers": [answer]}))
        return Example(fields[ROW_KEY], (files.image(fields.get("image"), "image"),), tuple(talks))

    return convert


def _plot_qa(rows: list[Fields], files: Files, options: Any) -> Example:
    """All questions about one plot; answers are numbers or words."""

    def talk(fields: Fields) -> Conversation:
        answer = fields.get("answer")
        if answer is None or isinstance(answer, dict | list):
            raise RowError("answer", "is missing" if answer is None else f"is a {type(answer).__name__}")
        facts = {name: fields[name] for name in ("question_id", "template", "type") if name in fields}
        return ask("plot_qa", text(fields, "question_string"), str(answer), {"answers": [str(answer)]} | facts)

    index, split = whole(rows[0], "image_index"), rows[0].get(SPLIT_KEY, "train")
    image = files.image(f"{split}/png/{index}.png", "image_index")
    return Example(f"{split}-{index}", (image,), tuple(each(rows, talk)), {"image_index": index})


def _tab_mwp(fields: Fields, files: Files, options: TableOptions) -> Example:
    """A problem about a table; its name in the file is that of the picture."""
    name, question, answer = fields[ROW_KEY], text(fields, "question"), text(fields, "answer")
    facts = ("unit", "ques_type", "ans_type", "grade", "table_title")
    metadata = {"question_id": name, "answers": [answer]} | {fact: fields[fact] for fact in facts if fact in fields}
    choices = texts(fields, "choices") if fields.get("choices") else []
    if choices and answer not in choices:
        raise RowError("answer", f"is {answer!r}, none of the choices {choices}")
    if options.include_options and choices:
        talk = choose("tabwmp_da", question, choices, choices.index(answer), metadata, field="choices")
    else:
        talk = ask("tabwmp_da", question, answer, metadata | ({"options": choices} if choices else {}))
    return Example(f"tabmwp-{name}", (files.image(f"tables/{name}.png", ROW_KEY),), (talk,))


def _image_index(fields: Fields) -> int:
    return whole(fields, "image_index")


FAMILIES: dict[str, Family] = {
    "chart_qa": family(
        Published(
            hub="HuggingFaceM4/ChartQA",
            revision="b605b6e08b57faf4359aeb2fe6a3ca595f99b6c5",
            licence="GPL-3.0",
            card="https://huggingface.co/datasets/HuggingFaceM4/ChartQA",
            splits={"train": "train", "eval": "val"},
        ),
        _chart_qa,
        options=ChartOptions,
    ),
    "dv_qa": family(
        Published(
            hub="vikhyatk/dvqa",
            revision="main",
            licence="not stated on the card",
            card="https://huggingface.co/datasets/vikhyatk/dvqa",
            splits={"train": "train", "eval": None},
        ),
        _pairs("dv_qa"),
    ),
    "figure_qa": family(
        Published(
            hub="vikhyatk/figureqa",
            revision="main",
            licence="not stated on the card",
            card="https://huggingface.co/datasets/vikhyatk/figureqa",
            splits={"train": "train", "eval": None},
        ),
        _pairs("figure_qa"),
    ),
    "plot_qa": family(
        Published(
            hub=None,
            revision="v1.0",
            licence="CC-BY-4.0",
            card="https://github.com/NiteshMethani/PlotQA",
            splits={"train": "train", "eval": "validation"},
            by_hand="Fetch the images and question-answer pairs from the links of github.com/NiteshMethani/PlotQA and "
            "put them into a folder, for SPLIT train and validation, as SPLIT/png/*.png and SPLIT/qa_pairs_V1.json.",
            files={split: f"{split}/qa_pairs_*.json" for split in ("train", "validation", "test")},
        ),
        _plot_qa,
        group=_image_index,
    ),
    "tab_mwp": family(
        Published(
            hub=None,
            revision="main",
            licence="CC-BY-NC-SA-4.0",
            card="https://github.com/lupantech/PromptPG",
            splits={"train": "train", "eval": "dev"},
            by_hand="Copy data/tabmwp of github.com/lupantech/PromptPG, which holds problems_train.json, "
            "problems_dev.json and the folder tables.",
            files={split: f"problems_{split}.json" for split in ("train", "dev", "test")},
        ),
        _tab_mwp,
        options=TableOptions,
    ),
}
