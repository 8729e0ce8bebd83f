"""The evaluation sets of the field, a row each: what `tasks.<name>.benchmark` stands for.

A row says which family of datasets holds the questions and how they are asked and scored, as the papers and their code
do; what a task of `params.yaml` gives itself stands over it. `python -m pipelines.tasks` lists the rows and writes the
sections of `params.yaml` for a group of them; `docs/tasks.md` is written from here. Plain values: `molmo_model.config`
lays them under a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set."""

    title: str
    family: str
    """The family of datasets, of `molmo_model.data.datasets`, that reads it."""
    metric: str
    source: str
    """Where its questions, its scoring and its settings come from."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the dataset, such as which published split is asked."""
    styles: tuple[str, ...] = ()
    """Prompt styles of its conversations; empty asks all."""
    also: tuple[str, ...] = ()
    max_new_tokens: int = 12
    groups: tuple[str, ...] = ()
    task: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the task (`max_crops`, `slices`, `kind`, `decoding`)."""
    submission: str | None = None
    """Name of the test server's file format, for sets whose labels are not public; see `eval.submissions`."""

    def task_settings(self) -> dict[str, Any]:
        """What a task of this benchmark has where it says nothing itself; `dataset` is its own."""
        return {
            "metric": self.metric,
            "styles": list(self.styles),
            "also": list(self.also),
            "max_new_tokens": self.max_new_tokens,
            "groups": list(self.groups),
            **self.task,
        }


HIGH_RES_CROPS = 36
"""Crops of a picture with which Molmo's published numbers of `high_res` sets were made; training had 12."""

GROUPS: dict[str, str] = {
    "paper": "the eleven sets of the Molmo paper (arXiv:2409.17146, table 1); of VQAv2, DocVQA and InfographicVQA the "
    "validation questions, since their test labels are not public",
    "low_res": "sets that Molmo answers with the crops of its training",
    "high_res": f"sets that Molmo answers with up to {HIGH_RES_CROPS} crops of a picture",
    "test": "questions of test splits",
    "server": "test splits whose labels are not public: answers only, for a test server",
    "multi_image": "questions about several pictures",
    "pointing": "points and counts",
    "video": "questions about films",
    "short_video": "films of seconds to a few minutes",
    "long_video": "films of up to an hour",
    "captions": "descriptions of pictures",
    "loss": "no answers: the loss on reference answers",
}
"""Groups of rows, and what they have in common; reports show a group's average."""

_MOLMO = "new tokens and scoring as in allenai/molmo"
_MOLMO2 = "new tokens and scoring as in allenai/molmo2"
_CHOICE_TOKENS = 32
"""A choice that is written out is longer than a letter."""


def _film(
    title: str, family: str, metric: str, source: str, groups: tuple[str, ...], slices: tuple[str, ...], **more: Any
) -> Benchmark:
    """A set of questions about films, with choices."""
    more.setdefault("styles", ("video_eval_multiple_choice",))
    more.setdefault("max_new_tokens", 12)
    return Benchmark(
        title, family, metric, f"{source}; {_MOLMO2}", groups=("video", *groups), task={"slices": list(slices)}, **more
    )


_IMAGES: dict[str, Benchmark] = {
    "vqa_v2": Benchmark(
        "VQAv2, validation",
        "vqa_v2",
        "vqa_accuracy",
        f"Goyal et al. 2017, arXiv:1612.00837; {_MOLMO}",
        styles=("vqa2",),
        groups=("paper", "high_res"),
    ),
    "text_vqa": Benchmark(
        "TextVQA, validation",
        "text_vqa",
        "vqa_accuracy",
        f"Singh et al. 2019, arXiv:1904.08920; {_MOLMO}",
        styles=("text_vqa",),
        groups=("paper", "high_res"),
    ),
    "ok_vqa": Benchmark(
        "OK-VQA, validation",
        "ok_vqa",
        "vqa_accuracy",
        f"Marino et al. 2019, arXiv:1906.00067; {_MOLMO}",
        styles=("okvqa",),
        groups=("high_res",),
        task={"slices": ["question_type"]},
    ),
    "a_okvqa_da": Benchmark(
        "A-OKVQA direct answers, validation without the difficult",
        "a_okvqa_da",
        "a_okvqa",
        f"Schwenk et al. 2022, arXiv:2206.01718; {_MOLMO}",
        styles=("a_okvqa_da",),
        groups=("high_res",),
    ),
    "a_okvqa_mc": Benchmark(
        "A-OKVQA with choices, validation",
        "a_okvqa_mc",
        "multiple_choice",
        f"Schwenk et al. 2022, arXiv:2206.01718; {_MOLMO2}",
        styles=("a_okvqa_mc",),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("high_res",),
    ),
    "science_qa": Benchmark(
        "ScienceQA with pictures, validation",
        "science_qa",
        "science_qa",
        f"Lu et al. 2022, arXiv:2209.09513; {_MOLMO2}",
        styles=("science_qa",),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("high_res",),
        task={"slices": ["subject"]},
    ),
    "science_qa_test": Benchmark(
        "ScienceQA with pictures, test",
        "science_qa",
        "science_qa",
        f"Lu et al. 2022, arXiv:2209.09513; {_MOLMO2}",
        options={"eval_split": "test"},
        styles=("science_qa",),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("high_res", "test"),
        task={"slices": ["subject"]},
    ),
    "ai2d": Benchmark(
        "AI2D with opaque boxes, test",
        "ai2d",
        "ai2d",
        f"Kembhavi et al. 2016, arXiv:1603.07396, as lmms-lab/ai2d has it; {_MOLMO2}",
        styles=("ai2_diagram", "ai2_diagram_no_letter"),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("test",),
    ),
    "ai2d_boxes": Benchmark(
        "AI2D with opaque and with transparent boxes, validation",
        "ai2d_boxes",
        "ai2d",
        f"Kembhavi et al. 2016, arXiv:1603.07396, boxes as Molmo's builder draws them; {_MOLMO2}",
        styles=("ai2_diagram", "ai2_diagram_no_letter"),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("high_res",),
    ),
    "ai2d_boxes_test": Benchmark(
        "AI2D with opaque and with transparent boxes, test",
        "ai2d_boxes",
        "ai2d",
        f"Kembhavi et al. 2016, arXiv:1603.07396, boxes as Molmo's builder draws them; {_MOLMO2}",
        options={"eval_split": "test"},
        styles=("ai2_diagram", "ai2_diagram_no_letter"),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("paper", "high_res", "test"),
    ),
    "chart_qa": Benchmark(
        "ChartQA, validation",
        "chart_qa",
        "relaxed_accuracy",
        f"Masry et al. 2022, arXiv:2203.10244; {_MOLMO}",
        styles=("chart_qa",),
        groups=("high_res",),
        task={"slices": ["is_human"]},
    ),
    "chart_qa_test": Benchmark(
        "ChartQA, test",
        "chart_qa",
        "relaxed_accuracy",
        f"Masry et al. 2022, arXiv:2203.10244; {_MOLMO}",
        options={"eval_split": "test"},
        styles=("chart_qa",),
        groups=("paper", "high_res", "test"),
        task={"slices": ["is_human"]},
    ),
    "doc_qa": Benchmark(
        "DocVQA, validation",
        "doc_qa",
        "anls",
        f"Mathew et al. 2021, arXiv:2007.00398; {_MOLMO}",
        styles=("doc_qa",),
        also=("exact_match",),
        groups=("paper", "high_res"),
    ),
    "info_qa": Benchmark(
        "InfographicVQA, validation",
        "info_qa",
        "anls",
        f"Mathew et al. 2022, arXiv:2104.12756; {_MOLMO}",
        styles=("info_qa",),
        also=("exact_match",),
        groups=("paper", "high_res"),
    ),
    "st_qa": Benchmark(
        "ST-VQA, held-out training pictures",
        "st_qa",
        "anls",
        f"Biten et al. 2019, arXiv:1905.13648; {_MOLMO}",
        styles=("st_qa",),
        also=("exact_match",),
        groups=("high_res",),
    ),
    "gqa": Benchmark(
        "GQA, balanced testdev",
        "gqa",
        "exact_match",
        f"Hudson and Manning 2019, arXiv:1902.09506; {_MOLMO}",
        styles=("eval_short_answer",),
        task={"slices": ["structural", "semantic"]},
    ),
    "tally_qa": Benchmark(
        "TallyQA, test",
        "tally_qa",
        "exact_match",
        f"Acharya et al. 2019, arXiv:1810.12440; {_MOLMO}",
        styles=("tally_qa",),
        groups=("test",),
        task={"slices": ["issimple"]},
    ),
    "tab_mwp": Benchmark(
        "TabMWP direct answers, dev",
        "tab_mwp",
        "exact_match",
        "Lu et al. 2023, arXiv:2209.14610; the family of allenai/molmo, equal text",
        styles=("tabwmp_da",),
        task={"slices": ["ques_type", "grade"]},
    ),
    "mmmu": Benchmark(
        "MMMU, validation, first picture",
        "mmmu",
        "mmmu",
        f"Yue et al. 2024, arXiv:2311.16502; {_MOLMO2}",
        max_new_tokens=64,
        groups=("paper", "high_res"),
        task={"slices": ["subject", "question_type"]},
    ),
    "mmmu_all_images": Benchmark(
        "MMMU, validation, all pictures",
        "mmmu",
        "mmmu",
        f"Yue et al. 2024, arXiv:2311.16502; {_MOLMO2}",
        options={"images": "all"},
        max_new_tokens=64,
        groups=("multi_image",),
        task={"slices": ["subject", "question_type"]},
    ),
    "real_world_qa": Benchmark(
        "RealWorldQA",
        "real_world_qa",
        "real_world_qa",
        f"xAI 2024, xai-org/RealworldQA; {_MOLMO}",
        groups=("paper", "high_res"),
        task={"slices": ["question_type"]},
    ),
    "math_vista": Benchmark(
        "MathVista, testmini",
        "math_vista",
        "mathvista",
        f"Lu et al. 2024, arXiv:2310.02255; {_MOLMO2}, extraction without a model",
        max_new_tokens=32,
        groups=("paper", "high_res"),
        task={"slices": ["question_type", "task"]},
    ),
    "count_bench": Benchmark(
        "CountBenchQA",
        "count_bench",
        "count",
        f"Beyer et al. 2024, arXiv:2407.07726, vikhyatk/CountBenchQA; {_MOLMO}",
        styles=("point_count",),
        also=("point_count",),
        max_new_tokens=192,
        groups=("paper", "low_res", "pointing"),
    ),
    "pixmo_count": Benchmark(
        "PixMo-Count, validation",
        "pixmo_count",
        "count",
        f"Deitke et al. 2024, arXiv:2409.17146; {_MOLMO}",
        options={"mode": "point_count"},
        styles=("point_count",),
        also=("point_count",),
        max_new_tokens=192,
        groups=("low_res", "pointing"),
    ),
    "pixmo_count_test": Benchmark(
        "PixMo-Count, test",
        "pixmo_count",
        "count",
        f"Deitke et al. 2024, arXiv:2409.17146 (Flickr Count); {_MOLMO}",
        options={"mode": "point_count", "eval_split": "test"},
        styles=("point_count",),
        also=("point_count",),
        max_new_tokens=192,
        groups=("paper", "low_res", "pointing", "test"),
    ),
    "pixmo_points_eval": Benchmark(
        "PixMo-Points-Eval",
        "pixmo_points_eval",
        "pointing",
        f"Deitke et al. 2024, arXiv:2409.17146; {_MOLMO2}, points and masks in pixels",
        styles=("pointing",),
        max_new_tokens=192,
        groups=("low_res", "pointing", "test"),
    ),
    "pixmo_clocks": Benchmark(
        "PixMo-Clocks, validation",
        "pixmo_clocks",
        "clocks",
        f"Deitke et al. 2024, arXiv:2409.17146; {_MOLMO}",
        styles=("clocks",),
    ),
    **{
        f"clock_bench_{split}": Benchmark(
            f"ClockBench, {title}",
            "clock_bench",
            "clock_bench",
            f"Yang et al. 2022, arXiv:2111.09162; {_MOLMO}",
            options={"eval_split": split},
            styles=("clocks",),
            groups=("test",),
        )
        for split, title in (("coco", "COCO"), ("openimg", "OpenImages"), ("movies", "films"))
    },
    **{
        f"android_control_{mode}": Benchmark(
            f"AndroidControl, {title}, validation",
            "android_control",
            "android_control",
            f"Li et al. 2024, arXiv:2406.03679; {_MOLMO}",
            options={"mode": mode},
            styles=("android_control",),
            max_new_tokens=64 if mode == "hl_cot" else 16,
            groups=("low_res",) if mode == "ll" else (),
        )
        for mode, title in (
            ("ll", "the step"),
            ("hl_ll", "goal and step"),
            ("hl", "the goal"),
            ("hl_cot", "the goal, with a plan"),
        )
    },
    **{
        f"android_control_{mode}_test": Benchmark(
            f"AndroidControl, {title}, test",
            "android_control",
            "android_control",
            f"Li et al. 2024, arXiv:2406.03679; {_MOLMO}",
            options={"mode": mode, "eval_split": "test"},
            styles=("android_control",),
            max_new_tokens=16,
            groups=("low_res", "test"),
        )
        for mode, title in (("hl_ll", "goal and step"), ("hl", "the goal"))
    },
}

_CAPTIONS: dict[str, Benchmark] = {
    "pixmo_cap": Benchmark(
        "Dense captions, held-out pictures of PixMo-Cap",
        "pixmo_cap",
        "dense_caption",
        f"Deitke et al. 2024, arXiv:2409.17146, section 4; {_MOLMO}, judged",
        options={"mode": "captions", "transcripts_as_facts": True},
        styles=("long_caption",),
        max_new_tokens=448,
        groups=("captions",),
    ),
    "pixmo_cap_loss": Benchmark(
        "Loss on captions, held-out pictures of PixMo-Cap",
        "pixmo_cap",
        "loss",
        "Deitke et al. 2024, arXiv:2409.17146; LossDatasetEvaluator of allenai/molmo2",
        options={"mode": "captions"},
        styles=("long_caption",),
        groups=("loss",),
        task={"kind": "loss"},
    ),
}

_MULTI_IMAGE: dict[str, Benchmark] = {
    "muir_bench": Benchmark(
        "MuirBench",
        "muir_bench",
        "muir_bench",
        f"Wang et al. 2024, arXiv:2406.09411; {_MOLMO2}",
        styles=("mantis_instruct_mc",),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("multi_image", "test"),
        task={"slices": ["task", "image_relation"]},
    ),
    "mmiu": Benchmark(
        "MMIU",
        "mmiu",
        "muir_bench",
        f"Meng et al. 2024, arXiv:2408.02718; {_MOLMO2}",
        styles=("mantis_instruct_mc",),
        max_new_tokens=_CHOICE_TOKENS,
        groups=("multi_image", "test"),
        task={"slices": ["relationship", "task"]},
    ),
    "blink": Benchmark(
        "BLINK, validation",
        "blink",
        "blink",
        f"Fu et al. 2024, arXiv:2404.12390; {_MOLMO2}",
        max_new_tokens=12,
        groups=("multi_image",),
        task={"slices": ["sub_task"]},
    ),
}

_FILMS: dict[str, Benchmark] = {
    "mvbench": _film(
        "MVBench",
        "mvbench",
        "em_start",
        "Li et al. 2024, arXiv:2311.17005",
        ("short_video",),
        ("task_type",),
        max_new_tokens=32,
    ),
    "temp_compass": _film(
        "TempCompass without captioning",
        "temp_compass",
        "temp_compass",
        "Liu et al. 2024, arXiv:2403.00476",
        ("short_video",),
        ("task", "dim"),
        styles=(),
        max_new_tokens=192,
    ),
    "perception_test": _film(
        "PerceptionTest, validation",
        "perception_test",
        "perception_test",
        "Patraucean et al. 2023, arXiv:2305.13786",
        ("short_video",),
        ("area", "reasoning"),
    ),
    "egoschema": _film(
        "EgoSchema, the 500 public answers",
        "egoschema",
        "egoschema",
        "Mangalam et al. 2023, arXiv:2308.09126",
        ("short_video",),
        (),
        max_new_tokens=32,
    ),
    "next_qa": _film(
        "NExT-QA with choices, test",
        "next_qa",
        "next_qa",
        "Xiao et al. 2021, arXiv:2105.08276",
        ("short_video", "test"),
        ("type",),
    ),
    "mlvu_mc": _film(
        "MLVU with choices, dev",
        "mlvu_mc",
        "em_start",
        "Zhou et al. 2024, arXiv:2406.04264",
        ("long_video",),
        ("task_type",),
    ),
    "video_mme": _film(
        "Video-MME without subtitles",
        "video_mme",
        "video_mme",
        "Fu et al. 2024, arXiv:2405.21075",
        ("long_video", "test"),
        ("duration", "domain", "task_type"),
    ),
    "long_video_bench": _film(
        "LongVideoBench without subtitles, validation",
        "long_video_bench",
        "long_video_bench",
        "Wu et al. 2024, arXiv:2407.15754",
        ("long_video",),
        ("duration_group", "level"),
    ),
}


def _server(title: str, of: str, split: str, submission: str, high_res: bool = True) -> Benchmark:
    """The test split of a set whose labels are not public: asked as its validation questions are."""
    row = _IMAGES[of]
    groups = ("server", "high_res") if high_res else ("server", "low_res")
    options = {**row.options, "eval_split": split}
    return replace(row, title=title, options=options, groups=groups, task={}, submission=submission)


_SERVERS: dict[str, Benchmark] = {
    "vqa_v2_test": _server("VQAv2, test", "vqa_v2", "test", "vqa", high_res=False),
    "vqa_v2_testdev": _server("VQAv2, test-dev", "vqa_v2", "testdev", "vqa", high_res=False),
    "text_vqa_test": _server("TextVQA, test", "text_vqa", "test", "vqa"),
    "doc_qa_test": _server("DocVQA, test", "doc_qa", "test", "doc_vqa"),
    "info_qa_test": _server("InfographicVQA, test", "info_qa", "test", "doc_vqa"),
    "a_okvqa_da_test": _server("A-OKVQA direct answers, test", "a_okvqa_da", "test", "a_okvqa_da"),
    "a_okvqa_mc_test": _server("A-OKVQA with choices, test", "a_okvqa_mc", "test", "a_okvqa_mc"),
}

BENCHMARKS: dict[str, Benchmark] = {**_IMAGES, **_CAPTIONS, **_MULTI_IMAGE, **_FILMS, **_SERVERS}
