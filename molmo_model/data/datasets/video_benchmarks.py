"""Benchmarks of questions about films, for evaluation alone: the films must be fetched by hand.

A question has choices (`Message.options`), the answer is the letter of the right one, and the metadata name the kind
of question, so that scores can be told apart. Columns as the cards and Molmo2's reference readers
(`olmo/data/academic_video_datasets.py`) describe them; they stand at each set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from molmo_model.data.datasets.family import Family
from molmo_model.data.datasets.published import ROW_KEY, Files, Published, RowError, each, family
from molmo_model.data.datasets.row_fields import (
    ask,
    choose,
    facts_of,
    index_of,
    letter_index,
    subset_of,
    text,
    texts,
    unlettered,
    whole,
)
from molmo_model.data.example import Conversation, Example, is_number

STYLE = "video_eval_multiple_choice"


# --- MVBench: json/<task>.json, lists of {video, question, candidates [text], answer} and, of some tasks, start and end

MVBENCH_FILMS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
"""The 20 tasks, and where their films lie below the folder `video`."""
FRAMES_TASK = "episodic_reasoning"
"""Its films are published as folders of frames, 3 of each second."""


@dataclass
class MVBenchOptions:
    """Which tasks are read."""

    subsets: list[str] = field(default_factory=list)
    """Tasks, such as `action_sequence`; empty is all 20."""


def convert_mvbench(fields: dict[str, Any], files: Files, options: MVBenchOptions) -> Example:
    """One question about a film, or about the part of it from `start` to `end`, in seconds."""
    task, name = subset_of(fields, options.subsets), text(fields, "video")
    choices = texts(fields, "candidates")
    place = f"video/{MVBENCH_FILMS[task]}/{name}" + ("/video.mp4" if task == FRAMES_TASK else "")
    facts = {"task_type": task, "video": name}
    talk = choose(STYLE, text(fields, "question"), choices, index_of(text(fields, "answer"), choices), facts)
    return Example(str(fields[ROW_KEY]), (), (talk,), videos=(files.video(place, "video", _clip(fields)),))


def _clip(fields: dict[str, Any]) -> tuple[float, float | None] | None:
    for name in ("start", "end"):
        if name in fields and not is_number(fields[name]):
            raise RowError(name, f"is {fields[name]!r}; it must be a number of seconds")
    if "start" not in fields and "end" not in fields:
        return None
    return float(fields.get("start", 0.0)), fields.get("end")


MVBENCH = family(
    Published(
        hub="OpenGVLab/MVBench",
        revision="main",
        licence="MIT; its films have the licences of their sources",
        card="https://huggingface.co/datasets/OpenGVLab/MVBench",
        splits={"eval": "train"},
        subset=tuple(MVBENCH_FILMS),
        by_hand=(
            "accept the terms on the hub and copy the repository, unpack the archives of its folder `video` there, "
            "move what lies below `video/data0613` to the same place below `video`, get the films of "
            "`video/MVBench_videos_ntu.txt` from the makers of NTU RGB+D into `video/nturgbd`, and join the frames of "
            "each folder of `video/tvqa/frames_fps3_hq` to a `video.mp4` in it at 3 frames per second."
        ),
    ),
    convert_mvbench,
    options=MVBenchOptions,
)


# --- sets whose questions are grouped by their films


def _film_sets(
    published: Published, question: Callable[[dict[str, Any]], Conversation], place: Callable[[dict[str, Any]], str]
) -> Family:
    """The family of a set whose questions about one film become one example, so that the film is kept once.

    Args:
        published: where it is.
        question: the conversation of a row.
        place: the film of a row, as a path below the copy.
    """

    def convert(rows: Sequence[dict[str, Any]], files: Files, options: Any) -> Example:
        talks = each(rows, question)
        path = place(rows[0])
        return Example(
            PurePosixPath(path).stem, (), tuple(talks), {"video": path}, videos=(files.video(path, "video"),)
        )

    return family(published, convert, group=place)


# --- Video-MME: videomme/test-*.parquet, {video_id, duration, domain, sub_category, url, videoID, question_id,
# task_type, question, options [text with letters], answer (a letter)}


def _video_mme(fields: dict[str, Any]) -> Conversation:
    """One question about a whole film, without its subtitles."""
    choices = unlettered(fields, "options")
    facts = facts_of(fields, "question_id", "video_id", "duration", "domain", "sub_category", "task_type")
    return choose(STYLE, text(fields, "question"), choices, letter_index(fields, "answer", choices), facts)


VIDEO_MME = _film_sets(
    Published(
        hub="lmms-lab/Video-MME",
        revision="ead1408f75b618502df9a1d8e0950166bf0a2a0b",
        licence="for research; see the card",
        card="https://huggingface.co/datasets/lmms-lab/Video-MME",
        splits={"eval": "test"},
        subset="videomme",
        by_hand="copy the repository and unpack its `videos_chunked_*.zip` there: films are `data/<videoID>.mp4`.",
    ),
    _video_mme,
    lambda fields: f"data/{text(fields, 'videoID')}.mp4",
)


# --- PerceptionTest: mc_question_val/validation-*.parquet, {video_name, question, question_id, options [text],
# answer_id (a number as text), area, reasoning, tag [text]}


def _perception_test(fields: dict[str, Any]) -> Conversation:
    facts = facts_of(fields, "question_id", "area", "reasoning", "tag")
    return choose(STYLE, text(fields, "question"), texts(fields, "options"), whole(fields, "answer_id"), facts)


PERCEPTION_TEST = _film_sets(
    Published(
        hub="lmms-lab/PerceptionTest_Val",
        revision="3480e6a125a7720ff7e762c767011a0b7415de2b",
        licence="CC-BY-4.0",
        card="https://github.com/google-deepmind/perception_test",
        splits={"eval": "validation"},
        subset="mc_question_val",
        by_hand="copy the repository and unpack its films there, so that each is `videos/<video_name>.mp4`.",
    ),
    _perception_test,
    lambda fields: f"videos/{text(fields, 'video_name')}.mp4",
)


# --- EgoSchema: Subset/test-*.parquet (the 500 questions with public answers), {question_idx, question, video_idx,
# option [text with letters], answer (a number from 0 as text)}


def _egoschema(fields: dict[str, Any]) -> Conversation:
    choices, facts = unlettered(fields, "option"), facts_of(fields, "question_idx")
    return choose(STYLE, text(fields, "question"), choices, whole(fields, "answer"), facts, field="option")


EGOSCHEMA = _film_sets(
    Published(
        hub="lmms-lab/egoschema",
        revision="main",
        licence="MIT; its films are of Ego4D",
        card="https://huggingface.co/datasets/lmms-lab/egoschema",
        splits={"eval": "test"},
        subset="Subset",
        by_hand="copy the repository and unpack its `videos_chunked_*.zip` there: films are `videos/<video_idx>.mp4`.",
    ),
    _egoschema,
    lambda fields: f"videos/{text(fields, 'video_idx')}.mp4",
)


# --- NExT-QA: MC/test-*.parquet, {video (a number), question, answer (a number from 0), qid, type, a0 ... a4}


def _next_qa(fields: dict[str, Any]) -> Conversation:
    """One question; `type` is its kind, such as `CW` (causal, why)."""
    choices = [text(fields, f"a{i}") for i in range(5)]
    facts = facts_of(fields, "type", "qid")
    return choose(STYLE, text(fields, "question"), choices, whole(fields, "answer"), facts, field="answer")


NEXT_QA = _film_sets(
    Published(
        hub="lmms-lab/NExTQA",
        revision="main",
        licence="MIT; its films are of YFCC-100M",
        card="https://github.com/doc-doc/NExT-QA",
        splits={"eval": "test"},
        subset="MC",
        by_hand="copy the repository and unpack its `videos.zip` there: films are `NExTVideo/<video>.mp4`.",
    ),
    _next_qa,
    lambda fields: f"NExTVideo/{whole(fields, 'video')}.mp4",
)


# --- LongVideoBench: lvb_val.json, a list of {id, video_id, video_path, question, candidates [text], correct_choice,
# level, question_category, topic_category, duration_group, duration, ...}


def _long_video_bench(fields: dict[str, Any]) -> Conversation:
    """One question about a film of up to an hour, without its subtitles."""
    facts = facts_of(
        fields, "id", "video_id", "level", "question_category", "topic_category", "duration_group", "duration"
    )
    choices = texts(fields, "candidates")
    right = whole(fields, "correct_choice")
    return choose(STYLE, text(fields, "question"), choices, right, facts, field="candidates")


LONG_VIDEO_BENCH = _film_sets(
    Published(
        hub="longvideobench/LongVideoBench",
        revision="main",
        licence="CC-BY-NC-SA-4.0",
        card="https://huggingface.co/datasets/longvideobench/LongVideoBench",
        splits={"eval": "validation"},
        by_hand=(
            "accept the terms on the hub, copy the repository and unpack its films there (`cat videos.tar.part.* | tar "
            "-xf -`): films are `videos/<video_path>`."
        ),
        files={"validation": "lvb_val.json"},
    ),
    _long_video_bench,
    lambda fields: f"videos/{text(fields, 'video_path')}",
)


# --- MLVU, its seven tasks with choices: MLVU/json/1_plotQA.json ... 7_topic_reasoning.json, lists of {video, duration,
# question, candidates [text], answer, question_type}

MLVU_FILMS = {
    "plotQA": "1_plotQA",
    "findNeedle": "2_needle",
    "needle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}
"""Folder of the films of each `question_type`."""


def _mlvu(fields: dict[str, Any]) -> Conversation:
    choices = texts(fields, "candidates")
    facts = {"task_type": text(fields, "question_type")} | facts_of(fields, "duration")
    index = index_of(text(fields, "answer"), choices)
    return choose(STYLE, text(fields, "question"), choices, index, facts, field="candidates")


def _mlvu_film(fields: dict[str, Any]) -> str:
    kind = text(fields, "question_type")
    if kind not in MLVU_FILMS:
        raise RowError("question_type", f"is {kind!r}; known: {', '.join(MLVU_FILMS)}")
    return f"MLVU/video/{MLVU_FILMS[kind]}/{text(fields, 'video')}"


MLVU_MC = _film_sets(
    Published(
        hub="MLVU/MVLU",
        revision="main",
        licence="CC-BY-NC-SA-4.0",
        card="https://huggingface.co/datasets/MLVU/MVLU",
        splits={"eval": "validation"},
        by_hand=(
            "accept the terms on the hub and copy the repository, which holds MLVU/json and MLVU/video; questions are "
            "those of the files 1 to 7."
        ),
        files={"validation": "MLVU/json/[1-7]_*.json"},
    ),
    _mlvu,
    _mlvu_film,
)


# --- TempCompass: <task>/test-*.parquet, {video_id, question (with its choices), answer, dim}

TEMP_COMPASS_TASKS = ("multi-choice", "yes_no", "caption_matching")
"""Those whose answers are compared by rules; the fourth, captioning, needs a judge for every answer."""


@dataclass
class TempCompassOptions:
    """Which tasks are read."""

    subsets: list[str] = field(default_factory=list)
    """Of `TEMP_COMPASS_TASKS`; empty is all three."""


def convert_temp_compass(fields: dict[str, Any], files: Files, options: TempCompassOptions) -> Example:
    """One question about a film; the answer is the choice with its mark, `A. up` or `Caption A: ...`, or yes or no."""
    task, question, answer = subset_of(fields, options.subsets), text(fields, "question"), text(fields, "answer")
    style = "video_eval_short_answer" if task == "yes_no" else STYLE
    facts = {"task": task, "question": question, "answer": answer, "answers": [answer]}
    talk = ask(style, question, answer, facts | facts_of(fields, "dim", "video_id"))
    film = files.video(f"videos/{text(fields, 'video_id')}.mp4", "video_id")
    return Example(str(fields[ROW_KEY]), (), (talk,), videos=(film,))


TEMP_COMPASS = family(
    Published(
        hub="lmms-lab/TempCompass",
        revision="main",
        licence="not stated on the card",
        card="https://huggingface.co/datasets/lmms-lab/TempCompass",
        splits={"eval": "test"},
        subset=TEMP_COMPASS_TASKS,
        by_hand="copy the repository and unpack its `tempcompass_videos.zip` there: films are `videos/<video_id>.mp4`.",
    ),
    convert_temp_compass,
    options=TempCompassOptions,
)
