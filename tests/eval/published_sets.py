"""Tiny copies of the evaluation sets, laid out and typed as they are published: one good question or a few each."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.films import film
from tests.data.snapshots import downloads, hub_image, png

URL = "https://pictures.example/1.png"
CHOICES = ["cup", "dog", "owl", "bee"]
LETTERED = ["A. cup", "B. dog", "C. owl", "D. bee"]
ASKED = {"question": "What is it?", "image": hub_image(1)}
VQA = ASKED | {"image_id": 7, "question_id": 70, "question_type": "what", "answer_type": "other"}
VOTES = [{"answer": "cup", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
SCIENCE = dict.fromkeys(("hint", "task", "grade", "subject", "topic", "category", "skill"), "x")
MASK = [[[4 <= row < 8 and 4 <= column < 8 for column in range(10)] for row in range(10)]]

ROWS: dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]] = {
    "vqa_v2": (("validation",), [VQA | {"answers": VOTES, "multiple_choice_answer": "cup"}]),
    "ok_vqa": (("val2014",), [VQA | {"question_id": "70", "answers": ["cup"] * 10}]),
    "text_vqa": (("validation",), [VQA | {"image_id": "0e", "answers": ["cup"] * 10}]),
    "doc_qa": (("validation",), [ASKED | {"questionId": 3, "answers": ["cup", "mug"]}]),
    "ai2d": (
        ("test",),
        [
            ASKED | {"options": CHOICES, "answer": "1"},
            ASKED | {"options": ["a", "c", "d", "b"], "answer": "2", "image": hub_image(2)},
        ],
    ),
    "a_okvqa_mc": (("validation",), [ASKED | {"question_id": "q", "choices": CHOICES, "correct_choice_idx": 3}]),
    "a_okvqa_da": (
        ("validation",),
        [ASKED | {"question_id": "q", "direct_answers": "['cup', 'cup', 'cup']", "difficult_direct_answer": False}],
    ),
    "science_qa": (("validation", "test"), [ASKED | SCIENCE | {"choices": CHOICES, "answer": 1}]),
    "chart_qa": (
        ("val", "test"),
        [
            {"image": hub_image(1), "query": "How many?", "label": ["14"], "human_or_machine": 0},
            {"image": hub_image(1), "query": "Which?", "label": ["Iowa"], "human_or_machine": 1},
        ],
    ),
    "math_vista": (
        ("testmini",),
        [
            {"pid": "1", "question": "How long?", "decoded_image": hub_image(1), "question_type": "multi_choice"}
            | {"answer_type": "text", "choices": ["2", "3"], "answer": "3", "metadata": {"task": "geometry"}},
            {"pid": "2", "question": "How long?", "decoded_image": hub_image(1), "question_type": "free_form"}
            | {"answer_type": "float", "precision": 1.0, "answer": "3.5", "metadata": {"task": "geometry"}},
            {"pid": "3", "question": "How long?", "decoded_image": hub_image(1), "question_type": "free_form"}
            | {"answer_type": "integer", "answer": "12", "metadata": {"task": "geometry"}},
        ],
    ),
    "mmmu": (
        ("validation",),
        [
            {"id": "validation_Art_1", "question": "See <image 1>?", "question_type": "multiple-choice"}
            | {"options": "['cup', 'dog']", "answer": "B", "image_1": hub_image(1), "image_2": hub_image(2)},
            {"id": "validation_Math_2", "question": "See <image 1>?", "question_type": "open"}
            | {"options": "[]", "answer": "['2', 'two']", "image_1": hub_image(1)},
        ],
    ),
    "real_world_qa": (
        ("test_0412",),
        [
            {"image": hub_image(1), "question": "How many?\nPlease answer directly with a single word or number."}
            | {"answer": "2"},
            {"image": hub_image(1), "question": "Which?\n\nA. Left\nB. Right\nPlease answer directly with only the "}
            | {"answer": "B"},
        ],
    ),
    "count_bench": (("test",), [{"image": hub_image(1), "question": "How many cups?", "number": 3}]),
    "pixmo_clocks": (
        ("validation",),
        [
            {"example_id": "a", "shows_seconds": shows, "hour_visible": 3, "minute_visible": 5, "second_visible": 9}
            | {"text": f"The time shown is 3:05{':09' * shows}", "image": hub_image(1)}
            for shows in (True, False)
        ],
    ),
    "muir_bench": (
        ("test",),
        [
            {"idx": "7", "task": "Counting", "image_relation": "Multiview", "image_type": "Photo", "answer": "A"}
            | {"question": "Is <image> like <image>?", "options": ["yes", "no"]}
            | {"image_list": [hub_image(1), hub_image(2)]}
        ],
    ),
    "mmiu": (
        ("test",),
        [
            {"task": "t", "visual_input_component": "v", "source": "s", "question": "Which?", "context": "c"}
            | {"options": "A: cup\nB: dog", "output": "B", "input_image_path": [f"./Low/x/{i}.png" for i in range(9)]}
        ],
    ),
}
"""Families of one table: the published splits, and the rows of each."""
ROWS["real_world_qa"][1][1]["question"] += "letter of the correct option and nothing else."

FILMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "video_mme": (
        "data/x1.mp4",
        "test",
        {"question": "What?", "options": LETTERED, "videoID": "x1", "video_id": "001", "question_id": "001-1"}
        | {"duration": "short", "domain": "d", "task_type": "t", "answer": "B"},
    ),
    "perception_test": (
        "videos/v.mp4",
        "validation",
        {"video_name": "v", "question_id": "3", "options": CHOICES[:3], "question": "What?", "answer_id": "1"}
        | {"area": "Memory", "reasoning": "Descriptive"},
    ),
    "egoschema": (
        "videos/e.mp4",
        "test",
        {"video_idx": "e", "question_idx": "9", "option": LETTERED, "question": "What?", "answer": "1"},
    ),
    "next_qa": (
        "NExTVideo/12.mp4",
        "test",
        {"video": 12, "question": "Why?", "answer": 4, "qid": 3, "type": "CW"} | {f"a{i}": f"is {i}" for i in range(5)},
    ),
}
"""Films: where the film lies, the published split, and a row."""


@cache
def second() -> bytes:
    """A film of a second."""
    return film(range(0, 30 * 1001, 1001), size=(64, 48))


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A Parquet file; what a row does not have is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def put(path: Path, content: bytes | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def write(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Writes the copy of a family; what its dataset's settings need besides `path`."""
    if family in SPECIAL:
        return SPECIAL[family](folder, monkeypatch)
    if family in FILMS:
        place, split, row = FILMS[family]
        put(folder / place, second())
        table(folder / "data" / f"{split}-00000-of-00001.parquet", [row])
        return {}
    splits, rows = ROWS[family]
    for split in ("train", *splits):
        table(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    for i in range(9 if family == "mmiu" else 0):
        put(folder / f"Low/x/{i}.png", png(i))
    return {}


def _info_qa(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    row = ASKED | {"questionId": "3", "answers": ["cup"], "answer_type": ["single span"]}
    for split in ("train", "validation"):
        table(folder / "InfographicVQA" / f"{split}-00000-of-00001.parquet", [row])
    return {}


def _st_qa(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    put(folder / "coco-text/1.png", png(1))
    row = {"file_path": "coco-text/1.png", "question": "Name?", "question_id": 1, "answers": ["cup"], "dataset": "x"}
    put(folder / "train_task_3.json", {"data": [row]})
    return {"eval_fraction": 1.0}


def _gqa(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    put(folder / "images/2405722.jpg", png(1))
    row = {"question": "What is it?", "imageId": "2405722", "answer": "cup", "isBalanced": True}
    rows = {"05515938": row | {"types": {"structural": "query", "semantic": "obj", "detailed": "x"}}}
    for split in ("testdev", "val"):
        put(folder / f"{split}_balanced_questions.json", rows)
    return {}


def _tally_qa(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    put(folder / "VG_100K/2.jpg", png(1))
    row = {"answer": 4, "data_source": "x", "image": "VG_100K/2.jpg", "image_id": 9, "issimple": False}
    put(folder / "train.json", [])
    put(folder / "test.json", [row | {"question": "How many?", "question_id": 3}])
    return {}


def _tab_mwp(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    put(folder / "tables/1.png", png(1))
    row = {"question": "What?", "choices": None, "answer": "8.00", "ques_type": "free_text", "grade": 5}
    put(folder / "problems_train.json", {})
    put(folder / "problems_dev.json", {"1": row})
    return {}


def _ai2d_boxes(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    plain = ASKED | {"image_id": 12, "question_id": "12-0", "abc_label": False, "has_transparent_box": False}
    plain |= {"option_is_abc": [False] * 4, "answer_texts": CHOICES, "correct_answer": 2}
    boxed = plain | {"question_id": "12-1", "abc_label": True, "option_is_abc": [True] * 4, "correct_answer": 1}
    boxed |= {"answer_texts": ["a", "t", "l", "m"]}
    for split in ("train", "validation", "test"):
        table(folder / f"{split}.parquet", [plain, boxed, boxed | {"has_transparent_box": True}])
    return {}


def _blink(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    from molmo_model.data.datasets.image_benchmarks import BLINK_TASKS

    one = {"idx": "1", "question": "Which?", "prompt": "Which?\n(A) cup\n(B) dog", "choices": ["cup", "dog"]}
    one |= {"answer": "(B)", "image_1": hub_image(1), "image_2": None}
    for number, task in enumerate(BLINK_TASKS):
        rows = [one | {"idx": f"{task}_1", "sub_task": task}]
        rows += [rows[0] | {"idx": f"{task}_2", "image_2": hub_image(2)}] * (number == 0)
        table(folder / task / "val-00000-of-00001.parquet", rows)
    return {}


def _clock_bench(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = [{"image": hub_image(1), "cropped_image": hub_image(2), "hour": 12, "minute": 5, "image_id": "x"}]
    rows += [rows[0] | {"hour": 3, "minute": 59}]
    for split in ("coco", "openimg", "movies"):
        table(folder / f"{split}.parquet", rows)
    return {}


def _android_control(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    row = {"image": hub_image(1), "ll_instruction": "Open it", "hl_instruction": "Set an alarm"}
    rows = [
        row | {"target_action": "Click(10.5, 20.0)", "target_box": "[1.0, 2.0, 30.0, 40.5]"},
        row | {"target_action": "Navigate Back", "target_box": ""},
    ]
    for split in ("train", "val", "test"):
        table(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return {}


def _mvbench(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    from molmo_model.data.datasets.video_benchmarks import MVBENCH_FILMS

    lines = ["---", "configs:"]
    row = {"video": "a.mp4", "question": "What?", "candidates": ["A cup.", "A dog."], "answer": "A dog."}
    for task in MVBENCH_FILMS:
        lines += [f"- config_name: {task}", f"  data_files: json/{task}.json"]
        put(folder / f"json/{task}.json", [row] if task in ("moving_count", "action_count") else [])
    put(folder / "README.md", "\n".join([*lines, "---", ""]).encode())
    for task in ("moving_count", "action_count"):
        put(folder / f"video/{MVBENCH_FILMS[task]}/a.mp4", second())
    return {}


def _mlvu(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    row = {"video": "a.mp4", "duration": 1.0, "question": "What?", "candidates": CHOICES, "answer": "dog"}
    for name, kind in (("1_plotQA", "plotQA"), ("2_needle", "findNeedle")):
        put(folder / f"MLVU/json/{name}.json", [row | {"question_type": kind}])
        put(folder / f"MLVU/video/{name}/a.mp4", second())
    put(folder / "MLVU/json/9_summary.json", [{"video": "b.mp4", "question": "Tell.", "answer": "All."}])
    return {}


def _temp_compass(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    asked = {
        "multi-choice": ("What happens?\nA. it runs\nB. it stands", "B. it stands"),
        "yes_no": ("Does it run?", "no"),
        "caption_matching": ("Which one?\nCaption A: it runs\nCaption B: it stands", "Caption B: it stands"),
    }
    for task, (question, answer) in asked.items():
        row = {"video_id": "1", "question": question, "answer": answer, "dim": "action"}
        table(folder / task / "test-00000-of-00001.parquet", [row])
    put(folder / "videos/1.mp4", second())
    return {}


def _long_video_bench(folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    row = {"id": "q", "video_id": "v", "video_path": "v.mp4", "question": "When?", "candidates": CHOICES}
    put(folder / "lvb_val.json", [row | {"correct_choice": 1, "duration_group": 60, "level": "L1"}])
    put(folder / "videos/v.mp4", second())
    return {}


def _by_url(split: str, row: dict[str, Any]) -> Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]:
    def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        for one in split.split("+"):
            table(folder / "set" / "data" / f"{one}-00000-of-00001.parquet", [{"image_url": URL} | row])
        listed = downloads(folder, {URL: png(1, 10, 10)}, monkeypatch)
        return {"path": str(folder / "set"), "downloads": listed, "eval_fraction": 1.0}

    return write


SPECIAL: Mapping[str, Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]] = {
    "info_qa": _info_qa,
    "st_qa": _st_qa,
    "gqa": _gqa,
    "tally_qa": _tally_qa,
    "tab_mwp": _tab_mwp,
    "ai2d_boxes": _ai2d_boxes,
    "blink": _blink,
    "clock_bench": _clock_bench,
    "android_control": _android_control,
    "mvbench": _mvbench,
    "mlvu_mc": _mlvu,
    "temp_compass": _temp_compass,
    "long_video_bench": _long_video_bench,
    "pixmo_count": _by_url("train+validation+test", {"count": 7, "label": "car"}),
    "pixmo_points_eval": _by_url("test", {"label": "cup", "points": [{"x": 55.0, "y": 55.0}], "masks": MASK}),
    "pixmo_cap": _by_url("train", {"caption": "Two cups.", "transcripts": ["I see two cups.", "Cups."]}),
}
