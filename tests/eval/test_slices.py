"""Slices: each slicing's values by rule, bounded numbers of them, and fields of the metadata."""

from typing import Any

import pytest

from molmo_model.errors import EvaluationError
from molmo_model.eval.slices import MOST_VALUES, OTHER, SLICINGS, script, slices


def row(**changes: Any) -> dict[str, Any]:
    references = {
        "answer": changes.pop("answer", "red"),
        "points": changes.pop("points", None),
        "width": changes.pop("width", 640),
        "height": changes.pop("height", 480),
        "metadata": changes.pop("metadata", {}),
        "example_metadata": changes.pop("example_metadata", {}),
    }
    image = {"dataset": changes.pop("dataset", "d"), "row": 0, "sha256": changes.pop("sha256", ["0"])}
    plain = {"id": "1", "style": "s", "prompt": "What is it?", "finish_reason": "stop"}
    return {**plain, "references": references, "image": image, **changes}


def found(by: str, *rows: dict[str, Any], fields: tuple[str, ...] = ()) -> dict[str, list[int]]:
    return {one.value: one.items for one in slices(rows, fields) if one.by == by}


def test_a_slicing_of_one_value_is_not_shown():
    assert list(slices([row(), row()])) == []


def test_slicings_that_every_task_has():
    assert found("dataset", row(), row(dataset="e"), row()) == {"d": [0, 2], "e": [1]}
    assert found("style", row(style="b"), row(style="a")) == {"a": [1], "b": [0]}
    assert found("pictures", row(), row(sha256=["0"] * 3), row(sha256=[])) == {"0": [2], "1": [0], "3-4": [1]}
    assert found("cut_off", row(finish_reason="length"), row()) == {"ended": [1], "cut off": [0]}
    sizes = [row(width=w, height=h) for w, h in ((256, 256), (10, 257), (512, 1), (513, 1), (9999, 1))]
    assert found("image_size", *sizes, row(width=None)) == {
        "up to 256 px": [0],
        "257-512 px": [1, 2],
        "513-1024 px": [3],
        "over 2048 px": [4],
    }
    lengths = [row(answer=" ".join("w" * n)) for n in (1, 2, 3, 4, 31)]
    assert found("answer_length", *lengths) == {"up to 1": [0], "2-3": [1, 2], "4-10": [3], "over 30": [4]}


def test_answer_types_are_the_published_ones_or_read_from_the_answer():
    rows = [row(answer=one) for one in ("Yes", "3,500", "$4.50", "12%", "red", "no", "-7")]
    rows += [row(points=[[1, 2]]), row(answer=None)]
    kinds = {"number": [1, 2, 3, 6], "yes/no": [0, 5], "other": [4], "points": [7]}
    assert found("answer_type", *rows) == kinds
    published = [row(metadata={"answer_type": "colour"}), row(example_metadata={"question_type": "ocr"}), row()]
    assert found("answer_type", *published) == {"colour": [0], "ocr": [1], "other": [2]}
    annotated = row(answer="red", metadata={"answers": ["2", "red", "2"]})
    assert found("answer_type", annotated, row()) == {"number": [0], "other": [1]}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("What is this?", "latin"),
        ("Où est-ce qu'il est né?", "latin"),
        ("Что это? User: Assistant:", "cyrillic"),
        ("User: 这张图片里有几只狗和几只猫? Assistant:", "han"),
        ("この写真には犬が何匹いますか", "kana"),
        ("이 사진에 개가 몇 마리 있나요?", "hangul"),
        ("Translate the word Ω into plain English please", "latin"),
        ("ما هذا؟", "arabic"),
        ("12 + 3 = ?", None),
        ("", None),
    ],
)
def test_script(text, name):
    assert script(text) == name


def test_language_is_the_published_one_where_there_is_one():
    rows = [row(), row(prompt="Что это?"), row(metadata={"language": "de"})]
    assert found("language", *rows) == {"cyrillic": [1], "de": [2], "latin": [0]}


def test_fields_of_the_metadata_have_the_twenty_most_frequent_values():
    rows = [row(metadata={"topic": f"t{n:02d}"}) for n in range(30) for _ in range(1 + (n < 5))]
    shown = found("topic", *rows, fields=("topic",))
    assert len(shown) == MOST_VALUES
    assert list(shown)[:5] == ["t00", "t01", "t02", "t03", "t04"]
    assert sorted(number for items in shown.values() for number in items) == list(range(len(rows)))
    assert len(shown[OTHER]) == 30 - (MOST_VALUES - 1)
    # the conversation's own value stands over the example's; what is no text is written as JSON; none is left out
    rows = [row(metadata={"n": 1}, example_metadata={"n": 2}), row(example_metadata={"n": [2]}), row()]
    assert found("n", *rows, fields=("n",)) == {"1": [0], "[2]": [1]}


def test_fields_that_say_nothing_are_refused():
    with pytest.raises(EvaluationError, match=r"tasks\.t\.slices: no item's metadata has 'topik'; they have topic"):
        list(slices([row(metadata={"topic": 1})], ["topik"], "t"))
    with pytest.raises(EvaluationError, match="'style' is sliced by anyway"):
        list(slices([row()], ["style"]))
    assert all(one.definition for one in SLICINGS.values())
