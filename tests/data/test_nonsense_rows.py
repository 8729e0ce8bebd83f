"""Rows in which any value is replaced by any other: each becomes an example or a bad row that names file, line and
field; nothing else is raised. And what becomes an example can be written as a prompt and its answer."""

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from molmo_model.data.example import BadRow, Example
from molmo_model.model_config import PromptTemplates, SystemPrompt
from molmo_model.preprocessing.prompts import PromptFormat, write
from tests.data.films import film
from tests.data.snapshots import downloads, json_lines, png, read

NONSENSE: tuple[Any, ...] = (None, 0, -7, 1.5, True, "", " ", "x", "\ud800", [], [None], [[]], {}, {"x": []}, 10**400)
URL = "https://a.example/1.png"
PICTURE = {"image_url": URL, "image_sha256": "0" * 64}
MARKED = {"question": "Where?", "parsed_response": "At <|POINT|>.", "alt_text": ["cup"], "inline_text": ["here"]}
QA = {"question": ["What?"], "explanation": ["So."], "answer": ["This."]}
SPOKEN = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
TURNS = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]
CHOICES = {"question": "What?", "options": ["A. One", "B. Two"], "answer": "B"}
CLOCK = {"hour_visible": 3, "minute_visible": 4, "second_visible": 5, "shows_seconds": True, "text": "3:04"}
STEP = {
    "ll_instruction": "Tap",
    "hl_instruction": "Go",
    "target_action": "Click(1.0, 2.0)",
    "target_box": "[1, 2, 3, 4]",
}
ROWS: dict[str, dict[str, Any]] = {
    "pixmo_cap": PICTURE | {"caption": "Long.", "transcripts": ["One.", "Two."]},
    "pixmo_points": PICTURE
    | {"points": [{"x": 1.0, "y": 2.0}], "count": 1, "label": "cup", "collection_method": "pointing"},
    "pixmo_count": PICTURE | {"points": {"x": [1.0], "y": [2.0]}, "count": 1, "label": "cup"},
    "pixmo_ask_model_anything": PICTURE | {"question": "What?", "answer": "This."},
    "pixmo_cap_qa": PICTURE | {"question": "[USER] Hi [ASSISTANT]", "answer": "Ho"},
    "pixmo_point_explanations": PICTURE | MARKED | {"points": [[[1.0, 2.0]]]},
    "pixmo_points_eval": PICTURE | {"label": "cup", "points": [{"x": 1.0, "y": 2.0}], "masks": [[[True, False]]]},
    "pixmo_docs": {"image": {"path": "a.png"}, "image_id": "1", "questions": QA},
    "cosyn": {"image": {"path": "a.png"}, "id": "1", "qa_pairs": QA},
    "cosyn_point": {"image": {"path": "a.png"}, "id": "1", "questions": ["Where?"], "names": ["cup"]}
    | {"answer_points": [{"x": [1.0], "y": [2.0]}]},
    "pixmo_clocks": CLOCK | {"image": {"path": "a.png"}, "example_id": "1", "watchface_id": "f"},
    "tulu": {"id": "1", "source": "s", "messages": TURNS},
    "llava_video_mc": {"id": "1", "data_source": "0_30_s_nextqa", "video": "a.mp4", "conversations": SPOKEN},
    "mvbench": {"video": "a.mp4", "question": "What?", "candidates": ["a", "b"], "answer": "a", "start": 0, "end": 0.5},
    "video_mme": CHOICES | {"videoID": "a", "question_id": "1", "domain": "d"},
    "perception_test": {"video_name": "a", "question_id": "1", "question": "What?", "options": ["a", "b"]}
    | {"answer_id": "1", "tag": ["t"]},
    "egoschema": {"video_idx": "a", "question_idx": "1", "question": "What?", "option": ["a", "b"], "answer": "1"},
    "next_qa": {"video": 1, "qid": 2, "question": "Why?", "answer": 3, "type": "CW"}
    | {f"a{i}": f"x{i}" for i in range(5)},
    "long_video_bench": {"id": "1", "video_id": "a", "video_path": "a.mp4", "question": "What?"}
    | {"candidates": ["a", "b"], "correct_choice": 1},
    "android_control": STEP | {"image": {"path": "a.png"}},
    "math_vista": {"pid": "1", "question": "What?", "decoded_image": {"path": "a.png"}, "choices": ["1", "2"]}
    | {"answer": "2", "question_type": "multi_choice", "answer_type": "text", "metadata": {"category": "c"}},
    "mmmu": {"id": "validation_Art_1", "question": "See <image 1>?", "options": "['a', 'b']", "answer": "B"}
    | {"question_type": "multiple-choice", "image_1": {"path": "a.png"}},
    "real_world_qa": {
        "image": {"path": "a.png"},
        "question": "How many?\nPlease answer directly with a single word or ",
    }
    | {"answer": "2"},
    "count_bench": {"image": {"path": "a.png"}, "question": "How many?", "number": 2},
    "muir_bench": CHOICES | {"idx": "1", "image_list": [{"path": "a.png"}], "task": "t"},
}
ROWS["real_world_qa"]["question"] += "number."
SUBSETS = {"pixmo_docs": ["charts"], "cosyn": ["math"], "mvbench": ["action_antonym"]}
FILMS = ("a.mp4", "0_30_s_nextqa/a.mp4", "video/ssv2_video/a.mp4", "data/a.mp4", "videos/a.mp4", "NExTVideo/1.mp4")


def mutated(value: Any) -> Iterator[Any]:
    """Every value that differs from this one in one place, at any depth."""
    yield from NONSENSE
    if isinstance(value, dict):
        for key in value:
            yield {name: one for name, one in value.items() if name != key}
            for other in mutated(value[key]):
                yield value | {key: other}
    if isinstance(value, list):
        for i, one in enumerate(value):
            yield [*value[:i], *value[i + 1 :]]
            for other in mutated(one):
                yield [*value[:i], other, *value[i + 1 :]]


@pytest.mark.parametrize("name", ROWS)
def test_any_value_in_any_place(tmp_path, monkeypatch, name):
    base = ROWS[name]
    rows = [base, *(one for one in mutated(base) if isinstance(one, dict) and one), copy.deepcopy(base)]
    for place in FILMS if "video" in str(base) else ():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(film(range(0, 20 * 1001, 1001), size=(32, 32)))
    (tmp_path / "a.png").write_bytes(png(1))
    settings: dict[str, Any] = {"downloads": downloads(tmp_path, {URL: png(1)}, monkeypatch)}
    settings |= {"image_root": str(tmp_path), "options": {"subsets": SUBSETS[name]} if name in SUBSETS else {}}
    path = json_lines(tmp_path / "rows.jsonl", rows)
    found = [row for _, row in read(name, path, **settings)]
    bad, good = [row for row in found if isinstance(row, BadRow)], [row for row in found if isinstance(row, Example)]
    assert good and bad and len(good) + len(bad) == len(found)
    assert all(row.file == str(path) and 1 < row.line < len(rows) and row.field and row.reason for row in bad)
    assert len({row.line for row in bad}) == len(bad), "a row is told once"
    talks = [talk for row in good for talk in row.conversations]
    assert len(talks) >= 2, "the first and the last row are good"
    made = (PromptTemplates.uber_model, PromptTemplates.uber_model_v2)
    for talk, templates, system in product(good[0].conversations, made, SystemPrompt):
        texts = write(talk, PromptFormat(system_prompt=system, templates=templates))
        assert len(texts) == len(talk.messages) and all(text.strip() for text in texts)
