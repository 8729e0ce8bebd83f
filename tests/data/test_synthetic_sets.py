"""Pictures drawn by programs, and steps on a telephone, read from small copies with the published columns."""

from datasets import Features, Image, List, Value

from molmo_model.data.example import BadRow, Conversation, Message
from tests.data.snapshots import bad, examples, png, read, write_split

TEXT = Value("string")


def put(folder, name, split, rows, features):
    """One subset of a copy, with the card that names it."""
    path = write_split(folder / name, split, rows, features)
    return path


def card(folder, subsets, splits=("train", "validation")):
    lines = ["---", "configs:"]
    for subset in subsets:
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {subset}/data/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def picture(number):
    return {"bytes": png(number), "path": None}


def asked(style, question, answer, **metadata):
    said = answer if isinstance(answer, Message) else Message("assistant", answer)
    return Conversation(style, (Message("user", question), said), metadata=metadata)


def test_docs_have_a_style_for_each_subset(tmp_path):
    features = Features(
        {"image": Image(), "image_id": TEXT, "questions": {"question": List(TEXT), "answer": List(TEXT)}}
    )
    for number, subset in enumerate(("charts", "diagrams", "tables", "other")):
        questions = {"question": ["What?", "Who?"], "answer": ["A bar.", str(number)]}
        rows = [{"image": picture(number), "image_id": "7", "questions": questions}]
        put(tmp_path, subset, "validation", rows[:0], features)
        file = put(tmp_path, subset, "train", rows, features)
    card(tmp_path, ("charts", "diagrams", "tables", "other"))
    charts, *_, other = examples("pixmo_docs", tmp_path)
    assert charts.conversations == (
        asked("pixmo_docs_charts", "What?", "A bar."),
        asked("pixmo_docs_charts", "Who?", "0"),
    )
    assert charts.images[0].data == png(0)
    assert (other.id, other.conversations[1].messages[1].text) == ("other-7", "3")
    (alone,) = examples("pixmo_docs", tmp_path, options={"subsets": ["tables"]})
    assert alone.conversations[0].style == "pixmo_docs_tables"
    (alone,) = examples("pixmo_docs", file, options={"subsets": ["other"]})  # a file says nothing of its subset
    assert alone.id == "other-7"
    ((_, _, _, reason),) = bad(read("pixmo_docs", file))
    assert "`subsets`" in reason


def test_explanations_of_cosyn_stand_before_the_answer(tmp_path):
    parts = {"question": List(TEXT), "explanation": List(TEXT), "answer": List(TEXT)}
    features = Features({"id": TEXT, "image": Image(), "qa_pairs": parts})
    pairs = {"question": ["What?"], "explanation": ["It is high."], "answer": ["Seven"]}
    rows = [
        {"id": "a", "image": picture(1), "qa_pairs": pairs},
        {"id": "b", "image": picture(2), "qa_pairs": pairs | {"answer": [""]}},
        {"id": "c", "image": None, "qa_pairs": pairs},
        {"id": "d", "image": {"bytes": b"no picture", "path": None}, "qa_pairs": pairs},
    ]
    file = put(tmp_path, "chart", "train", rows, features)
    found = [row for _, row in read("cosyn", file, options={"subsets": ["chart"]}, eval_fraction=0.0)]
    answer = Message("assistant", "Seven", explanation="It is high.")
    assert found[0].conversations == (asked("cosyn_chart_exp", "What?", answer),)
    assert [(bad.line, bad.field) for bad in found[1:]] == [(2, "qa_pairs[0].answer"), (3, "image"), (4, "image")]
    plain = read("cosyn", file, options={"subsets": ["chart"], "explain": False})[0][1]
    assert plain.conversations == (asked("cosyn_chart", "What?", "Seven"),)


def test_points_in_documents(tmp_path):
    features = Features(
        {
            "id": TEXT,
            "image": Image(),
            "questions": List(TEXT),
            "answer_points": List({"x": List(Value("float64")), "y": List(Value("float64"))}),
            "names": List(TEXT),
        }
    )
    row = {"id": "a", "image": picture(1), "questions": ["Where is the title?"], "names": ["title"]}
    rows = [
        row | {"answer_points": [{"x": [10.0, 20.0], "y": [30.0, 40.0]}]},
        row | {"answer_points": []},
        row | {"answer_points": [{"x": [10.0, 20.0], "y": [30.0]}]},
    ]
    write_split(tmp_path, "train", rows, features)
    good, *bad = (row for _, row in read("cosyn_point", tmp_path, eval_fraction=0.0))
    (talk,) = good.conversations
    assert talk.messages[0] == Message("user", "Where is the title?", label="title")
    assert talk.messages[1] == Message("assistant", points=((10.0, 30.0), (20.0, 40.0)), label="title")
    assert [(row.line, row.field) for row in bad] == [(2, "answer_points"), (3, "answer_points[0]")]


def test_clocks_are_drawn_by_hand(tmp_path):
    whole = Value("int32")
    features = Features(
        {"example_id": TEXT, "watchface_id": TEXT, "watchface_name": TEXT, "watch_time": TEXT, "time_format": TEXT}
        | {"shows_seconds": Value("bool"), "hour_visible": whole, "minute_visible": whole, "second_visible": whole}
        | {"text": TEXT}
    )
    row = {"watchface_id": "f", "watchface_name": "Face", "time_format": "12", "text": "The time shown is 3:05"}
    row |= {"hour_visible": 3, "minute_visible": 5, "second_visible": 9}
    rows = [row | {"example_id": "a", "shows_seconds": True}, row | {"example_id": "b", "shows_seconds": False}]
    write_split(tmp_path, "train", rows, features)
    write_split(tmp_path, "validation", rows[:1], features)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(1))
    found = read("pixmo_clocks", tmp_path)
    assert [side for side, _ in found] == ["train", "train", "eval"]
    first, missing = (row for _, row in found[:2])
    talk = asked("clocks", "What time is being shown?", "The time shown is 3:05", hour=3, minute=5, second=9)
    assert first.conversations == (talk,)
    assert (missing.line, missing.field) == (2, "image") and "images/b.png" in missing.reason
    (tmp_path / "images" / "b.png").write_bytes(png(2))
    hidden = examples("pixmo_clocks", tmp_path)[1]
    assert hidden.conversations[0].metadata["second"] == -1


def test_steps_on_a_telephone(tmp_path):
    features = Features(
        {"image": Image(), "ll_instruction": TEXT, "hl_instruction": TEXT, "target_action": TEXT, "target_box": TEXT}
    )
    row = {"image": picture(1), "ll_instruction": "Open it", "hl_instruction": "Set an alarm"}
    rows = [
        row | {"target_action": "Click(10.5, 20.0)", "target_box": "[1.0, 2.0, 30.0, 40.5]"},
        row | {"target_action": "Navigate Back", "target_box": ""},
        row | {"target_action": "Click(1.0, 2.0)", "target_box": "[1.0, 2.0]"},
        row | {"target_action": None, "target_box": ""},
    ]
    write_split(tmp_path, "train", rows, features)
    write_split(tmp_path, "val", rows[:1], features)
    found = [row for _, row in read("android_control", tmp_path)]
    assert [(row.line, row.field) for row in found if isinstance(row, BadRow)] == [
        (3, "target_box"),
        (4, "target_action"),
    ]
    said = [(talk.messages[0].text, talk.messages[1].text, talk.metadata["mode"]) for talk in found[0].conversations]
    assert said == [
        ("low_level: Open it", "Click(10.5, 20.0)", "ll"),
        ("high_level: Set an alarm low_level: Open it", "Click(10.5, 20.0)", "hl_ll"),
        ("high_level: Set an alarm", "Click(10.5, 20.0)", "hl"),
        ("high_level_cot: Set an alarm", "Plan: Open it Action: Click(10.5, 20.0)", "hl_cot"),
    ]
    assert found[0].conversations[0].metadata["target_box"] == [1.0, 2.0, 30.0, 40.5]
    assert found[1].conversations[0].metadata["target_box"] is None
    only = read("android_control", tmp_path, options={"mode": "hl"})[0][1]
    assert len(only.conversations) == 1
