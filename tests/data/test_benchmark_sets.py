"""Benchmarks, read from small copies with the published columns: the right letter, everything that scoring needs, and
what is wrong told with file, line and field."""

import json

import pytest
from datasets import Features, Image, List, Value

from molmo_model.data.example import BadRow, Conversation, Message
from tests.data.films import film
from tests.data.snapshots import png, read, write_split

TEXT, NUMBER = Value("string"), Value("int32")
FILM = film(range(0, 30 * 1001, 1001), size=(64, 48))


def picture(number):
    return {"bytes": png(number), "path": None}


def chosen(question, options, letter, style="eval_multiple_choice", **metadata):
    index = "ABCDEFG".index(letter)
    facts = {"options": options, "answer_index": index, "answer": options[index]} | metadata
    messages = (Message("user", question, options=tuple(options)), Message("assistant", letter))
    return Conversation(style, messages, metadata=facts)


def told(found):
    return [(row.line, row.field) for row in found if isinstance(row, BadRow)]


def test_math_vista(tmp_path):
    features = Features(
        {"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": Image(), "choices": List(TEXT), "unit": TEXT}
        | {"precision": Value("float64"), "answer": TEXT, "question_type": TEXT, "answer_type": TEXT, "query": TEXT}
        | {"metadata": {"category": TEXT, "task": TEXT, "skills": List(TEXT)}}
    )
    about = {"category": "math", "task": "geometry", "skills": ["algebra"]}
    row = {"pid": "1", "question": "How long?", "decoded_image": picture(1), "metadata": about, "query": "Q"}
    choice = {"question_type": "multi_choice", "answer_type": "text", "choices": ["2", "3"], "answer": "3"}
    rows = [
        row | choice,
        row | {"pid": "2", "question_type": "free_form", "answer_type": "float", "precision": 1.0, "answer": "3.5"},
        row | choice | {"answer": "4"},
        row | choice | {"precision": float("nan")},
        row | choice | {"answer": None},
    ]
    write_split(tmp_path, "testmini", rows, features)
    found = [row for _, row in read("math_vista", tmp_path)]
    facts = {"query": "Q", **about}
    kind = {"question_type": "multi_choice", "answer_type": "text"}
    assert found[0].conversations == (chosen("How long?", ["2", "3"], "B", **kind, **facts),)
    free = found[1].conversations[0]
    assert (free.style, free.messages[1].text) == ("eval_short_answer", "3.5")
    assert free.metadata == facts | {
        "answers": ["3.5"],
        "precision": 1.0,
        "question_type": "free_form",
        "answer_type": "float",
    }
    assert told(found) == [(3, "answer"), (5, "answer")]
    assert found[3].conversations == found[0].conversations, "pandas writes not-a-number for what is missing"


def test_mmmu(tmp_path):
    words = dict.fromkeys(("id", "question", "options", "answer", "question_type"), TEXT)
    features = Features(words | {f"image_{i}": Image() for i in range(1, 8)})
    row = {
        "id": "validation_Art_Theory_3",
        "question": "See <image 1> and <image 2>?",
        "question_type": "multiple-choice",
    }
    row |= {"options": "['A cup', \"It's <image 2>\"]", "answer": "B", "image_1": picture(1), "image_2": picture(2)}
    images = "[\"<img='a.png'>\", \"<img='b.png'>\"]"
    rows = [
        row,
        row | {"question_type": "open", "options": "[]", "answer": "['2', 'two']", "image_2": None},
        row | {"options": images},
        row | {"options": "__import__('os').getcwd()"},
        row | {"answer": "C"},
    ]
    write_split(tmp_path, "validation", rows, features)
    found = [row for _, row in read("mmmu", tmp_path)]
    facts = {"question_type": "multiple-choice", "subject": "Art_Theory"}
    options = ["A cup", "It's <image 2>"]
    assert found[0].conversations == (chosen("See <image 1> and <image 2>?", options, "B", "a_okvqa_mc", **facts),)
    assert [image.data for image in found[0].images] == [png(1)]
    answer = Message("assistant", "2", alternatives=("two",))
    assert found[1].conversations[0].messages[1] == answer
    assert (found[1].conversations[0].style, found[1].conversations[0].metadata["answers"]) == ("vqa2", ["2", "two"])
    assert found[2].images == (), "choices that are pictures are asked without any"
    assert told(found) == [(4, "options"), (5, "answer")]
    every = read("mmmu", tmp_path, options={"images": "all"})[0][1]
    named = chosen("See Image 1 and Image 2?", ["A cup", "It's Image 2"], "B", "mantis_instruct_mc", **facts)
    assert (every.conversations, len(every.images)) == ((named,), 2)


def test_real_world_qa(tmp_path):
    short = "How many cars?\nPlease answer directly with a single word or number."
    letter = "Which?\n\nA. Left\nB. Right\n"
    letter += "Please answer directly with only the letter of the correct option and nothing else."
    rows = [
        {"image": picture(1), "question": short, "answer": "2"},
        {"image": picture(2), "question": letter, "answer": "B"},
        {"image": picture(3), "question": "How?", "answer": "B"},
    ]
    write_split(tmp_path, "test_0412", rows, Features({"image": Image(), "question": TEXT, "answer": TEXT}))
    first, second, bad = (row for _, row in read("real_world_qa", tmp_path))
    assert [(one.style, one.messages[0].text) for one in (*first.conversations, *second.conversations)] == [
        ("eval_short_answer", "How many cars?"),
        ("eval_multiple_choice", letter),
    ]
    assert first.conversations[0].metadata == {"answers": ["2"], "prompt": short, "question_type": "short_answer"}
    assert (bad.line, bad.field) == (3, "question")
    assert first.id != second.id


def test_count_bench(tmp_path):
    rows = [{"image": picture(1), "text": "Three cups", "question": "How many cups are there?", "number": 3}]
    write_split(tmp_path, "test", rows, Features({"image": Image(), "text": TEXT, "question": TEXT, "number": NUMBER}))
    ((side, one),) = read("count_bench", tmp_path)
    asked = (Message("user", "How many cups are there?"), Message("assistant", "3"))
    assert (side, one.conversations) == ("eval", (Conversation("point_count", asked, metadata={"count": 3}),))


def test_muir_bench_names_its_pictures(tmp_path):
    features = Features(
        {"idx": TEXT, "task": TEXT, "image_relation": TEXT, "image_type": TEXT, "question": TEXT, "options": List(TEXT)}
        | {"answer": TEXT, "image_list": List(Image()), "counterpart_idx": TEXT}
    )
    row = {"idx": "7", "task": "Counting", "image_relation": "Multiview", "image_type": "Photo", "counterpart_idx": "8"}
    row |= {"question": "Is <image> like <image>?", "options": ["<image>", "None of the above"], "answer": "A"}
    rows = [
        row | {"image_list": [picture(i) for i in range(3)]},
        row | {"image_list": []},
        row | {"image_list": [{"bytes": b"x", "path": None}]},
    ]
    write_split(tmp_path, "test", rows, features)
    good, *bad = (row for _, row in read("muir_bench", tmp_path))
    about = {"task": "Counting", "image_relation": "Multiview", "image_type": "Photo", "counterpart": "8"}
    options = ["Image 3", "None of the above"]
    assert good.conversations == (chosen("Is Image 1 like Image 2?", options, "A", "mantis_instruct_mc", **about),)
    assert [image.data for image in good.images] == [png(i) for i in range(3)]
    assert told(bad) == [(2, "image_list"), (3, "image_list[0]")]


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


MCQ = {"question": "What?", "options": ["A. A cup.", "B. A dog."]}
PLAIN = ["A cup.", "A dog."]
FILM_SETS = {
    "video_mme": (
        "data/x1.mp4",
        MCQ | {"videoID": "x1", "video_id": "001", "question_id": "001-1", "duration": "short", "answer": "B"},
        {"question_id": "001-1", "video_id": "001", "duration": "short"},
        "test",
        {"answer": "C"},
        "answer",
    ),
    "perception_test": (
        "videos/v.mp4",
        {
            "video_name": "v",
            "question_id": "3",
            "options": PLAIN,
            "question": "What?",
            "answer_id": "1",
            "area": "Memory",
        },
        {"question_id": "3", "area": "Memory"},
        "validation",
        {"answer_id": "2"},
        "options",
    ),
    "egoschema": (
        "videos/e.mp4",
        {"video_idx": "e", "question_idx": "9", "option": MCQ["options"], "question": "What?", "answer": "1"},
        {"question_idx": "9"},
        "test",
        {"option": ["A. A cup.", "A dog."]},
        "option",
    ),
}


@pytest.mark.parametrize("name", FILM_SETS)
def test_films_with_choices(tmp_path, name):
    """Questions about one film are one example; a bad one is told and the others stay."""
    place, fields, facts, split, wrong, field = FILM_SETS[name]
    types = {str: TEXT, int: NUMBER, list: List(TEXT)}
    features = Features({key: types[type(value)] for key, value in fields.items()})
    write_split(tmp_path, split, [fields, fields | wrong, fields], features)
    put(tmp_path, place, FILM)
    found = [row for _, row in read(name, tmp_path)]
    assert isinstance(found[0], BadRow) and told(found) == [(2, field)]
    talk = chosen("What?", PLAIN, "B", "video_eval_multiple_choice", **facts)
    assert found[1].conversations == (talk, talk)
    assert found[1].videos[0].data == FILM


def test_next_qa_and_long_video_bench(tmp_path):
    row = {"video": 12, "question": "Why?", "answer": 4, "qid": 3, "type": "CW"} | {
        f"a{i}": f"is {i}" for i in range(5)
    }
    features = Features({key: TEXT if isinstance(value, str) else Value("int64") for key, value in row.items()})
    write_split(tmp_path / "next", "test", [row, row | {"answer": 5}], features)
    put(tmp_path, "next/NExTVideo/12.mp4", FILM)
    bad, good = (row for _, row in read("next_qa", tmp_path / "next"))
    assert (bad.line, bad.field) == (2, "answer") and "5" in bad.reason
    options = [f"is {i}" for i in range(5)]
    assert good.conversations == (chosen("Why?", options, "E", "video_eval_multiple_choice", type="CW", qid=3),)

    row = {"id": "q", "video_id": "v", "video_path": "v.mp4", "question": "When?", "candidates": PLAIN}
    row |= {"correct_choice": 0, "duration_group": 60, "level": "L1"}
    put(tmp_path, "long/lvb_val.json", [row, row | {"correct_choice": None}])
    put(tmp_path, "long/videos/v.mp4", FILM)
    bad, good = (row for _, row in read("long_video_bench", tmp_path / "long"))
    assert (bad.line, bad.field) == (2, "correct_choice") and bad.file.endswith("lvb_val.json")
    facts = {"id": "q", "video_id": "v", "duration_group": 60, "level": "L1"}
    assert good.conversations == (chosen("When?", PLAIN, "A", "video_eval_multiple_choice", **facts),)
