"""Benchmarks of questions about pictures, for evaluation alone: MathVista, MMMU, RealWorldQA, CountBenchQA, MuirBench,
MMIU, BLINK, ClockBench.

Everything that scoring may want is in a conversation's metadata. Columns as the cards and Molmo2's reference readers
(`olmo/data/academic_image_datasets.py`, `academic_multi_image_datasets.py`) describe them; they stand at each set.
Styles are the reference's.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from molmo_model.data.datasets.pixmo_synthetic import TIME_QUESTION
from molmo_model.data.datasets.published import ROW_KEY, Files, Published, RowError, family
from molmo_model.data.datasets.row_fields import (
    LETTERS,
    ask,
    check_choice,
    choose,
    facts_of,
    index_of,
    letter_index,
    text,
    text_of,
    texts,
    whole,
)
from molmo_model.data.example import Conversation, Example, Message

# --- MathVista: {pid, question, decoded_image, choices [text], unit, precision, answer, question_type, answer_type,
# metadata {category, task, skills, ...}, query}


def convert_math_vista(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One question of mathematics; free answers are numbers or text, as `answer_type` and `precision` say."""
    question, answer = text(fields, "question"), text(fields, "answer")
    facts = facts_of(fields, "question_type", "answer_type", "precision", "unit", "query")
    about = fields.get("metadata")
    if isinstance(about, dict):
        facts |= {name: about[name] for name in ("category", "task", "skills", "source") if about.get(name) is not None}
    if text(fields, "question_type") == "multi_choice":
        choices = texts(fields, "choices")
        talk = choose("eval_multiple_choice", question, choices, index_of(answer, choices), facts, field="choices")
    else:
        talk = ask("eval_short_answer", question, answer, facts | {"answers": [answer]})
    return Example(text(fields, "pid"), (files.image(fields.get("decoded_image"), "decoded_image"),), (talk,))


MATH_VISTA = family(
    Published(
        hub="AI4Math/MathVista",
        revision="2b6ad69445fbb5695c9b165475e8decdbeb97747",
        licence="CC-BY-SA-4.0",
        card="https://huggingface.co/datasets/AI4Math/MathVista",
        splits={"eval": "testmini"},
    ),
    convert_math_vista,
)


# --- MMMU, all subjects: {id, question with <image 1> ..., options (a Python list as text), image_1 ... image_7,
# answer (a letter, a text, or a list as text), question_type, topic_difficulty, subfield, img_type, explanation}

MAX_IMAGES = 7
MMMU_IMAGES = ("first", "all")


@dataclass
class MMMUOptions:
    """Which pictures a question is shown with."""

    images: str = "first"
    """`first`: `image_1` alone, or none where the choices are pictures, as published numbers of Molmo have it; `all`:
    every picture, and `Image 2` in place of `<image 2>`."""

    def __post_init__(self) -> None:
        check_choice("images", self.images, MMMU_IMAGES)


def convert_mmmu(fields: dict[str, Any], files: Files, options: MMMUOptions) -> Example:
    """One question of a college examination."""
    name, question = text(fields, "id"), text(fields, "question")
    is_mc = text(fields, "question_type") == "multiple-choice"
    choices = [text_of(str(choice), "options") for choice in _python_list(fields, "options")] if is_mc else []
    fields_of_images = [f"image_{i}" for i in range(1, MAX_IMAGES + 1) if f"image_{i}" in fields]
    if options.images == "first":
        pictures_as_choices = sum(re.match("<img='(.*?)'>", choice) is not None for choice in choices) > 1
        fields_of_images = [] if pictures_as_choices else fields_of_images[:1]
    else:
        question, *choices = (re.sub(r"<image\s*(\d+)>", r"Image \1", one) for one in (question, *choices))
    facts = facts_of(fields, "question_type", "topic_difficulty", "subfield", "img_type")
    facts["subject"] = re.sub(r"^[a-z]+_|_\d+$", "", name)
    several = len(fields_of_images) > 1
    if is_mc:
        style = "mantis_instruct_mc" if several else "a_okvqa_mc"
        talk = choose(style, question, choices, letter_index(fields, "answer", choices), facts)
    else:
        talk = _open_question("mantis_instruct_da" if several else "vqa2", question, fields, facts)
    return Example(name, tuple(files.image(fields[one], one) for one in fields_of_images), (talk,))


def _open_question(style: str, question: str, fields: dict[str, Any], facts: dict[str, Any]) -> Conversation:
    answer = text(fields, "answer")
    found = _python_list(fields, "answer") if answer.startswith("[") else [answer]
    answers = [text_of(str(one), "answer") for one in found]
    if not answers:
        raise RowError("answer", "is an empty list")
    said = Message("assistant", answers[0], alternatives=tuple(answers[1:]))
    return Conversation(style, (Message("user", question), said), metadata={"answers": answers} | facts)


def _python_list(fields: dict[str, Any], name: str) -> list[Any]:
    """A list that was written as Python writes it; read without running anything."""
    written = text(fields, name)
    try:
        found = ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise RowError(name, f"is {written[:80]!r}; it must be a list as Python writes it") from error
    if not isinstance(found, list):
        raise RowError(name, f"is {written[:80]!r}; it must be a list as Python writes it")
    return found


MMMU = family(
    Published(
        hub="lmms-lab/MMMU",
        revision="364f2e2eb107b36e07ff4c5a15f5947a759cef47",
        licence="Apache-2.0",
        card="https://huggingface.co/datasets/lmms-lab/MMMU",
        splits={"eval": "validation"},
    ),
    convert_mmmu,
    options=MMMUOptions,
)


# --- RealWorldQA: {image, question that ends with an instruction, answer}

SHORT_INSTRUCTION = "Please answer directly with a single word or number."
LETTER_INSTRUCTION = "Please answer directly with only the letter of the correct option and nothing else."


def convert_real_world_qa(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One question. Of those for a short answer the instruction is left out; choices stay in the question's text."""
    prompt, answer = text(fields, "question"), text(fields, "answer")
    if SHORT_INSTRUCTION in prompt:
        style, question, kind = "eval_short_answer", prompt.split("\n")[0].strip(), "short_answer"
    elif LETTER_INSTRUCTION in prompt:
        style, question, kind = "eval_multiple_choice", prompt, "multiple_choice"
    else:
        raise RowError("question", "ends with neither of the two instructions that the set has")
    question = text_of(question.replace(SHORT_INSTRUCTION, ""), "question")
    talk = ask(style, question, answer, {"answers": [answer], "prompt": prompt, "question_type": kind})
    return Example(str(fields[ROW_KEY]), (files.image(fields.get("image"), "image"),), (talk,))


REAL_WORLD_QA = family(
    Published(
        hub="xai-org/RealworldQA",
        revision="481a14be6e43b2cd324107bdd14c8e519b6b9955",
        licence="CC-BY-ND-4.0",
        card="https://huggingface.co/datasets/xai-org/RealworldQA",
        splits={"eval": "test_0412"},
    ),
    convert_real_world_qa,
)


# --- CountBenchQA: {image, text, question, number}


def convert_count_bench(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One question for a number."""
    count = whole(fields, "number")
    talk = ask("point_count", text(fields, "question"), str(count), {"count": count})
    return Example(str(fields[ROW_KEY]), (files.image(fields.get("image"), "image"),), (talk,))


COUNT_BENCH = family(
    Published(
        hub="vikhyatk/CountBenchQA",
        revision="ab72615b4926a2a3ee9639136fe369e33e5eb1b7",
        licence="none stated; see the card",
        card="https://huggingface.co/datasets/vikhyatk/CountBenchQA",
        splits={"eval": "test"},
    ),
    convert_count_bench,
)


# --- MuirBench: {idx, task, image_relation, image_type, question and options with <image>, answer (a letter),
# image_list [picture], counterpart_idx}


def convert_muir_bench(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One question about several pictures, which may be its choices; each `<image>` becomes the picture's name."""
    question, *choices = _named([text(fields, "question"), *texts(fields, "options")])
    found = fields.get("image_list")
    if not isinstance(found, list) or not found:
        raise RowError("image_list", "is missing or empty")
    facts = facts_of(fields, "task", "image_relation", "image_type") | {"counterpart": fields.get("counterpart_idx")}
    talk = choose("mantis_instruct_mc", question, choices, letter_index(fields, "answer", choices), facts)
    pictures = tuple(files.image(one, f"image_list[{i}]") for i, one in enumerate(found))
    return Example(str(fields.get("idx", fields[ROW_KEY])), pictures, (talk,))


def _named(written: Sequence[str]) -> list[str]:
    """Texts in which every `<image>`, counted through all of them, is `Image 1`, `Image 2`, ..."""
    named, number = [], 0
    for one in written:
        first, *rest = one.split("<image>")
        for part in rest:
            number += 1
            first += f"Image {number}{part}"
        named.append(first)
    return named


MUIR_BENCH = family(
    Published(
        hub="MUIRBENCH/MUIRBENCH",
        revision="9191cbf6edb43b4a9da97514e2d5436b490d36c8",
        licence="CC-BY-4.0",
        card="https://huggingface.co/datasets/MUIRBENCH/MUIRBENCH",
        splits={"eval": "test"},
    ),
    convert_muir_bench,
)


# --- MMIU: {task, visual_input_component, source, question, options (lines `A: ...`), context, input_image_path [path],
# output (a letter)}

OPTION_LINE = re.compile(r"^([A-Z]):\s?(.+)$", re.MULTILINE)


def convert_mmiu(fields: dict[str, Any], files: Files, options: Any) -> Example:
    """One question about several pictures. A few rows name a letter that they do not offer: bad rows."""
    found = OPTION_LINE.findall(text(fields, "options"))
    if [letter for letter, _ in found] != list(LETTERS[: len(found)]):
        raise RowError("options", f"have the letters {[letter for letter, _ in found]}; they must go from A on")
    choices = [text_of(choice, "options") for _, choice in found]
    names = [name.removeprefix("./") for name in texts(fields, "input_image_path")]
    if not names:
        raise RowError("input_image_path", "is empty")
    facts = facts_of(fields, "task", "source", "visual_input_component") | {"relationship": names[0].split("/")[0]}
    index = letter_index(fields, "output", choices)
    talk = choose("mantis_instruct_mc", text(fields, "question"), choices, index, facts)
    pictures = tuple(files.image(name, f"input_image_path[{i}]") for i, name in enumerate(names))
    return Example(str(fields[ROW_KEY]), pictures, (talk,))


MMIU = family(
    Published(
        hub="FanqingM/MMIU-Benchmark",
        revision="main",
        licence="CC-BY-4.0",
        card="https://huggingface.co/datasets/FanqingM/MMIU-Benchmark",
        splits={"eval": "test"},
        by_hand=(
            "copy the repository and unpack its seven archives of pictures there, so that what the column "
            "input_image_path names, such as `./High-level-obj-semantic/...`, lies below the copy."
        ),
    ),
    convert_mmiu,
)


# --- BLINK, 14 tasks: {idx, sub_task, question, prompt (question and choices), image_1 ... image_4, choices [text],
# answer `(A)`}

BLINK_TASKS = (
    *("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw"),
    *("Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance"),
    *("Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity"),
)
MAX_BLINK_IMAGES = 4


@dataclass
class BlinkOptions:
    """Which tasks are read."""

    subsets: list[str] = field(default_factory=list)
    """Tasks, such as `Counting`; empty is all 14."""


def convert_blink(fields: dict[str, Any], files: Files, options: BlinkOptions) -> Example:
    """One question about one picture or several; its prompt has the choices, as published."""
    choices = texts(fields, "choices")
    index = letter_index(fields | {"answer": text(fields, "answer").strip("()")}, "answer", choices)
    names = [f"image_{i}" for i in range(1, MAX_BLINK_IMAGES + 1) if f"image_{i}" in fields]
    style = "mantis_instruct_mc" if len(names) > 1 else "eval_multiple_choice"
    facts = {"options": choices, "answer_index": index, "answer": choices[index]}
    talk = ask(style, text(fields, "prompt"), LETTERS[index], facts | facts_of(fields, "sub_task", "question"))
    return Example(text(fields, "idx"), tuple(files.image(fields[name], name) for name in names), (talk,))


BLINK = family(
    Published(
        hub="BLINK-Benchmark/BLINK",
        revision="main",
        licence="Apache-2.0",
        card="https://huggingface.co/datasets/BLINK-Benchmark/BLINK",
        splits={"eval": "val"},  # the test split has no answers
        subset=BLINK_TASKS,
    ),
    convert_blink,
    options=BlinkOptions,
)


# --- ClockBench (Yang et al. 2022, arXiv:2111.09162), as Molmo's builder writes it: {image, cropped_image, hour,
# minute, image_id}

CLOCK_SPLITS = ("coco", "openimg", "movies")


@dataclass
class ClockOptions:
    """Which photographs are read, and how much of them."""

    eval_split: str = "coco"
    """`coco`, `openimg` or `movies`."""
    cropped: bool = False
    """The clock alone, in place of the whole picture."""

    def __post_init__(self) -> None:
        check_choice("eval_split", self.eval_split, CLOCK_SPLITS)


def convert_clock_bench(fields: dict[str, Any], files: Files, options: ClockOptions) -> Example:
    """One photographed clock; 12 o'clock is hour 0, and no second is known."""
    hour, minute = whole(fields, "hour") % 12, whole(fields, "minute")
    time = {"hour": hour, "minute": minute, "second": -1, "image_id": text(fields, "image_id")}
    answer = f"The time shown is {hour or 12}:{minute:02d}"
    name = "cropped_image" if options.cropped else "image"
    picture = files.image(fields.get(name), name)
    return Example(str(fields[ROW_KEY]), (picture,), (ask("clocks", TIME_QUESTION, answer, time),))


CLOCK_BENCH = family(
    Published(
        hub=None,
        revision="main",
        licence="not stated on the page",
        card="https://github.com/charigyang/itsabouttime",
        splits={"eval": "coco"},
        by_hand="Run Molmo's dataset builder (github.com/allenai/molmo, olmo/hf_datasets/clock_bench.py) and write "
        "each split with `to_parquet` as FOLDER/coco.parquet, openimg.parquet and movies.parquet.",
        files={split: f"{split}*.parquet" for split in CLOCK_SPLITS},
    ),
    convert_clock_bench,
    options=ClockOptions,
)
