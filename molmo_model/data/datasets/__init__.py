"""Dataset families: how an entry of `datasets:` in `params.yaml` becomes examples.

To add a published dataset: a `Published` and a `convert` function (`published.py`), and a line in `FAMILIES`.
Your own data needs neither: family `chat` reads a JSONL or Parquet file (`docs/guides/own_data.md`).
"""

from molmo_model.config import DatasetConfig, lookup
from molmo_model.data.datasets import (
    android_control,
    chart_sets,
    charts,
    chat,
    digit_clips,
    digit_scans,
    digit_scenes,
    documents,
    image_benchmarks,
    multiple_choice,
    pixmo,
    pixmo_points,
    pixmo_synthetic,
    text_sets,
    video_benchmarks,
    video_sets,
    vqa,
)
from molmo_model.data.datasets.family import Family
from molmo_model.data.example import BadRow

__all__ = ["FAMILIES", "BadRow", "Family", "family_of", "revision_of"]


FAMILIES: dict[str, Family] = {
    "digit_scenes": Family(
        make=digit_scenes.make,
        fingerprint=digit_scenes.fingerprint,
        options=digit_scenes.Options,
        licence=digit_scans.LICENCE,
        source=digit_scans.SOURCE,
    ),
    "digit_clips": Family(
        make=digit_clips.make,
        fingerprint=digit_clips.fingerprint,
        options=digit_clips.Options,
        licence=digit_scans.LICENCE,
        source=digit_scans.SOURCE,
    ),
    "charts": Family(
        make=charts.make,
        fingerprint=charts.fingerprint,
        options=charts.Options,
        licence="BSD-3-Clause",
        source="vega_datasets, the tables that lie inside the package",
    ),
    "chat": Family(
        make=chat.make,
        memory=chat.memory,
        remake=chat.remake,
        fingerprint=chat.fingerprint,
        options=chat.Options,
        licence="yours",
        source="a JSONL or Parquet file of your own",
        urls=chat.urls,
    ),
    **vqa.FAMILIES,
    **documents.FAMILIES,
    **multiple_choice.FAMILIES,
    **chart_sets.FAMILIES,
    "pixmo_cap": pixmo.PIXMO_CAP,
    "pixmo_points": pixmo_points.PIXMO_POINTS,
    "pixmo_count": pixmo_points.PIXMO_COUNT,
    "pixmo_ask_model_anything": pixmo.PIXMO_ASK_MODEL_ANYTHING,
    "pixmo_cap_qa": pixmo.PIXMO_CAP_QA,
    "pixmo_point_explanations": pixmo_points.PIXMO_POINT_EXPLANATIONS,
    "pixmo_points_eval": pixmo_points.PIXMO_POINTS_EVAL,
    "pixmo_docs": pixmo_synthetic.PIXMO_DOCS,
    "cosyn": pixmo_synthetic.COSYN,
    "cosyn_point": pixmo_synthetic.COSYN_POINT,
    "pixmo_clocks": pixmo_synthetic.PIXMO_CLOCKS,
    "tulu": text_sets.TULU,
    "llava_video_mc": video_sets.LLAVA_VIDEO_MC,
    "llava_video_oe": video_sets.LLAVA_VIDEO_OE,
    "llava_video_cap": video_sets.LLAVA_VIDEO_CAP,
    "mvbench": video_benchmarks.MVBENCH,
    "video_mme": video_benchmarks.VIDEO_MME,
    "perception_test": video_benchmarks.PERCEPTION_TEST,
    "egoschema": video_benchmarks.EGOSCHEMA,
    "next_qa": video_benchmarks.NEXT_QA,
    "long_video_bench": video_benchmarks.LONG_VIDEO_BENCH,
    "mlvu_mc": video_benchmarks.MLVU_MC,
    "temp_compass": video_benchmarks.TEMP_COMPASS,
    "android_control": android_control.ANDROID_CONTROL,
    "math_vista": image_benchmarks.MATH_VISTA,
    "mmmu": image_benchmarks.MMMU,
    "real_world_qa": image_benchmarks.REAL_WORLD_QA,
    "count_bench": image_benchmarks.COUNT_BENCH,
    "muir_bench": image_benchmarks.MUIR_BENCH,
    "mmiu": image_benchmarks.MMIU,
    "blink": image_benchmarks.BLINK,
    "clock_bench": image_benchmarks.CLOCK_BENCH,
}


def family_of(config: DatasetConfig) -> Family:
    """The family that a dataset names.

    Raises:
        ConfigError: there is none of that name; lists those there are.
    """
    return lookup(FAMILIES, config.family, "dataset family")


def revision_of(config: DatasetConfig) -> str:
    """Which revision of its source a dataset is made of: what the params name, else what its family reads from the
    hub; `local copy` for files whose revision nobody names, which the fingerprint identifies by their content."""
    family = family_of(config)
    if config.revision is not None:
        return config.revision
    return "local copy" if family.revision and config.path is not None else family.revision
