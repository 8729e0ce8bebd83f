"""P10: 10,000 predictions scored again by five metrics, beside the published scoring functions over the same rows.

    python -m benchmarks.rescore [--quick] [--peer DIR]

Ours is all that the stage does: reading and checking the rows, scores, the constant answer beside them, standard errors
and intervals clustered by image, slices, and both files written. `bare` is what the peer does too: rows read, scores
and their mean. The peer is the loop that harnesses rescore with: the lines loaded as JSON and allenai/molmo2's own
functions called for each, its answers' cache empty at the beginning as in a new process; it has neither intervals nor
a baseline, and nothing of it counts for `count`, whose code there needs torch. Its edit distance is a package in C
that is no dependency here, so ours stands in its place. Checked: the means are equal.

`start_s` is a whole `python -m pipelines.score` over one prediction, interpreter included (`first_start_s`: in a
workspace where no stage has looked at the sources yet); nothing may have imported torch. Rates and starts are by CPU
time, because a shared machine's clock counts its neighbours too; `start_wall_s` is by the clock.

The rows are made up, in the form of `predictions.jsonl` as the predict stage writes it: two questions for an image, ten
annotators for VQA.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.molmo2_files import load, molmo2
from benchmarks.side_by_side import Round, Seconds, in_turn, milliseconds, result, timed
from molmo_model.artifacts import write_manifest
from molmo_model.config import Params, TaskConfig
from molmo_model.eval import predictions
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.metrics.answers import edit_distance, short_answer
from pipelines.score import STAGE
from pipelines.stage import Build

GOAL = 20_000
"""Predictions per second of the exact-match class, all that the stage does included."""
GOAL_START = 2.0
CHECKPOINT = "run/step-000000"
WORDS = (
    "red",
    "blue",
    "two",
    "people",
    "a",
    "dog",
    "on",
    "the",
    "grass",
    "street",
    "sign",
    "yes",
    "no",
    "left",
    "2019",
)
METRIC_NAMES = ("exact_match", "vqa_accuracy", "relaxed_accuracy", "anls", "count")
START = """
import sys
from pipelines.score import STAGE
from pipelines.stage import main
main(STAGE, sys.argv[1:])
assert not {"torch", "pandas", "transformers"} & set(sys.modules), "scoring imported something heavy"
"""


def rows(metric: str, count: int) -> list[dict[str, Any]]:
    """Rows of `predictions.jsonl` with about two thirds right answers."""
    dice = random.Random(f"{metric} {count}")
    return [_row(metric, number, dice) for number in range(count)]


def _row(metric: str, number: int, dice: random.Random) -> dict[str, Any]:
    answer, wrong = (_answer(metric, dice) for _ in range(2))
    metadata: dict[str, Any] = {"question_id": 1000 + number}
    if metric == "vqa_accuracy":
        said = [answer if dice.random() < 0.7 else _answer(metric, dice) for _ in range(10)]
        metadata |= {"answers": said, "answer_type": dice.choice(["yes/no", "number", "other"])}
    if metric == "anls":
        metadata["answers"] = [answer, f"the {answer}"]
    example = f"{metric}-{number // 2:06d}"
    return {
        "id": f"{example}#{number % 2}",
        "example_id": example,
        "conversation": number % 2,
        "style": "short_answer",
        "prompt": f"What is written on the {dice.choice(WORDS)} in the picture, next to the {dice.choice(WORDS)}?",
        "prediction": answer if dice.random() < 0.67 else wrong,
        "references": {
            "answer": answer,
            "points": None,
            "label": None,
            "width": dice.choice([320, 640, 1024, 2048]),
            "height": 480,
            "metadata": metadata,
            "example_metadata": {"split": "val", "source": dice.choice(["human", "augmented"])},
        },
        "finish_reason": "stop",
        "tokens": 4,
        "prompt_tokens": 700,
        "image": {"dataset": metric, "row": number // 2, "sha256": [f"{number // 2:064x}"]},
    }


def _answer(metric: str, dice: random.Random) -> str:
    if metric == "count":
        return str(dice.randint(0, 12))
    if metric == "relaxed_accuracy" and dice.random() < 0.7:
        return dice.choice([f"{dice.uniform(1, 500):.1f}", f"{dice.randint(1, 99)}%", str(dice.randint(1900, 2030))])
    return " ".join(dice.choice(WORDS) for _ in range(dice.randint(1, 6 if metric == "anls" else 3)))


def prepared(folder: Path, metric: str, count: int) -> Build:
    """What the stage gets: predictions on the disk, and where to write."""
    source, out = folder / metric / "predictions", folder / metric / "metrics"
    source.mkdir(parents=True)
    out.mkdir()
    made = rows(metric, count)
    predictions.write_jsonl(source / predictions.FILE, made)
    predictions.write_jsonl(source / predictions.TRAINING_FILE, [row["references"] for row in made[:500]])
    params = Params(tasks={metric: TaskConfig(dataset=metric, metric=metric)})
    key = {"checkpoint": CHECKPOINT, "task": metric}
    stamp = {"params": {}, "inputs": {"predictions": "0" * 64}, "code": ""}
    return Build(params, key, {"predictions": source}, out, out, out, stamp)


def bare(path: Path, metric: str) -> float:
    """The mean of the primary number, by what the peer does and no more."""
    one = METRICS[metric]
    found = [
        one.score(row["prediction"], row["references"]).values[PEER_NUMBER.get(metric, one.primary)]
        for row in predictions.read_jsonl(path)
    ]
    return statistics.fmean(found)


PEER_NUMBER = {"vqa_accuracy": "vqa_molmo"}
"""The number that the peer computes, where it is not the primary one."""


def peer_functions(folder: Path) -> tuple[dict[str, Callable[[str, dict[str, Any]], float]], dict[str, str]]:
    """The published functions as scores of a prediction and its references, and the cache of one of them."""
    stand_ins: dict[str, dict[str, Any]] = {
        "editdistance": {"eval": edit_distance},
        "olmo.eval": {"mmmu_eval_utils": None, "math_vista_utils": None},
    }
    code = load(folder, "olmo/eval/vqa.py", stand_ins)
    functions: dict[str, Callable[[str, dict[str, Any]], float]] = {
        "exact_match": lambda said, to: float(said.lower() == to["answer"].lower()),
        "vqa_accuracy": lambda said, to: code.vqa_score(to["metadata"]["answers"], said),
        "relaxed_accuracy": lambda said, to: float(code.relaxed_correctness(to["answer"], said)),
        "anls": lambda said, to: max(code.anls_metric(target, said) for target in to["metadata"]["answers"]),
    }
    return functions, code.preprocess_answer.__defaults__[0]


def peer(path: Path, function: Callable[[str, dict[str, Any]], float]) -> float:
    """Reload and rescore."""
    with path.open(encoding="utf-8") as file:
        loaded = [json.loads(line) for line in file]
    return statistics.fmean(function(short_answer(row["prediction"]), row["references"]) for row in loaded)


def start_seconds(folder: Path, rounds: int) -> list[Seconds]:
    """Wall and CPU seconds of the whole command over one new prediction: first in a workspace that remembers nothing of
    the project's sources, then in one that does."""
    place = folder / "start"
    source = place / "artifacts/predictions" / CHECKPOINT / "exact_match"
    source.mkdir(parents=True)
    (place / "params.yaml").write_text(PARAMS, encoding="utf-8")
    predictions.write_jsonl(source / predictions.TRAINING_FILE, [])
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PATH": ""}
    seconds = []
    for number in range(1 + rounds):
        predictions.write_jsonl(source / predictions.FILE, [{**rows("exact_match", 1)[0], "prediction": str(number)}])
        write_manifest(source, schema=predictions.SCHEMA, version=1, params={}, inputs={}, code="", summary={})
        before, cpu = time.perf_counter(), _cpu_of_children()
        subprocess.run([sys.executable, "-c", START], cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append((time.perf_counter() - before, _cpu_of_children() - cpu))
    return seconds


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


PARAMS = f"""
version: 2
datasets: {{exact_match: {{family: digit_scenes, train_examples: 1, eval_examples: 1}}}}
models: {{run: {{tokenizer: t, vision: {{encoder: siglip}}, connector: {{}}, language: {{family: qwen2}}}}}}
tasks: {{exact_match: {{dataset: exact_match, metric: exact_match}}}}
eval: {{checkpoints: [{CHECKPOINT}]}}
"""


def compared(build: Build, function: Callable[[], float] | None, rounds: int) -> dict[str, Any]:
    """Predictions per second of one metric by ours and the peer, in turn."""
    metric, path = build.key["task"], build.inputs["predictions"] / predictions.FILE
    count = len(predictions.read_predictions(path))
    contestants: dict[str, Round] = {
        "ours": lambda: timed(lambda _: STAGE.build(build), [None]),
        "bare": lambda: timed(lambda _: bare(path, metric), [None]),
    }
    if function is not None:
        contestants["peer"] = lambda: timed(lambda _: function(), [None])
        if abs(function() - bare(path, metric)) > 1e-9:
            raise RuntimeError(f"{metric}: the peer says {function()}, ours {bare(path, metric)}")
    times = in_turn(contestants, rounds)
    rates = [round(count / cpu) for _, cpu in times["ours"]]
    return {name: round(count / milliseconds(seconds, 1) * 1000) for name, seconds in times.items()} | {
        "spread": [min(rates), max(rates)]
    }


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--peer", type=Path, help="a checkout of allenai/molmo2")
    options = parser.parse_args()
    count, rounds = 10_000, 5 if options.quick else 15
    functions, cache = peer_functions(molmo2(options.peer))
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for metric in METRIC_NAMES:
            build = prepared(Path(folder), metric, count)
            path = build.inputs["predictions"] / predictions.FILE

            def again(metric: str = metric, path: Path = path) -> float:
                cache.clear()
                return peer(path, functions[metric])

            table[metric] = compared(build, again if metric in functions else None, rounds)
            print(metric, table[metric], flush=True)
        first, *starts = start_seconds(Path(folder), 5 if options.quick else 15)
    exact = table["exact_match"]
    result(
        "rescore",
        unit="predictions/s",
        ours=exact["ours"],
        peer=exact["peer"],
        peer_name="allenai/molmo2 olmo/eval/vqa.py in a loop over JSON lines; no intervals, slices, baseline or files",
        ratio=exact["ours"] / exact["peer"],
        spread=exact["spread"],
        goal=GOAL,
        bare_ratio=round(exact["bare"] / exact["peer"], 2),
        clock="CPU time",
        predictions=count,
        metrics=table,
        start_s=round(statistics.median(cpu for _, cpu in starts), 2),
        start_spread_s=[round(min(cpu for _, cpu in starts), 2), round(max(cpu for _, cpu in starts), 2)],
        start_wall_s=round(statistics.median(wall for wall, _ in starts), 2),
        first_start_s=round(first[1], 2),
        goal_start_s=GOAL_START,
        torch_imported=False,
    )


if __name__ == "__main__":
    main()
