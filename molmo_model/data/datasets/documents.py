"""Questions about documents and signs: DocVQA, InfographicVQA, ST-VQA. Every row is an example with one question.

An answer may be worded in several ways: the first most frequent one is the text, others as frequent its alternatives;
all of them stand in the metadata, for the edit distance of scoring (ANLS).

Columns are those of the cards named in each `Published`.
"""

from collections.abc import Callable
from typing import Any

from molmo_model.data.datasets.family import Family
from molmo_model.data.datasets.published import Files, Published, family
from molmo_model.data.datasets.row_fields import text
from molmo_model.data.datasets.vqa import PRIVATE_SPLITS, EvalOptions, answered
from molmo_model.data.example import Example

Fields = dict[str, Any]


def _reader(
    style: str, id_field: str, image_field: str, facts: tuple[str, ...]
) -> Callable[[Fields, Files, Any], Example]:
    """A `convert` for rows with one picture, `question` and `answers`; `facts` are columns for the metadata."""

    def convert(fields: Fields, files: Files, options: Any) -> Example:
        name = text({id_field: str(fields[id_field])} if id_field in fields else {}, id_field)
        talk = answered(style, fields | {"question_id": name}, ("question_id", *facts), private=PRIVATE_SPLITS)
        return Example(name, (files.image(fields.get(image_field), image_field),), (talk,))

    return convert


FAMILIES: dict[str, Family] = {
    "doc_qa": family(
        Published(
            hub="HuggingFaceM4/DocumentVQA",
            revision="main",  # its older commits are halves of an upload
            licence="not stated on the card",
            card="https://huggingface.co/datasets/HuggingFaceM4/DocumentVQA",
            splits={"train": "train", "eval": "validation"},
        ),
        _reader(
            "doc_qa",
            "questionId",
            "image",
            ("question_types", "docId", "ucsf_document_id", "ucsf_document_page_no"),
        ),
        options=EvalOptions,
    ),
    "info_qa": family(
        Published(
            hub="lmms-lab/DocVQA",
            revision="2d9ad9f365a9822f0fabe03da12200ea61caf9f2",  # the last whose card lists the training split
            licence="Apache-2.0",
            card="https://huggingface.co/datasets/lmms-lab/DocVQA",
            splits={"train": "train", "eval": "validation"},
            subset="InfographicVQA",
        ),
        _reader("info_qa", "questionId", "image", ("answer_type", "operation/reasoning", "image_url")),
        options=EvalOptions,
    ),
    "st_qa": family(
        Published(
            hub=None,
            revision="task 3",
            licence="not stated on the page",
            card="https://rrc.cvc.uab.es/?ch=11",
            splits={"train": "train", "eval": None},  # test has no answers
            by_hand="Register at rrc.cvc.uab.es (challenge 11, Scene Text VQA, task 3) and unpack "
            "the training images and train_task_3.json into one folder.",
            files={"train": "train_task_3.json"},
        ),
        _reader("st_qa", "question_id", "file_path", ("dataset",)),
    ),
}
