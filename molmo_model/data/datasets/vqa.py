"""Short answers to questions about photographs: VQAv2, OK-VQA, TextVQA, TallyQA, GQA.

All questions about one picture become one message tree, as Molmo trains on VQAv2, OK-VQA and TallyQA; with the option
`flat` every question is an example of its own. TextVQA is always flat, as in Molmo.

Of several annotators' answers the most frequent is the text, and others as frequent are its alternatives (training
draws one of them); all answers, as published, stand in the metadata for scoring.

Columns are those of the cards named in each `Published`. Official releases of VQAv2 and OK-VQA come as two files,
questions and annotations, that are joined by `question_id` here.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from molmo_model.data.datasets.published import ROW_KEY, SPLIT_KEY, Family, Files, Published, RowError, each, family
from molmo_model.data.datasets.row_fields import ask, check_choice, text, unlabelled, whole
from molmo_model.data.example import Conversation, Example, Image, Message

Fields = dict[str, Any]

FACTS = ("question_id", "question_type", "answer_type", "multiple_choice_answer", "image_id", "issimple", "data_source")
"""Columns that go into the metadata of a conversation as they are."""


@dataclass
class Options:
    """How questions become examples."""

    flat: bool = False
    """One example per question in place of one per picture."""


def voted(answers: Sequence[str], field: str = "answers") -> Message:
    """The assistant's turn for the answers of several annotators: the most frequent one, of equals the first, and the
    others as frequent as alternatives. Empty answers have no vote.

    Raises:
        RowError: there is no answer, or all are empty, as in test splits without published answers.
    """
    votes = Counter(answer.strip() for answer in answers if answer.strip())
    if not votes:
        raise RowError(field, "holds no answer that is not empty")
    most = max(votes.values())
    first, *others = [answer for answer, count in votes.items() if count == most]
    return Message("assistant", first, alternatives=tuple(others))


def answers_of(fields: Fields, name: str = "answers") -> list[str]:
    """The answers of a row: a list of texts, or of records with `raw_answer` (OK-VQA) or `answer`; some may be empty.

    Raises:
        RowError: it is missing, or neither.
    """
    found = fields.get(name)
    if not isinstance(found, list):
        raise RowError(name, "is missing" if found is None else f"is a {type(found).__name__}; it must be a list")
    answers = []
    for i, entry in enumerate(found):
        value = entry.get("raw_answer", entry.get("answer")) if isinstance(entry, dict) else entry
        if not isinstance(value, str):
            raise RowError(f"{name}[{i}]", f"is {value!r}; it must be an answer in words")
        answers.append(value)
    return answers


@dataclass
class EvalOptions:
    """Which published split is evaluated on."""

    eval_split: str = "validation"
    """`validation`, or `test`, whose answers are not public unless the family's page says otherwise."""

    def __post_init__(self) -> None:
        check_choice("eval_split", self.eval_split, ("validation", "test"))


@dataclass
class VqaV2Options(Options):
    """How questions become examples, and which of them are evaluated on."""

    eval_split: str = "validation"
    """`validation`, or `testdev` or `test`, whose answers are not public."""

    def __post_init__(self) -> None:
        check_choice("eval_split", self.eval_split, ("validation", "testdev", "test"))


PRIVATE_SPLITS = ("test", "testdev")


def answered(
    style: str,
    fields: Fields,
    facts: Sequence[str],
    question: str = "question",
    private: Sequence[str] = (),
) -> Conversation:
    """The conversation of a row with a question and answers.

    Args:
        facts: columns that go into the metadata.
        question: the column with the question.
        private: published splits without answers; their rows can be asked, and not scored.
    """
    if fields.get(SPLIT_KEY) in private:
        known = {name: fields[name] for name in facts if fields.get(name) is not None}
        return unlabelled(style, text(fields, question), known)
    answers = answers_of(fields)
    metadata = {"answers": answers} | {name: fields[name] for name in facts if name in fields}
    return Conversation(style, (Message("user", text(fields, question)), voted(answers)), metadata=metadata)


def trees(
    style: str, picture: Callable[[Fields, Files], Image], talk: Callable[[str, Fields], Conversation]
) -> Callable[[list[Fields], Files, Any], list[Example]]:
    """A `convert` for rows of one picture: one message tree, or with the option `flat` an example for each question."""

    def convert(rows: list[Fields], files: Files, options: Any) -> list[Example]:
        joined = _joined(rows)
        talks = []
        for fields, numbers in joined:
            try:
                talks.append(talk(style, fields))
            except RowError as error:
                raise RowError(error.field, error.reason, rows=numbers) from error
        first = joined[0][0]
        image, name = picture(first, files), str(first.get("image_id", first[ROW_KEY]))
        facts = {"image_id": first["image_id"]} if "image_id" in first else {}
        if not options.flat:
            return [Example(name, (image,), tuple(talks), facts)]
        names = [str(fields.get("question_id", fields[ROW_KEY])) for fields, _ in joined]
        return [Example(name, (image,), (one,), facts) for name, one in zip(names, talks, strict=True)]

    return convert


def by_picture(fields: Fields) -> Hashable:
    """What rows about one picture have in common: its id, the path of its file, or the file's content."""
    for name in ("image_id", "image"):
        if isinstance(fields.get(name), int | str):
            return (name, fields[name])
    picture = fields.get("image")
    if isinstance(picture, dict) and isinstance(picture.get("bytes"), bytes):
        return hashlib.sha256(picture["bytes"]).hexdigest()
    raise RowError("image", "is missing")


def _joined(rows: list[Fields]) -> list[tuple[Fields, tuple[int, ...]]]:
    """Questions with their annotations, where these are rows of their own, and the numbers of the rows that each was
    made of. A row that finds no partner stays alone, and its missing half is told when it is converted."""
    halves = {row.get("question_id"): number for number, row in enumerate(rows) if "question" not in row}
    joined: list[tuple[Fields, tuple[int, ...]]] = []
    for number, row in enumerate(rows):
        if "question" in row:
            half = halves.pop(row.get("question_id"), None)
            joined.append((row, (number,)) if half is None else (rows[half] | row, (number, half)))
    return joined + [(rows[number], (number,)) for number in halves.values()]


def _inside(fields: Fields, files: Files) -> Image:
    return files.image(fields.get("image"), "image")


def _coco(fields: Fields, files: Files) -> Image:
    """A picture of COCO 2014 by its id, in the folder that its split has in COCO's own archives."""
    folder = fields.get(SPLIT_KEY, "train2014")
    return files.image(f"{folder}/COCO_{folder}_{whole(fields, 'image_id'):012d}.jpg", "image_id")


def _vote(style: str, fields: Fields) -> Conversation:
    return answered(style, fields, FACTS, private=PRIVATE_SPLITS)


def _count(style: str, fields: Fields) -> Conversation:
    """TallyQA: one number."""
    count = whole(fields, "answer")
    metadata = {"answer": count, "answer_type": "int", "answers": [str(count)]}
    facts = {name: fields[name] for name in FACTS if name in fields and name not in metadata}
    messages = (Message("user", text(fields, "question")), Message("assistant", str(count)))
    return Conversation(style, messages, metadata=metadata | facts)


def _text_vqa(fields: Fields, files: Files, options: Any) -> Example:
    facts = ("question_id", "image_id", "image_classes", "ocr_tokens", "flickr_300k_url")
    image, talk = files.image(fields.get("image"), "image"), answered("text_vqa", fields, facts, private=PRIVATE_SPLITS)
    return Example(str(whole(fields, "question_id")), (image,), (talk,), {"image_id": text(fields, "image_id")})


COCO_2014 = (
    "Unpack COCO's train2014.zip and val2014.zip (cocodataset.org) and the {what} questions and annotations of "
    "train2014 and val2014 ({page}) into one folder, so that it holds the JSON files and the folders train2014 and "
    "val2014."
)


@dataclass
class GqaOptions:
    """Which balanced questions are asked."""

    eval_split: str = "testdev"
    """`testdev` or `val`."""

    def __post_init__(self) -> None:
        check_choice("eval_split", self.eval_split, ("testdev", "val"))


def _gqa(rows: list[Fields], files: Files, options: Any) -> Example:
    """All questions about one picture, asked as for VQAv2; the file names each question by its id."""
    image = text(rows[0], "imageId")
    talks = each(rows, _gqa_talk)
    return Example(image, (files.image(f"images/{image}.jpg", "imageId"),), tuple(talks), {"image_id": image})


def _gqa_talk(fields: Fields) -> Conversation:
    answer, types = text(fields, "answer"), fields.get("types")
    kinds = {name: types[name] for name in ("structural", "semantic", "detailed") if name in types} if types else {}
    facts = {"answers": [answer], "question_id": fields[ROW_KEY], **kinds}
    return ask("eval_short_answer", text(fields, "question"), answer, facts)


FAMILIES: dict[str, Family] = {
    "vqa_v2": family(
        Published(
            hub="lmms-lab/VQAv2",
            revision="32665d35052eb4a6d4414851c3c829a72754915a",
            licence="CC-BY-4.0",
            card="https://huggingface.co/datasets/lmms-lab/VQAv2",
            splits={"eval": "validation"},  # the hub's copy has no training split with answers
        ),
        trees("vqa2", _inside, _vote),
        options=VqaV2Options,
        group=by_picture,
    ),
    "vqa_v2_coco": family(
        Published(
            hub=None,
            revision="v2.0",
            licence="CC-BY-4.0",
            card="https://visualqa.org/download.html",
            splits={"train": "train2014", "eval": "val2014"},
            by_hand=COCO_2014.format(what="VQA v2.0", page="visualqa.org"),
            files={split: f"v2_*mscoco_{split}_[aq]*.json" for split in ("train2014", "val2014")},
        ),
        trees("vqa2", _coco, _vote),
        options=Options,
        group=by_picture,
    ),
    "ok_vqa": family(
        Published(
            hub="lmms-lab/OK-VQA",
            revision="c9f858961f4095a9aeef615057b0822cce967096",
            licence="not stated on the card",
            card="https://huggingface.co/datasets/lmms-lab/OK-VQA",
            splits={"eval": "val2014"},
        ),
        trees("okvqa", _inside, _vote),
        options=Options,
        group=by_picture,
    ),
    "ok_vqa_coco": family(
        Published(
            hub=None,
            revision="v1.1",
            licence="not stated on the page",
            card="https://okvqa.allenai.org/download.html",
            splits={"train": "train2014", "eval": "val2014"},
            by_hand=COCO_2014.format(what="OK-VQA v1.1", page="okvqa.allenai.org"),
            # not those of VQAv2, which may lie in the same folder, beside the same pictures
            files={split: f"[!v]*scoco_{split}_[aq]*.json" for split in ("train2014", "val2014")},
        ),
        trees("okvqa", _coco, _vote),
        options=Options,
        group=by_picture,
    ),
    "text_vqa": family(
        Published(
            hub="lmms-lab/textvqa",
            revision="main",
            licence="CC-BY-4.0",
            card="https://huggingface.co/datasets/lmms-lab/textvqa",
            splits={"train": "train", "eval": "validation"},
        ),
        _text_vqa,
        options=EvalOptions,
    ),
    "tally_qa": family(
        Published(
            hub=None,
            revision="main",
            licence="not stated on the page",
            card="https://github.com/manoja328/TallyQA_dataset",
            splits={"train": "train", "eval": "test"},
            by_hand="Unpack tallyqa.zip (train.json, test.json), COCO's train2014.zip and val2014.zip and Visual "
            "Genome's images.zip and images2.zip into one folder, so that it holds train2014, val2014, VG_100K and "
            "VG_100K_2.",
            files={"train": "train.json", "test": "test.json"},
        ),
        trees("tally_qa", _inside, _count),
        options=Options,
        group=by_picture,
    ),
    "gqa": family(
        Published(
            hub=None,
            revision="1.2",
            licence="CC-BY-4.0",
            card="https://cs.stanford.edu/people/dorarad/gqa/download.html",
            splits={"eval": "testdev"},  # the test set has no answers
            by_hand="Unpack questions1.2.zip and images.zip into one folder, so that it holds "
            "testdev_balanced_questions.json, val_balanced_questions.json and the folder images.",
            files={split: f"{split}_balanced_questions.json" for split in ("testdev", "val")},
        ),
        _gqa,
        options=GqaOptions,
        group=lambda fields: text(fields, "imageId"),
    ),
}
