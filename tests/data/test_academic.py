"""The academic image sets: rows with the published columns and types become the right conversations, whole, and what is
wrong with a row is told. Columns and types are those of the cards that each family names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Features, Image, Value

from molmo_model.config import DatasetConfig, Params
from molmo_model.data.datasets import FAMILIES, chart_sets, documents, multiple_choice, revision_of, vqa
from molmo_model.data.datasets.published import RowError
from molmo_model.data.example import Conversation, Example, Message
from molmo_model.errors import ConfigError, DataError
from pipelines import shards, stage
from tests.data.snapshots import bad, good, hub_image, png, read, snapshot

ACADEMIC = {**vqa.FAMILIES, **documents.FAMILIES, **multiple_choice.FAMILIES, **chart_sets.FAMILIES}
STRINGS = datasets.List(Value("string"))


def ask(style: str, question: str, answer: str, metadata: dict[str, Any], *others: str) -> Conversation:
    return Conversation(
        style, (Message("user", question), Message("assistant", answer, alternatives=others)), metadata=metadata
    )


def offered(style: str, question: str, options: list[str], index: int, metadata: dict[str, Any]) -> Conversation:
    messages = (Message("user", question, options=tuple(options)), Message("assistant", "ABCDEFG"[index]))
    facts = {"options": options, "answer_index": index, "answer": options[index]}
    return Conversation(style, messages, metadata=facts | metadata)


def talks(rows: list[tuple[str, Any]]) -> dict[str, tuple[str, bytes, tuple[Conversation, ...]]]:
    """Side, picture and conversations by id."""
    return {name: (side, one.images[0].data, one.conversations) for name, (side, one) in good(rows).items()}


# ---- VQA


def test_the_vote() -> None:
    votes = ["net", "Net", "net", "goal", "goal", " ", "mesh"]
    assert vqa.voted(votes) == Message("assistant", "net", alternatives=("goal",))
    assert vqa.voted([" net ", "net"]) == Message("assistant", "net")
    for nothing in ([], ["", " "]):
        with pytest.raises(RowError, match="answers holds no answer"):
            vqa.voted(nothing)


VQA_V2 = Features(
    {
        "question_type": Value("string"),
        "multiple_choice_answer": Value("string"),
        "answers": [{"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}],
        "image_id": Value("int64"),
        "answer_type": Value("string"),
        "question_id": Value("int64"),
        "question": Value("string"),
        "image": Image(),
    }
)


def asked(image: int, number: int, answers: list[str] | None) -> dict[str, Any]:
    votes = [{"answer": one, "answer_confidence": "yes", "answer_id": i + 1} for i, one in enumerate(answers or [])]
    return {
        "question_type": "what is",
        "multiple_choice_answer": answers[0] if answers else None,
        "answers": votes if answers is not None else None,
        "image_id": image,
        "answer_type": "other",
        "question_id": 1000 * image + number,
        "question": f"What is {number}?",
        "image": hub_image(image),
    }


def vqa_facts(image: int, number: int, answers: list[str]) -> dict[str, Any]:
    return {
        "answers": answers,
        "question_id": 1000 * image + number,
        "question_type": "what is",
        "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "image_id": image,
    }


def test_vqa_v2(tmp_path: Path) -> None:
    tied, clear = ["a", "b"] * 5, ["c"] * 9 + ["d"]
    rows = [asked(7, 0, tied), asked(8, 0, clear), asked(7, 1, clear), asked(8, 1, None)]
    snapshot(tmp_path, VQA_V2, {"validation": rows})
    made = read("vqa_v2", tmp_path)
    assert talks(made) == {
        "7": (
            "eval",
            png(7),
            (
                ask("vqa2", "What is 0?", "a", vqa_facts(7, 0, tied), "b"),
                ask("vqa2", "What is 1?", "c", vqa_facts(7, 1, clear)),
            ),
        ),
        "8": ("eval", png(8), (ask("vqa2", "What is 0?", "c", vqa_facts(8, 0, clear)),)),
    }
    assert good(made)["7"][1].metadata == {"image_id": 7}
    assert bad(made) == [("validation-00000-of-00001.parquet", 4, "answers", "is missing")]
    flat = talks(read("vqa_v2", tmp_path, options={"flat": True}))
    assert list(flat) == ["7000", "7001", "8000"] and all(len(one[2]) == 1 for one in flat.values())


def test_vqa_v2_as_its_makers_publish_it(tmp_path: Path) -> None:
    """Questions and annotations are two files; pictures lie in COCO's folders."""
    both = [asked(3, 0, ["x"] * 10), asked(3, 1, ["y"] * 10), asked(4, 0, ["z"] * 10)]
    asking = ("image_id", "question", "question_id")
    questions = [{name: row[name] for name in asking} for row in both]
    answers = [{name: row[name] for name in row if name not in ("image", "question")} for row in both]
    for split in ("train2014", "val2014"):
        (tmp_path / split).mkdir()
        for image in (3, 4):
            (tmp_path / split / f"COCO_{split}_{image:012d}.jpg").write_bytes(png(image))
        (tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": questions}))
        (tmp_path / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": answers[:-1]}))
    made = read("vqa_v2_coco", tmp_path, eval_examples=0)
    assert talks(made) == {
        "3": (
            "train",
            png(3),
            (
                ask("vqa2", "What is 0?", "x", vqa_facts(3, 0, ["x"] * 10)),
                ask("vqa2", "What is 1?", "y", vqa_facts(3, 1, ["y"] * 10)),
            ),
        )
    }
    assert bad(made) == [("v2_OpenEnded_mscoco_train2014_questions.json", 3, "answers", "is missing")]
    assert [side for side, _, _ in talks(read("vqa_v2_coco", tmp_path)).values()] == ["train", "eval"]
    for votes in answers[:2]:
        votes["answers"] = []
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    made = read("vqa_v2_coco", tmp_path, eval_examples=0)
    assert list(talks(made)) == ["4"]
    assert [row[1:3] for row in bad(made)] == [(1, "answers"), (2, "answers")]
    with pytest.raises(DataError, match=r"by hand: Unpack COCO's train2014.zip.*visualqa.org"):
        read("vqa_v2_coco", None)


def test_ok_vqa(tmp_path: Path) -> None:
    features = Features(
        {
            "question_id": Value("string"),
            "image": Image(),
            "question": Value("string"),
            "answers": STRINGS,
            "question_type": Value("string"),
            "answer_type": Value("string"),
        }
    )
    common = {"question_type": "one", "answer_type": "other"}
    rows = [
        {"question_id": "11", "image": hub_image(1), "question": "Which sport?", "answers": ["race", "race", "ski"]},
        {"question_id": "12", "image": hub_image(2), "question": "Why?", "answers": ["fun"]},
        {"question_id": "13", "image": hub_image(1), "question": "When?", "answers": ["noon"]},
    ]
    snapshot(tmp_path, features, {"val2014": [row | common for row in rows]})
    made = talks(read("ok_vqa", tmp_path))
    first = ask("okvqa", "Which sport?", "race", {"answers": ["race", "race", "ski"], "question_id": "11", **common})
    third = ask("okvqa", "When?", "noon", {"answers": ["noon"], "question_id": "13", **common})
    assert list(made) == ["val2014-0000000", "val2014-0000001"]
    assert made["val2014-0000000"] == ("eval", png(1), (first, third))


def test_ok_vqa_as_its_makers_publish_it(tmp_path: Path) -> None:
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014" / "COCO_train2014_000000000005.jpg").write_bytes(png(5))
    question = {"image_id": 5, "question": "Which?", "question_id": 51}
    answers = [{"answer_id": 1, "raw_answer": "racing", "answer_confidence": "yes", "answer": "race"}]
    annotation = {"image_id": 5, "question_id": 51, "answers": answers, "question_type": "one", "answer_type": "other"}
    for split, rows in (("train", 1), ("val", 0)):
        texts = {"questions": [question] * rows, "annotations": [annotation] * rows}
        for kind, name in (("questions", "OpenEnded_mscoco"), ("annotations", "mscoco")):
            (tmp_path / f"{name}_{split}2014_{kind}.json").write_text(json.dumps({kind: texts[kind]}))
            other = {kind: [row | {"question_id": 77} for row in texts[kind]]}  # VQAv2 beside it, for the same pictures
            (tmp_path / f"v2_{name}_{split}2014_{kind}.json").write_text(json.dumps(other))
        (tmp_path / f"v2_mscoco_{split}2014_complementary_pairs.json").write_text("[[51, 77]]")
    both = read("vqa_v2_coco", tmp_path)
    assert not bad(both) and [talk.metadata["question_id"] for _, _, (talk,) in talks(both).values()] == [77]
    made = talks(read("ok_vqa_coco", tmp_path))
    facts = {"question_id": 51, "question_type": "one", "answer_type": "other", "image_id": 5}
    assert made == {"5": ("train", png(5), (ask("okvqa", "Which?", "racing", {"answers": ["racing"]} | facts),))}


def test_text_vqa(tmp_path: Path) -> None:
    features = Features(
        {
            "image_id": Value("string"),
            "question_id": Value("int32"),
            "question": Value("string"),
            "question_tokens": STRINGS,
            "image": Image(),
            "image_width": Value("int32"),
            "image_height": Value("int32"),
            "flickr_original_url": Value("string"),
            "flickr_300k_url": Value("string"),
            "answers": STRINGS,
            "image_classes": STRINGS,
            "set_name": Value("string"),
            "ocr_tokens": STRINGS,
        }
    )
    row = {
        "image_id": "005e",
        "question_id": 0,
        "question": "what is the brand of this camera?",
        "question_tokens": ["what"],
        "image": hub_image(1),
        "image_width": 8,
        "image_height": 6,
        "flickr_original_url": "https://farm/o.jpg",
        "flickr_300k_url": "https://farm/z.jpg",
        "answers": ["nous les gosses", "dakota", "dakota", "", "clos culombu", "dakota", "x", "x", "x", "y"],
        "image_classes": ["Camera"],
        "set_name": "train",
        "ocr_tokens": ["DAKOTA", "", "CO"],
    }
    train = [row, row | {"question_id": 1, "answers": [""] * 10}]
    snapshot(tmp_path, features, {"train": train, "validation": [row | {"question_id": 2}]})
    made = read("text_vqa", tmp_path)
    facts = {
        "answers": row["answers"],
        "question_id": 0,
        "image_id": "005e",
        "image_classes": ["Camera"],
        "ocr_tokens": ["DAKOTA", "", "CO"],
        "flickr_300k_url": "https://farm/z.jpg",
    }
    assert talks(made)["0"] == ("train", png(1), (ask("text_vqa", str(row["question"]), "dakota", facts, "x"),))
    assert list(talks(made)) == ["0", "2"] and talks(made)["2"][0] == "eval"
    assert bad(made) == [("train-00000-of-00001.parquet", 2, "answers", "holds no answer that is not empty")]


def test_tally_qa(tmp_path: Path) -> None:
    row = {
        "answer": 4,
        "data_source": "imported_genome",
        "image": "VG_100K_2/24.jpg",
        "image_id": 924,
        "issimple": False,
        "question": "How many headlights?",
        "question_id": 30,
    }
    (tmp_path / "VG_100K_2").mkdir()
    (tmp_path / "VG_100K_2" / "24.jpg").write_bytes(png(2))
    (tmp_path / "train.json").write_text(
        json.dumps([row, row | {"answer": "4.5", "question_id": 31}, row | {"image": "VG_100K/0.jpg", "image_id": 9}])
    )
    (tmp_path / "test.json").write_text("[]")
    made = read("tally_qa", tmp_path)
    facts = {"question_id": 30, "image_id": 924, "issimple": False, "data_source": "imported_genome"}
    metadata = {"answer": 4, "answer_type": "int", "answers": ["4"]} | facts
    assert talks(made) == {"924": ("train", png(2), (ask("tally_qa", "How many headlights?", "4", metadata),))}
    assert [(line, name) for _, line, name, _ in bad(made)] == [(2, "answer"), (3, "image")]


# ---- documents


def test_doc_qa(tmp_path: Path) -> None:
    features = Features(
        {
            "questionId": Value("int32"),
            "question": Value("string"),
            "question_types": STRINGS,
            "image": Image(),
            "docId": Value("int32"),
            "ucsf_document_id": Value("string"),
            "ucsf_document_page_no": Value("string"),
            "answers": STRINGS,
        }
    )
    row = {
        "questionId": 337,
        "question": "what is the date?",
        "question_types": ["handwritten", "form"],
        "image": hub_image(1),
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
        "answers": ["1/8/93", "1/8/1993"],
    }
    train = [row, row | {"questionId": 338, "answers": None}, row | {"questionId": None}]
    snapshot(tmp_path, features, {"train": train, "validation": [row | {"questionId": 9}]})
    made = read("doc_qa", tmp_path)
    facts = {
        "answers": ["1/8/93", "1/8/1993"],
        "question_id": "337",
        "question_types": ["handwritten", "form"],
        "docId": 279,
        "ucsf_document_id": "xnbl0037",
        "ucsf_document_page_no": "1",
    }
    assert talks(made)["337"] == ("train", png(1), (ask("doc_qa", "what is the date?", "1/8/93", facts, "1/8/1993"),))
    assert list(talks(made)) == ["337", "9"]
    assert [row[1:] for row in bad(made)] == [(2, "answers", "is missing"), (3, "questionId", "is missing")]


def test_info_qa(tmp_path: Path) -> None:
    features = Features(
        {
            "questionId": Value("string"),
            "question": Value("string"),
            "answers": STRINGS,
            "answer_type": STRINGS,
            "image": Image(),
            "image_url": Value("string"),
            "operation/reasoning": STRINGS,
            "ocr": Value("string"),
            "data_split": Value("string"),
        }
    )
    row = {
        "questionId": "65718",
        "question": "Which platform?",
        "answers": ["pinterest"],
        "answer_type": ["single span"],
        "image": hub_image(1),
        "image_url": "https://example.org/i.png",
        "operation/reasoning": ["comparison"],
        "ocr": "{}",
        "data_split": "train",
    }
    snapshot(tmp_path, features, {"train": [row], "validation": [row]}, subset="InfographicVQA")
    made = talks(read("info_qa", tmp_path))
    facts = {
        "answers": ["pinterest"],
        "question_id": "65718",
        "answer_type": ["single span"],
        "operation/reasoning": ["comparison"],
        "image_url": "https://example.org/i.png",
    }
    assert made["65718"] == ("train", png(1), (ask("info_qa", "Which platform?", "pinterest", facts),))
    assert list(made) == ["65718", "65718~2"]


def test_st_qa(tmp_path: Path) -> None:
    rows = [
        {
            "file_path": f"coco-text/{n}.png",
            "question": "Name?",
            "question_id": n,
            "answers": ["a"],
            "dataset": "coco-text",
        }
        for n in range(40)
    ]
    (tmp_path / "coco-text").mkdir()
    for n in range(40):
        (tmp_path / "coco-text" / f"{n}.png").write_bytes(png(n))
    (tmp_path / "train_task_3.json").write_text(json.dumps({"data": rows}))
    made = talks(read("st_qa", tmp_path, eval_fraction=0.4))
    facts = {"answers": ["a"], "question_id": "5", "dataset": "coco-text"}
    assert made["5"][1:] == (png(5), (ask("st_qa", "Name?", "a", facts),))
    assert {side for side, *_ in made.values()} == {"train", "eval"} and len(made) == 40


# ---- choices


def test_ai2d(tmp_path: Path) -> None:
    features = Features({"question": Value("string"), "options": STRINGS, "answer": Value("string"), "image": Image()})
    choices = ["cup", "toadstool", "d", "b"]
    row = {"question": "which is a fungus?", "options": choices, "answer": "1", "image": hub_image(1)}
    wrong = [row | {"answer": "4"}, row | {"answer": "C"}, row | {"options": ["a"], "answer": "0"}]
    snapshot(tmp_path, features, {"test": [row, *wrong]})
    made = read("ai2d", tmp_path)
    metadata = {"question_id": "test-0000000", "has_transparent_box": False}
    talk = offered("ai2_diagram", "which is a fungus?", choices, 1, metadata)
    assert talks(made) == {"test-0000000": ("eval", png(1), (talk,))}
    assert [row[1:] for row in bad(made)] == [
        (2, "options", "has 4 choices, but the answer is number 4 from 0"),
        (3, "answer", "is 'C'; it must be a whole number"),
        (4, "options", "has 1 choices; a question offers 2 to 26"),
    ]


@pytest.mark.parametrize(
    ("choices", "answer", "shown", "right"),
    [
        (["a", "c", "d", "b"], 2, ["A", "C", "D", "B"], "D"),
        (["f", "none of these", "B", "k"], 1, ["F", "none of these", "B", "K"], "none of these"),
        (["f", "F", "g", "h"], 1, ["F", "G", "H"], "F"),  # offered twice
        (["a", "cat", "dog", "b"], 0, None, "A"),
        (["1", "2", "3", "4"], 3, None, "D"),
        (["e", "e"], 1, None, "B"),
    ],
)
def test_letters_of_the_diagram_get_no_letters(
    tmp_path: Path, choices: list[str], answer: int, shown: list[str] | None, right: str
) -> None:
    features = Features({"question": Value("string"), "options": STRINGS, "answer": Value("string"), "image": Image()})
    row = {"question": "which is it?", "options": choices, "answer": str(answer), "image": hub_image(1)}
    snapshot(tmp_path, features, {"test": [row]})
    ((_, _, (talk,)),) = talks(read("ai2d", tmp_path)).values()
    asked, said = talk.messages
    assert (talk.style, said.text) == ("ai2_diagram_no_letter" if shown else "ai2_diagram", right)
    assert list(asked.options) == talk.metadata["options"] == (shown or choices)
    assert talk.metadata["options"][talk.metadata["answer_index"]] == talk.metadata["answer"]


def test_ai2d_with_opaque_and_transparent_boxes(tmp_path: Path) -> None:
    features = Features(
        {
            "image": Image(),
            "question": Value("string"),
            "image_id": Value("int32"),
            "option_is_abc": datasets.List(Value("bool")),
            "image_name": Value("string"),
            "question_id": Value("string"),
            "abc_label": Value("bool"),
            "answer_texts": STRINGS,
            "correct_answer": Value("int32"),
            "has_transparent_box": Value("bool"),
        }
    )
    plain = {
        "image": hub_image(1),
        "question": "What eats grass?",
        "image_id": 12,
        "option_is_abc": [False] * 4,
        "image_name": "12.png",
        "question_id": "12.png-0",
        "abc_label": False,
        "answer_texts": ["cow", "fox", "owl", "bee"],
        "correct_answer": 0,
        "has_transparent_box": False,
    }
    boxed = plain | {
        "question": "What is shown by t?",
        "question_id": "12.png-1",
        "abc_label": True,
        "option_is_abc": [True, True, True, False],
        "answer_texts": ["a", "t", "l", "none"],
        "correct_answer": 1,
    }
    rows = [plain, boxed, boxed | {"has_transparent_box": True, "image": hub_image(2)}]
    write = datasets.Dataset.from_list
    write(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    write([plain | {"option_is_abc": [False]}], features=features).to_parquet(str(tmp_path / "validation.parquet"))
    made = read("ai2d_boxes", tmp_path)
    facts = {"question_id": "12.png-0", "image_id": 12, "abc_label": False, "has_transparent_box": False}
    diagram = offered("ai2_diagram", "What eats grass?", ["cow", "fox", "owl", "bee"], 0, facts)
    shown = ["A", "T", "L", "none"]
    facts = {"options": shown, "answer_index": 1, "answer": "T", "question_id": "12.png-1", "image_id": 12}
    facts |= {"abc_label": True, "has_transparent_box": False}
    turns = (Message("user", "What is shown by t?", options=tuple(shown)), Message("assistant", "T"))
    letters = Conversation("ai2_diagram_no_letter", turns, metadata=facts)
    clear = replace(letters, metadata=facts | {"has_transparent_box": True})
    assert talks(made) == {
        "12.png-0": ("train", png(1), (diagram,)),
        "12.png-1-opaque": ("train", png(1), (letters,)),
        "12.png-1-transparent": ("train", png(2), (clear,)),
    }
    assert [(line, name) for _, line, name, _ in bad(made)] == [(1, "option_is_abc")]
    for kind, left in (("opaque", "transparent"), ("transparent", "opaque")):
        kept = talks(read("ai2d_boxes", tmp_path, options={"boxes": kind}))
        assert list(kept) == ["12.png-0", f"12.png-1-{kind}"], left
    with pytest.raises(ConfigError, match="boxes is 'both of them'"):
        read("ai2d_boxes", tmp_path, options={"boxes": "both of them"})


A_OKVQA = Features(
    {
        "image": Image(),
        "question_id": Value("string"),
        "question": Value("string"),
        "choices": STRINGS,
        "correct_choice_idx": Value("int8"),
        "direct_answers": Value("string"),
        "difficult_direct_answer": Value("bool"),
        "rationales": STRINGS,
    }
)


def test_a_okvqa(tmp_path: Path) -> None:
    row = {
        "image": hub_image(1),
        "question_id": "22Mex",
        "question": "What is the man waiting for?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": "['ride', 'bus', 'bus', 'taxi', 'taxi']",
        "difficult_direct_answer": True,
        "rationales": ["He waits."],
    }
    validation = [
        row | {"question_id": "v1"},
        row | {"question_id": "v2", "difficult_direct_answer": False, "direct_answers": "bus"},
        row | {"question_id": "v3", "correct_choice_idx": None},
    ]
    snapshot(tmp_path, A_OKVQA, {"train": [row], "validation": validation})
    made = read("a_okvqa_mc", tmp_path)
    talk = offered("a_okvqa_mc", str(row["question"]), ["skateboarder", "train", "delivery", "cab"], 3, {})
    assert talks(made)["22Mex"] == (
        "train",
        png(1),
        (replace(talk, metadata=talk.metadata | {"question_id": "22Mex"}),),
    )
    assert list(talks(made)) == ["22Mex", "v1", "v2"]
    assert [row[1:] for row in bad(made)] == [(3, "correct_choice_idx", "is missing")]
    made = read("a_okvqa_da", tmp_path)  # v1 and v3 are too hard to be evaluated without choices
    facts = {"answers": ["ride", "bus", "bus", "taxi", "taxi"], "question_id": "22Mex", "difficult_direct_answer": True}
    assert talks(made) == {"22Mex": ("train", png(1), (ask("a_okvqa_da", str(row["question"]), "bus", facts, "taxi"),))}
    assert [row[1:] for row in bad(made)] == [(2, "direct_answers", "is 'bus', which is no list of answers")]


def test_science_qa(tmp_path: Path) -> None:
    words = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = Features(
        {"image": Image(), "choices": STRINGS, "answer": Value("int8"), **{name: Value("string") for name in words}}
    )
    row: dict[str, Any] = {name: name for name in words} | {"question": "Which state?", "hint": ""}
    row |= {"image": hub_image(1), "choices": ["Ohio", "Iowa"], "answer": 1}
    train = [row, row | {"image": None}, row | {"hint": "The map."}]
    snapshot(tmp_path, features, {"train": train, "validation": [row], "test": [row, row]})
    made = talks(read("science_qa", tmp_path))
    facts = {name: name for name in ("task", "grade", "subject", "topic", "category", "skill")}
    facts = {"question_id": "train-0000000"} | facts
    talk = offered("science_qa", "Which state?", ["Ohio", "Iowa"], 1, facts)
    assert made["train-0000000"] == ("train", png(1), (talk,))
    assert made["train-0000002"][2][0].messages[0].text == "The map.\nWhich state?"
    assert list(made) == ["train-0000000", "train-0000002", "validation-0000000"]
    tested = talks(read("science_qa", tmp_path, options={"eval_split": "test"}, train_examples=0))
    assert list(tested) == ["test-0000000", "test-0000001"]


# ---- charts


def test_chart_qa(tmp_path: Path) -> None:
    label = ClassLabel(names=["human", "machine"])
    features = Features({"image": Image(), "query": Value("string"), "label": STRINGS, "human_or_machine": label})
    human = {"image": hub_image(1), "query": "How many?", "label": ["14"], "human_or_machine": 0}
    augmented = human | {"query": "What year?", "label": ["2014"], "human_or_machine": 1}
    splits = {"train": [human, augmented, human | {"label": []}], "val": [human], "test": [augmented]}
    snapshot(tmp_path, features, splits)
    made = read("chart_qa", tmp_path)
    first = ask("chart_qa", "How many?", "14", {"answers": ["14"], "is_human": True})
    second = ask("chart_qa", "What year?", "2014", {"answers": ["2014"], "is_human": False})
    assert talks(made) == {
        "train-0000000": ("train", png(1), (first,)),
        "train-0000001": ("train", png(1), (second,)),
        "val-0000000": ("eval", png(1), (first,)),
    }
    assert [row[1:] for row in bad(made)] == [(3, "answers", "holds no answer that is not empty")]
    weighted = talks(read("chart_qa", tmp_path, options={"weighted": True}))
    weights = [weighted[f"train-000000{n}"][2][0].weight for n in range(2)]
    assert weights == pytest.approx([1.4772, 0.5228], abs=1e-4)
    assert 7398 * weights[0] == pytest.approx(20901 * weights[1])  # both parts weigh the same in total
    for part, name in (("human", "train-0000000"), ("augmented", "train-0000001")):
        kept = talks(read("chart_qa", tmp_path, options={"parts": part}, eval_examples=0))
        assert list(kept) == [name]
    assert "test-0000000" in talks(read("chart_qa", tmp_path, options={"eval_split": "test"}))
    with pytest.raises(ConfigError, match="eval_split is 'validation'; known: val, test"):
        read("chart_qa", tmp_path, options={"eval_split": "validation"})


@pytest.mark.parametrize("name", ["dv_qa", "figure_qa"])
def test_many_questions_in_a_row(tmp_path: Path, name: str) -> None:
    pairs = [{"question": Value("string"), "answer": Value("string")}]
    features = Features({"image": Image(decode=False), "qa": pairs})
    found = [{"question": "Is it?", "answer": "yes"}, {"question": "How many?", "answer": "2"}]
    rows = [{"image": hub_image(n), "qa": found} for n in range(30)]
    rows += [{"image": hub_image(90), "qa": []}, {"image": hub_image(91), "qa": [{"question": "x", "answer": None}]}]
    snapshot(tmp_path, features, {"train": rows})
    made = read(name, tmp_path, eval_fraction=0.4)
    talk = (ask(name, "Is it?", "yes", {"answers": ["yes"]}), ask(name, "How many?", "2", {"answers": ["2"]}))
    assert talks(made)["train-0000004"][1:] == (png(4), talk)
    assert {side for side, *_ in talks(made).values()} == {"train", "eval"} and len(talks(made)) == 30
    assert [row[1:] for row in bad(made)] == [(31, "qa", "is empty"), (32, "qa[0].answer", "is missing")]


def test_plot_qa(tmp_path: Path) -> None:
    row = {"image_index": 3, "question_string": "What is the total?", "answer": 4.5, "question_id": 8, "type": "dot"}
    word = row | {"question_string": "Which year?", "answer": "2001", "question_id": 9}
    for split, rows in (("train", [row, row | {"image_index": 4}, word]), ("validation", [row | {"answer": [1]}])):
        (tmp_path / split / "png").mkdir(parents=True)
        (tmp_path / split / "png" / "3.png").write_bytes(png(3))
        (tmp_path / split / "qa_pairs_V1.json").write_text(json.dumps({"qa_pairs": rows}))
    made = read("plot_qa", tmp_path)
    first = ask("plot_qa", "What is the total?", "4.5", {"answers": ["4.5"], "question_id": 8, "type": "dot"})
    second = ask("plot_qa", "Which year?", "2001", {"answers": ["2001"], "question_id": 9, "type": "dot"})
    assert talks(made) == {"train-3": ("train", png(3), (first, second))}
    assert [(line, name) for _, line, name, _ in bad(made)] == [(2, "image_index"), (1, "answer")]


def test_tab_mwp(tmp_path: Path) -> None:
    row = {
        "question": "What is the mode?",
        "choices": None,
        "answer": "8.00",
        "unit": "$",
        "table_title": "Coin collections",
        "ques_type": "free_text",
        "ans_type": "decimal_number",
        "grade": 5,
    }
    chosen = row | {"choices": ["3", "8.00"], "ques_type": "multi_choice"}
    (tmp_path / "tables").mkdir()
    for name in ("1", "2", "3"):
        (tmp_path / "tables" / f"{name}.png").write_bytes(png(int(name)))
    (tmp_path / "problems_train.json").write_text(json.dumps({"1": row, "2": chosen, "3": chosen | {"answer": "4"}}))
    (tmp_path / "problems_dev.json").write_text(json.dumps({}))
    made = read("tab_mwp", tmp_path)
    facts = {"question_id": "1", "answers": ["8.00"], "unit": "$", "ques_type": "free_text"}
    facts |= {"ans_type": "decimal_number", "grade": 5, "table_title": "Coin collections"}
    direct = ask("tabwmp_da", "What is the mode?", "8.00", facts)
    assert talks(made)["tabmwp-1"] == ("train", png(1), (direct,))
    assert talks(made)["tabmwp-2"][2][0].messages[1].text == "8.00"
    assert [row[1:] for row in bad(made)] == [(3, "answer", "is '4', none of the choices ['3', '8.00']")]
    lettered = talks(read("tab_mwp", tmp_path, options={"include_options": True}))["tabmwp-2"][2][0]
    assert (lettered.messages[0].options, lettered.messages[1].text) == (("3", "8.00"), "B")
    assert lettered.metadata["answer_index"] == 1


# ---- all of them


@pytest.mark.parametrize("name", sorted(ACADEMIC))
def test_every_family_says_where_it_is_from(name: str) -> None:
    found = FAMILIES[name]
    assert found is ACADEMIC[name]
    assert found.licence and found.source and found.revision and found.card.startswith("https://")


HUB = {
    "vqa_v2": ("lmms-lab/VQAv2", None, ["validation"]),
    "ok_vqa": ("lmms-lab/OK-VQA", None, ["val2014"]),
    "text_vqa": ("lmms-lab/textvqa", None, ["train", "validation"]),
    "doc_qa": ("HuggingFaceM4/DocumentVQA", None, ["train", "validation"]),
    "info_qa": ("lmms-lab/DocVQA", "InfographicVQA", ["train", "validation"]),
    "ai2d": ("lmms-lab/ai2d", None, ["test"]),
    "a_okvqa_mc": ("HuggingFaceM4/A-OKVQA", None, ["train", "validation"]),
    "a_okvqa_da": ("HuggingFaceM4/A-OKVQA", None, ["train", "validation"]),
    "science_qa": ("derek-thomas/ScienceQA", None, ["train", "validation"]),
    "chart_qa": ("HuggingFaceM4/ChartQA", None, ["train", "val"]),
    "dv_qa": ("vikhyatk/dvqa", None, ["train"]),
    "figure_qa": ("vikhyatk/figureqa", None, ["train"]),
}
"""Repository, subset and splits that an empty `path` asks the hub for; the other families are fetched by hand."""


@pytest.mark.parametrize("name", sorted(ACADEMIC))
def test_the_default_is_the_hub_or_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Stream:
        def decode(self, enable: bool) -> list[Example]:
            return []

    def load_dataset(hub: str, **options: Any) -> Stream:
        asked.append((hub, options["name"], options["split"], options["revision"], options["streaming"]))
        return Stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DatasetConfig(family=name)
    if name not in HUB:
        with pytest.raises(DataError, match="must be fetched by hand"):
            list(FAMILIES[name].make(config, 0))
        return
    assert list(FAMILIES[name].make(config, 0)) == []
    hub, subset, splits = HUB[name]
    assert asked == [(hub, subset, split, FAMILIES[name].revision, True) for split in splits]


def test_licence_and_revision_reach_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a snapshot to the shards' manifest, by the command's own stage."""
    monkeypatch.chdir(tmp_path)
    label = ClassLabel(names=["human", "machine"])
    features = Features({"image": Image(), "query": Value("string"), "label": STRINGS, "human_or_machine": label})
    row = {"image": hub_image(1), "query": "How many?", "label": ["14"], "human_or_machine": 0}
    snapshot(tmp_path / "set", features, {"train": [row, row | {"query": None}], "val": [row]})
    config = DatasetConfig(family="chart_qa", path="set", tolerance=0.5)
    params = Params(seed=1, datasets={"real": config})
    first = stage.run(shards.STAGE, params, dataset="real")
    said = {name: first.summary[name] for name in ("licence", "source", "revision", "card", "examples", "bad_rows")}
    assert said == {
        "licence": "GPL-3.0",
        "source": "HuggingFaceM4/ChartQA",
        "revision": "local copy",
        "card": "https://huggingface.co/datasets/HuggingFaceM4/ChartQA",
        "examples": {"train": 1, "eval": 1},
        "bad_rows": 1,
    }
    (problem,) = (tmp_path / "artifacts" / "shards" / "real" / "problems.jsonl").read_text().splitlines()
    told = json.loads(problem)
    assert (told["file"], told["line"], told["field"]) == ("set/data/train-00000-of-00001.parquet", 2, "query")
    config.revision = "v9"
    assert stage.run(shards.STAGE, params, dataset="real").summary["revision"] == "v9"
    assert revision_of(DatasetConfig(family="chart_qa")) == FAMILIES["chart_qa"].revision
    assert revision_of(DatasetConfig(family="charts")) == ""
