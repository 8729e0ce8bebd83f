"""PixMo, read from small copies with the published columns: conversations, points, metadata, and every kind of defect.

Pictures come by URL through a list of downloads, as they do in earnest.
"""

import pytest
from datasets import Features, Image, List, Value

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES
from molmo_model.data.example import BadRow, Conversation, InlinePoints, Message
from molmo_model.errors import DataError
from tests.data.snapshots import downloads, examples, png, read, write_split

TEXT = Value("string")
CAP = Features({"image_url": TEXT, "caption": TEXT, "transcripts": List(TEXT)})
POINTS = Features(
    {
        "image_url": TEXT,
        "image_sha256": TEXT,
        "points": List({"x": Value("float64"), "y": Value("float64")}),
        "count": Value("int64"),
        "label": TEXT,
        "collection_method": TEXT,
    }
)
COUNT = Features(
    {
        "image_url": TEXT,
        "image_sha256": TEXT,
        "count": Value("int32"),
        "points": {"x": List(Value("float32")), "y": List(Value("float32"))},
        "label": TEXT,
    }
)
QUESTIONS = Features({"image_url": TEXT, "image_sha256": TEXT, "question": TEXT, "answer": TEXT})
CAP_QA = Features({"image_url": TEXT, "question": TEXT, "answer": TEXT})
EXPLANATIONS = Features(
    {
        "image_url": TEXT,
        "image_sha256": TEXT,
        "question": TEXT,
        "parsed_response": TEXT,
        "alt_text": List(TEXT),
        "inline_text": List(TEXT),
        "points": List(List(List(Value("float64")))),
    }
)
A, B, GONE = "https://a.example/1.png", "https://b.example/2.png", "https://gone.example/3.png"


def asked(style, question, answer, **metadata):
    """The conversation of one question."""
    user = question if isinstance(question, Message) else Message("user", question)
    said = answer if isinstance(answer, Message) else Message("assistant", answer)
    return Conversation(style, (user, said), metadata=metadata)


def pointed(style, label, *points, **metadata):
    answer = Message("assistant", points=points, label=label)
    return asked(style, Message("user", label=label), answer, count=len(points), **metadata)


def listed(folder, monkeypatch):
    return downloads(folder, {A: png(1, 40, 20), B: png(2, 40, 20), GONE: "404"}, monkeypatch)


CAPTIONS = [
    {"image_url": A, "caption": "A long caption.", "transcripts": ["First voice.", " Second voice. "]},
    {"image_url": B, "caption": "Another.", "transcripts": ["Only voice."]},
]


def test_captions_and_transcripts(tmp_path, monkeypatch):
    """Each mode gives the conversations that its name says; transcripts of one picture are wordings of one answer."""
    write_split(tmp_path / "cap", "train", CAPTIONS, CAP)
    files = {"downloads": listed(tmp_path, monkeypatch), "eval_fraction": 0.0}
    voices = asked("transcript", None, Message("assistant", "First voice.", alternatives=("Second voice.",)))
    long = asked("long_caption", None, "A long caption.")
    modes = {
        "captions": (long,),
        "transcript": (voices,),
        "transcript_and_caption": (long, voices),
        "transcripts": (asked("transcript", None, "First voice."), asked("transcript", None, "Second voice.")),
    }
    for mode, talks in modes.items():
        first, second = examples("pixmo_cap", tmp_path / "cap", options={"mode": mode}, **files)
        assert first.conversations == talks
        assert (first.images[0].data, first.metadata) == (png(1, 40, 20), {"image_url": A})
        assert first.id != second.id
    default = examples("pixmo_cap", tmp_path / "cap", **files)
    assert default[0].conversations == modes["transcript_and_caption"]


def test_pictures_that_are_gone_are_listed_but_no_fault(tmp_path, monkeypatch):
    path = write_split(tmp_path / "cap", "train", [*CAPTIONS, CAPTIONS[0] | {"image_url": GONE}], CAP)
    files = {"downloads": listed(tmp_path, monkeypatch)}
    rows = [row for _, row in read("pixmo_cap", tmp_path / "cap", **files)]
    (bad,) = [row for row in rows if isinstance(row, BadRow)]
    assert (bad.line, bad.field, bad.known) == (3, "image_url", True)
    assert bad.file == str(path)
    assert GONE in bad.reason and "404" in bad.reason
    assert len(rows) == 3


def test_urls_are_told_with_their_hashes(tmp_path, monkeypatch):
    """What is to be downloaded: each row's URL, and the hash of the picture that was annotated."""
    write_split(tmp_path / "points", "train", [spot((1, 2), image_sha256="ab" * 32), spot()], POINTS)
    settings = DatasetConfig(family="pixmo_points", path=str(tmp_path / "points"))
    assert list(FAMILIES["pixmo_points"].urls(settings)) == [(A, "ab" * 32), (A, None)]
    with pytest.raises(DataError, match=r"pipelines\.download"):
        read("pixmo_points", tmp_path / "points")


def test_a_copy_may_bring_its_pictures_along(tmp_path):
    """As mirrors do, because the web forgets; no list of downloads is asked for."""
    rows = [CAPTIONS[0] | {"image": {"bytes": png(1, 40, 20), "path": None}}]
    write_split(tmp_path, "train", rows, Features(CAP | {"image": Image()}))
    (one,) = examples("pixmo_cap", tmp_path)
    assert (one.images[0].data, one.metadata) == (png(1, 40, 20), {"image_url": A})


def test_defects_of_captions(tmp_path, monkeypatch):
    rows = [
        CAPTIONS[0] | {"caption": "  "},
        CAPTIONS[0] | {"transcripts": []},
        CAPTIONS[0] | {"transcripts": ["said", ""]},
        CAPTIONS[0] | {"image_url": None},
        CAPTIONS[1],
    ]
    write_split(tmp_path / "cap", "train", rows, CAP)
    found = read("pixmo_cap", tmp_path / "cap", downloads=listed(tmp_path, monkeypatch), eval_fraction=0.0)
    told = {(row.line, row.field, row.known) for _, row in found if hasattr(row, "line")}
    assert told == {
        (1, "caption", False),
        (2, "transcripts", False),
        (3, "transcripts[1]", False),
        (4, "image_url", False),
    }
    (good,) = [row for _, row in found if hasattr(row, "conversations")]
    assert good.metadata == {"image_url": B}


def spot(*points, **changes):
    fields = {"image_url": A, "label": "Cups", "collection_method": "pointing", "count": len(points)}
    return fields | {"points": [{"x": x, "y": y} for x, y in points]} | changes


def test_points_of_one_picture_become_one_tree(tmp_path, monkeypatch):
    """Labels are grouped per picture and kind though they stand apart; nothing to point at is an answer too."""
    rows = [
        spot((10.5, 20.25), (100.4, -0.5)),
        spot((50, 50), image_url=B, label="plate", collection_method="counting"),
        spot(label="dogs"),
        spot((1, 2), collection_method="counting", label="grains"),
    ]
    write_split(tmp_path / "points", "train", rows, POINTS)
    files = {"downloads": listed(tmp_path, monkeypatch), "eval_fraction": 0.0}
    both = examples("pixmo_points", tmp_path / "points", **files)
    assert [(one.metadata["image_url"], one.metadata["kind"]) for one in both] == [
        (A, "basic"),
        (B, "high_frequency"),
        (A, "high_frequency"),
    ]
    cups = ((10.5, 20.25), (100.0, 0.0))  # a slip over the edge is on the edge
    assert both[0].conversations == (
        pointed("pointing", "Cups", *cups, kind="basic"),
        pointed("point_count", "Cups", *cups, kind="basic"),
        pointed("pointing", "dogs", kind="basic"),
        pointed("point_count", "dogs", kind="basic"),
    )
    assert len({one.id for one in both}) == 3
    basic = examples("pixmo_points", tmp_path / "points", options={"mode": "point_count", "kind": "basic"}, **files)
    assert [talk.style for one in basic for talk in one.conversations] == ["point_count", "point_count"]
    held = dict.fromkeys(
        side for side, _ in read("pixmo_points", tmp_path / "points", **files | {"eval_fraction": 1.0})
    )
    assert list(held) == ["eval"]


def test_defects_of_points(tmp_path, monkeypatch):
    """A bad label is told alone; the other labels of its picture stay."""
    rows = [
        spot((1, 2)),
        spot((512, 300), label="pixels"),
        spot((1, 2), label="miscounted", count=3),
        spot((1, 2), label=""),
        spot((float("nan"), 2), label="nan"),
        spot((1, 2), collection_method="guessing"),
    ]
    write_split(tmp_path / "points", "train", rows, POINTS)
    found = read("pixmo_points", tmp_path / "points", downloads=listed(tmp_path, monkeypatch), eval_fraction=0.0)
    told = {(row.line, row.field): row.reason for _, row in found if hasattr(row, "line")}
    assert set(told) == {
        (2, "points[0]"),
        (3, "count"),
        (4, "label"),
        (5, "points[0]"),
        (6, "collection_method"),
    }
    assert "512" in told[2, "points[0]"] and "100" in told[2, "points[0]"]
    assert "3" in told[3, "count"] and "1 points" in told[3, "count"]
    (good,) = [row for _, row in found if hasattr(row, "conversations")]
    assert [talk.messages[0].label for talk in good.conversations] == ["Cups", "Cups"]


def test_counts_have_points_in_pixels_or_a_number(tmp_path, monkeypatch):
    """Training has pixels of a picture of 40 x 20; the human-verified splits have the number alone."""
    train = [
        {"image_url": A, "count": 2, "points": {"x": [10.0, 40.0], "y": [5.0, 20.0]}, "label": "person"},
        {"image_url": B, "count": 3, "points": {"x": [1.0], "y": [1.0]}, "label": "person"},
    ]
    held = [{"image_url": B, "count": 7, "points": None, "label": "car"}]
    for split, rows in {"train": train, "validation": held, "test": [held[0] | {"count": 2}]}.items():
        write_split(tmp_path / "count", split, rows, COUNT)
    files = {"downloads": listed(tmp_path, monkeypatch)}
    found = read("pixmo_count", tmp_path / "count", **files)
    assert [side for side, _ in found] == ["train", "train", "eval"]
    first, bad, seven = (row for _, row in found)
    places = ((25.0, 25.0), (100.0, 100.0))
    assert first.conversations == (pointed("pointing", "person", *places), pointed("point_count", "person", *places))
    assert (bad.field, bad.line) == ("count", 2) and "3" in bad.reason and "1" in bad.reason
    number = Message("assistant", "7", label="car")
    assert seven.conversations == (asked("point_count", Message("user", label="car"), number, count=7),)
    *_, (side, two) = read("pixmo_count", tmp_path / "count", options={"eval_split": "test"}, **files)
    assert (side, two.conversations[0].messages[1].text) == ("eval", "2")


def test_questions_of_people(tmp_path, monkeypatch):
    rows = [
        {"image_url": A, "question": " What is it? ", "answer": "A cup, \nas it seems."},
        {"image_url": B, "question": "Who?", "answer": None},
        {"image_url": A, "question": "How many cups?", "answer": "Two."},
    ]
    write_split(tmp_path / "ama", "train", rows, QUESTIONS)
    found = read("pixmo_ask_model_anything", tmp_path / "ama", downloads=listed(tmp_path, monkeypatch), eval_fraction=0)
    good, bad = (row for _, row in found)
    assert good.conversations == (
        asked("user_qa", "What is it?", "A cup, \nas it seems."),
        asked("user_qa", "How many cups?", "Two."),  # the text stays as it is
    )
    assert (bad.line, bad.field, bad.reason) == (2, "answer", "is missing")


def test_dialogues(tmp_path, monkeypatch):
    """Turns are taken apart; what is not turns is told."""
    rows = [
        {"image_url": A, "question": "[USER] Hello? [ASSISTANT]", "answer": "Hello!"},
        {"image_url": A, "question": "[USER] One? [ASSISTANT] Yes.\n[USER] Two? [ASSISTANT]", "answer": "No."},
        {"image_url": A, "question": "[ASSISTANT] I begin. [USER]", "answer": "No."},
        {"image_url": A, "question": "[USER] No end?", "answer": "No."},
        {"image_url": A, "question": "before [USER] One? [ASSISTANT]", "answer": "No."},
        {"image_url": A, "question": "[USER] One? [ASSISTANT] said", "answer": "No."},
        {"image_url": A, "question": "[USER] [ASSISTANT]", "answer": "No."},
    ]
    write_split(tmp_path / "qa", "train", rows, CAP_QA)
    found = read("pixmo_cap_qa", tmp_path / "qa", downloads=listed(tmp_path, monkeypatch), eval_fraction=0.0)
    told = {row.line: row.field for _, row in found if hasattr(row, "line")}
    assert told == {3: "question", 4: "question", 5: "question", 6: "question", 7: "question turn 1"}
    (good,) = [row for _, row in found if hasattr(row, "conversations")]
    turns = [[(message.role, message.text) for message in talk.messages] for talk in good.conversations]
    assert turns == [
        [("user", "Hello?"), ("assistant", "Hello!")],
        [("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "No.")],
    ]
    assert {talk.style for talk in good.conversations} == {"synthetic_qa"}


def test_explanations_have_points_inside(tmp_path, monkeypatch):
    fields = {"image_url": A, "question": "Where?", "alt_text": ["the cup", "plates"], "inline_text": ["here", "two"]}
    places = {"points": [[[10.0, 20.0]], [[30.0, 40.0], [50.0, 100.5]]]}
    rows = [
        fields | places | {"parsed_response": "Look <|POINT|> and <|POINT|>."},
        fields | places | {"parsed_response": None},
        fields | places | {"parsed_response": "Look <|POINT|>."},
        {"image_url": A, "question": "Why?", "parsed_response": "No reason."},
    ]
    write_split(tmp_path / "exp", "train", rows, EXPLANATIONS)
    files = {"downloads": listed(tmp_path, monkeypatch), "eval_fraction": 0.0}
    bad, good = (row for _, row in read("pixmo_point_explanations", tmp_path / "exp", **files))
    assert (bad.line, bad.field) == (3, "parsed_response") and "1" in bad.reason and "2 points" in bad.reason
    inline = (
        InlinePoints(((10.0, 20.0),), "here", "the cup"),
        InlinePoints(((30.0, 40.0), (50.0, 100.0)), "two", "plates"),
    )
    assert good.conversations == (
        asked("point_qa", "Where?", Message("assistant", "Look <|POINT|> and <|POINT|>.", inline=inline)),
        asked("point_qa", "Why?", "No reason."),
    )


def test_masks_of_the_pointing_evaluation(tmp_path, monkeypatch):
    """Masks are kept as runs along the columns, which an independent decoder turns back."""
    mask = [[False, True, True], [False, False, True]]
    features = Features(
        {
            "image_url": TEXT,
            "label": TEXT,
            "points": List({"x": Value("float64"), "y": Value("float64")}),
            "masks": List(List(List(Value("bool")))),
        }
    )
    rows = [{"image_url": A, "label": "cup", "points": [{"x": 60.0, "y": 20.0}], "masks": [mask]}]
    write_split(tmp_path / "eval", "test", rows, features)
    ((side, one),) = read("pixmo_points_eval", tmp_path / "eval", downloads=listed(tmp_path, monkeypatch))
    (talk,) = one.conversations
    assert side == "eval" and talk.metadata["count"] == 1
    ((size, counts),) = [(kept["size"], kept["counts"]) for kept in talk.metadata["masks"]]
    flat = [bool(i % 2) for i, run in enumerate(counts) for _ in range(run)]
    assert size == [2, 3]
    assert [[flat[column * 2 + row] for column in range(3)] for row in range(2)] == mask
