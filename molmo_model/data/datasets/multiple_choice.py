"""Questions with choices: AI2D, A-OKVQA (also with direct answers), ScienceQA.

The choices stand in the question's `options`, which prompts letter; the answer is the right letter. The metadata hold
the choices, the right one's number from 0 and its text.

AI2D asks about parts of diagrams by letters in boxes on the picture. The hub's test set has them drawn opaquely, over
the labels that they replace (`ai2_diagram`; the copy with the original pictures is `lmms-lab/ai2d-no-mask`). For
training, Molmo's builder writes every such picture twice, with opaque boxes and with transparent ones beside the label;
family `ai2d_boxes` reads what it writes. Where all choices but at most one are themselves letters on the picture, they
get no letters of their own (style `ai2_diagram_no_letter`): the answer is one of the choices. The rule is that of
olmo/data/academic_image_datasets.py in molmo2. Molmo's builder says which choices are letters; the hub's rows do not,
there every single letter is one.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.data.datasets.family import Family
from molmo_model.data.datasets.published import ROW_KEY, SPLIT_KEY, Files, Published, RowError, family
from molmo_model.data.datasets.row_fields import check_choice, choose, text, texts, unlabelled, whole
from molmo_model.data.datasets.vqa import PRIVATE_SPLITS, EvalOptions, answered
from molmo_model.data.example import Conversation, Example, Message

Fields = dict[str, Any]


@dataclass
class BoxOptions:
    """Which pictures with lettered boxes are kept; pictures without boxes always are."""

    boxes: str = "both"
    """`transparent`, `opaque` or `both`."""
    eval_split: str = "validation"
    """`validation` or `test`."""

    def __post_init__(self) -> None:
        check_choice("boxes", self.boxes, ("both", "transparent", "opaque"))
        check_choice("eval_split", self.eval_split, ("validation", "test"))


def _ai2d(fields: Fields, files: Files, options: Any) -> Example:
    """A row of lmms-lab/ai2d: `answer` is the number of the right choice, from 0, as text."""
    question, choices, answer = text(fields, "question"), texts(fields, "options"), whole(fields, "answer")
    metadata = {"question_id": fields[ROW_KEY], "has_transparent_box": False}
    letters = [len(choice) == 1 and choice.isascii() and choice.isalpha() for choice in choices]
    talk = _diagram(question, choices, letters, True, answer, metadata, "options")
    return Example(fields[ROW_KEY], (files.image(fields.get("image"), "image"),), (talk,))


def _ai2d_boxes(fields: Fields, files: Files, options: BoxOptions) -> Example | list[Example]:
    """A row as Molmo's builder writes it."""
    boxed, transparent = _flag(fields, "abc_label"), _flag(fields, "has_transparent_box")
    if boxed and options.boxes != "both" and transparent != (options.boxes == "transparent"):
        return []
    name = text(fields, "question_id")
    metadata = {
        "question_id": name,
        "image_id": whole(fields, "image_id"),
        "abc_label": boxed,
        "has_transparent_box": transparent,
    }
    letters = fields.get("option_is_abc")
    choices = texts(fields, "answer_texts")
    if not isinstance(letters, list) or len(letters) != len(choices):
        raise RowError(
            "option_is_abc", f"is {letters!r}; it must have one flag for each of {len(choices)} answer_texts"
        )
    answer = whole(fields, "correct_answer")
    talk = _diagram(text(fields, "question"), choices, letters, boxed, answer, metadata, "answer_texts")
    kind = "transparent" if transparent else "opaque"
    image = files.image(fields.get("image"), "image")
    return Example(f"{name}-{kind}" if boxed else name, (image,), (talk,))


def _diagram(
    question: str, choices: list[str], letters: Sequence[Any], boxed: bool, answer: int, metadata: Fields, field: str
) -> Conversation:
    """Args:
    letters: for each choice whether it is a letter on the picture.
    boxed: whether the picture has letters.
    field: the choices' name in the row.
    """
    lettered = choose("ai2_diagram", question, choices, answer, metadata, field)
    written = [choice.upper() if letter else choice for choice, letter in zip(choices, letters, strict=True)]
    shown = list(dict.fromkeys(written))  # some questions offer a choice twice
    if not boxed or sum(map(bool, letters)) < len(choices) - 1 or len(shown) < 2:
        return lettered
    facts = {"options": shown, "answer_index": shown.index(written[answer]), "answer": written[answer]} | metadata
    messages = (Message("user", question, options=tuple(shown)), Message("assistant", written[answer]))
    return Conversation("ai2_diagram_no_letter", messages, metadata=facts)


def _a_okvqa_mc(fields: Fields, files: Files, options: Any) -> Example:
    name, choices = text(fields, "question_id"), texts(fields, "choices")
    metadata = {"question_id": name}
    if fields.get(SPLIT_KEY) in PRIVATE_SPLITS:
        talk = unlabelled("a_okvqa_mc", text(fields, "question"), metadata, choices, field="choices")
    else:
        question, answer = text(fields, "question"), whole(fields, "correct_choice_idx")
        talk = choose("a_okvqa_mc", question, choices, answer, metadata, field="choices")
    return Example(name, (files.image(fields.get("image"), "image"),), (talk,))


def _a_okvqa_da(fields: Fields, files: Files, options: Any) -> Example | list[Example]:
    """Direct answers; questions that are hard to answer without the choices are trained on and not evaluated."""
    if fields.get(SPLIT_KEY, "train") != "train" and _flag(fields, "difficult_direct_answer"):
        return []
    name, facts = text(fields, "question_id"), ("question_id", "difficult_direct_answer")
    answers = {"answers": _listed(fields, "direct_answers")}
    talk = answered("a_okvqa_da", fields | answers, facts, private=PRIVATE_SPLITS)
    return Example(name, (files.image(fields.get("image"), "image"),), (talk,))


def _science_qa(fields: Fields, files: Files, options: Any) -> Example | list[Example]:
    """Rows without a picture are no part of this family. The hint, where there is one, comes before the question."""
    if "image" not in fields:
        return []
    hint = fields.get("hint", "")
    question = f"{hint.strip()}\n{text(fields, 'question')}".strip()
    facts = ("task", "grade", "subject", "topic", "category", "skill")
    metadata = {"question_id": fields[ROW_KEY]} | {name: fields[name] for name in facts if name in fields}
    choices, answer = texts(fields, "choices"), whole(fields, "answer")
    talk = choose("science_qa", question, choices, answer, metadata, field="choices")
    return Example(fields[ROW_KEY], (files.image(fields["image"], "image"),), (talk,))


def _flag(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool):
        raise RowError(name, "is missing" if value is None else f"is {value!r}; it must be true or false")
    return value


def _listed(fields: Fields, name: str) -> Any:
    """A list of texts, or a text that writes one, such as `['a', 'b']`."""
    value = fields.get(name)
    if not isinstance(value, str):
        return value
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise RowError(name, f"is {value[:80]!r}, which is no list of answers") from error
    return list(found) if isinstance(found, list | tuple) else found


A_OKVQA = Published(
    hub="HuggingFaceM4/A-OKVQA",
    revision="main",
    licence="not stated on the card",
    card="https://huggingface.co/datasets/HuggingFaceM4/A-OKVQA",
    splits={"train": "train", "eval": "validation"},
)

FAMILIES: dict[str, Family] = {
    "ai2d": family(
        Published(
            hub="lmms-lab/ai2d",
            revision="c83a9b9692933aff8349157c88a413df9d02c4e5",
            licence="not stated on the card",
            card="https://huggingface.co/datasets/lmms-lab/ai2d",
            splits={"eval": "test"},  # the hub's copy has no training split
        ),
        _ai2d,
    ),
    "ai2d_boxes": family(
        Published(
            hub=None,
            revision="main",
            licence="not stated on the page",
            card="https://prior.allenai.org/projects/diagrams",
            splits={"train": "train", "eval": "validation"},
            by_hand="Run Molmo's dataset builder for AI2D (github.com/allenai/molmo, olmo/hf_datasets/ai2d.py), which "
            "draws the boxes, and write each split with `to_parquet` as FOLDER/train.parquet and so on.",
            files={split: f"{split}*.parquet" for split in ("train", "validation", "test")},
        ),
        _ai2d_boxes,
        options=BoxOptions,
    ),
    "a_okvqa_mc": family(A_OKVQA, _a_okvqa_mc, options=EvalOptions),
    "a_okvqa_da": family(A_OKVQA, _a_okvqa_da, options=EvalOptions),
    "science_qa": family(
        Published(
            hub="derek-thomas/ScienceQA",
            revision="36e8c67ba16365894bf6adfa6fd5de5bcd01cdb9",
            licence="CC-BY-SA-4.0",
            card="https://huggingface.co/datasets/derek-thomas/ScienceQA",
            splits={"train": "train", "eval": "validation"},
        ),
        _science_qa,
        options=EvalOptions,
    ),
}
