"""Sets of films, read from small copies laid out as the hub's repositories are once their archives are unpacked."""

import json

import pytest

from molmo_model.data.datasets import FAMILIES
from molmo_model.data.datasets.video_benchmarks import MVBENCH_FILMS
from molmo_model.data.example import BadRow, Conversation, Message
from molmo_model.errors import ConfigError, DataError
from tests.data.films import film
from tests.data.snapshots import examples, read

FILM = film(range(0, 30 * 1001, 1001), size=(64, 48))
"""One second."""


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def talk(*pairs, video="a/one.mp4", part="0_30_s_nextqa", name="7"):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(pairs)]
    return {"id": name, "data_source": part, "video": video, "conversations": turns}


def asked(style, question, answer, **metadata):
    return Conversation(style, (Message("user", question), Message("assistant", answer)), metadata=metadata)


def llava(folder):
    """A copy with two parts."""
    part, other = "0_30_s_nextqa", "1_2_m_youtube_v0_1"
    put(folder, f"{part}/a/one.mp4", FILM)
    put(folder, f"{other}/two.mp4", film(range(0, 15 * 2002, 2002), size=(64, 48)))
    choices = talk("<image>\nWhich?\nA. One.\nB. Two.", "B. Two.")
    more = talk("<image>\nWho?\nA. He.\nB. She.", "A. He.", name="8")
    put(folder, f"{part}/{part}_mc_qa_processed.json", [choices, talk("<image>\nWhat?", "x", video="gone.mp4"), more])
    put(folder, f"{part}/{part}_oe_qa_processed.json", [talk("<image>\nWhat?", "A dog.", "And then?", "It runs.")])
    put(folder, f"{other}/1_2_m_youtube_mc_v0_1_qa_processed.json", [talk("Eh?", "A.", video="two.mp4", part=other)])
    put(folder, f"{other}/{other}_cap_processed.json", [talk("<image>\nTell.", "All.", video="two.mp4", part=other)])


def test_llava_video_asks_every_pair_alone(tmp_path):
    """All questions about one film are one example; a film that is missing is told with the file of its question."""
    llava(tmp_path)
    found = [row for _, row in read("llava_video_mc", tmp_path, eval_fraction=0.0)]
    first, bad, other = found
    assert first.conversations == (
        asked("video_multiple_choice", "Which?\nA. One.\nB. Two.", "B. Two.", id="7"),
        asked("video_multiple_choice", "Who?\nA. He.\nB. She.", "A. He.", id="8"),
    )
    assert (first.videos[0].data, first.videos[0].frames, first.videos[0].clip) == (FILM, 30, None)
    assert first.metadata == {"data_source": "0_30_s_nextqa", "video": "a/one.mp4"}
    assert isinstance(bad, BadRow) and (bad.line, bad.field) == (2, "video")
    assert bad.file.endswith("0_30_s_nextqa_mc_qa_processed.json") and "gone.mp4" in bad.reason
    assert other.metadata["data_source"] == "1_2_m_youtube_v0_1"
    (one,) = examples("llava_video_mc", tmp_path, options={"subsets": ["1_2_m_youtube_v0_1"]})
    assert one.id == other.id
    (open_ended,) = examples("llava_video_oe", tmp_path)
    assert open_ended.conversations == (
        asked("video_short_answer", "What?", "A dog.", id="7"),
        asked("video_short_answer", "And then?", "It runs.", id="7"),
    )
    (caption,) = examples("llava_video_cap", tmp_path)
    assert caption.conversations == (asked("video_long_caption", "Tell.", "All.", id="7"),)


def test_defects_of_llava_video(tmp_path):
    part = "0_30_s_nextqa"
    put(tmp_path, f"{part}/a/one.mp4", FILM)
    put(tmp_path, f"{part}/cut.mp4", FILM[: len(FILM) // 2])
    rows = [
        talk("<image>\nWhat?", "A dog."),
        talk("<image>\nWhat?"),
        talk("<image>", "A dog."),
        talk("<image>\nWhat?", "A dog.", video="cut.mp4"),
        talk("<image>\nWhat?", "A dog.", video="../../secret.mp4"),
        {"id": "1", "video": "a/one.mp4", "conversations": []},
    ]
    turned = talk("Eh?", "x")
    turned["conversations"].reverse()
    put(tmp_path, f"{part}/{part}_oe_qa_processed.json", [*rows, turned])
    found = read("llava_video_oe", tmp_path, eval_fraction=0.0)
    assert {(row.line, row.field) for _, row in found if isinstance(row, BadRow)} == {
        (2, "conversations"),
        (3, "conversations[0].value"),
        (4, "video"),
        (5, "video"),
        (6, "data_source"),
        (7, "conversations[0].from"),
    }
    assert len([row for _, row in found if not isinstance(row, BadRow)]) == 1
    with pytest.raises(ConfigError, match="0_30_s_academic_v0_1"):
        read("llava_video_oe", tmp_path, options={"subsets": ["0_30_s_academic"]})


CHOICES = ["A cup.", "A dog.", "None."]
MVBENCH = {
    "action_sequence": ("star/Charades_v1_480/a.mp4", {"start": 0.2, "end": 0.7}),
    "episodic_reasoning": (
        "tvqa/frames_fps3_hq/show_clip/video.mp4",
        {"start": 0.0, "end": 99.0, "video": "show_clip"},
    ),
    "moving_count": ("clevrer/video_validation/a.mp4", {}),
}


def mvbench(folder, **changes):
    """A copy with all 20 tasks, of which three have a question."""
    lines = ["---", "license: mit", "configs:"]
    for task in MVBENCH_FILMS:
        lines += [f"- config_name: {task}", f"  data_files: json/{task}.json"]
        fields = {
            "video": "a.mp4",
            "question": "What?",
            "candidates": ["A cup.", "A dog.", "None."],
            "answer": "A dog.",
        }
        put(folder, f"json/{task}.json", [])
        if task in MVBENCH:
            place, more = MVBENCH[task]
            put(folder, f"video/{place}", FILM)
            put(folder, f"json/{task}.json", [fields | more | changes])
    put(folder, "README.md", "\n".join([*lines, "---", ""]).encode())


def test_mvbench_has_choices_and_parts_of_films(tmp_path):
    mvbench(tmp_path)
    assert len(MVBENCH_FILMS) == 20
    found = read("mvbench", tmp_path)
    assert [side for side, _ in found] == ["eval"] * 3
    asked = {row.conversations[0].metadata["task_type"]: row for _, row in found}
    (one,) = asked["action_sequence"].conversations
    question = Message("user", "What?", options=tuple(CHOICES))
    assert one.messages == (question, Message("assistant", "B"))
    assert one.style == "video_eval_multiple_choice"
    assert one.metadata == {
        "options": CHOICES,
        "answer_index": 1,
        "answer": "A dog.",
        "task_type": "action_sequence",
        "video": "a.mp4",
    }
    assert asked["action_sequence"].videos[0].clip == (0.2, 0.7)
    assert asked["moving_count"].videos[0].clip is None
    start, end = asked["episodic_reasoning"].videos[0].clip
    assert start == 0.0 and end <= 99.0
    (alone,) = examples("mvbench", tmp_path, options={"subsets": ["moving_count"]})
    assert alone.id == asked["moving_count"].id


def test_defects_of_mvbench(tmp_path):
    for changes, field in (
        ({"answer": "A cat."}, "answer"),
        ({"candidates": ["A dog."]}, "options"),
        ({"candidates": []}, "answer"),
        ({"video": "b.mp4"}, "video"),
        ({"start": "now"}, "start"),
        ({"start": 5.0, "end": 6.0}, "clip_start"),
    ):
        mvbench(tmp_path, **changes)
        bad = [row for _, row in read("mvbench", tmp_path, options={"subsets": ["moving_count"]})]
        assert [(row.line, row.field) for row in bad] == [(1, field)], changes
    with pytest.raises(ConfigError, match="moving_count"):
        read("mvbench", tmp_path, options={"subsets": ["moving_counts"]})


@pytest.mark.parametrize("name", ["mvbench", "llava_video_mc"])
def test_films_are_fetched_by_hand(name):
    with pytest.raises(DataError, match="by hand") as error:
        read(name, None)
    assert FAMILIES[name].card in str(error.value) and "`path`" in str(error.value)
