"""How large a report is, how long it takes to write, and how soon Chromium has it open.

    python -m tests.eval.report_size [tasks] [checkpoints] [items]

Invented answers of ordinary length, and photograph-like pictures of 640 x 480, `PICTURES` different ones. Prints one
JSON object. Not a test: times depend on the machine; `test_report` asserts the size at its worst.
"""

import io
import json
import random
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from molmo_model.data.example import Image
from molmo_model.eval.report import write
from molmo_model.eval.report_data import Evaluated
from tests import browser
from tests.eval.test_report import example, inputs

WORDS = ("the", "a", "two", "red", "sign", "chart", "bar", "shows", "left", "right", "value", "person", "holding")


PICTURES = 1200


@cache
def picture(number: int) -> Image:
    """A JPEG of about 60 kB: smooth colours with noise."""
    from PIL import Image as PILImage

    rough = PILImage.effect_noise((160, 120), 90).resize((640, 480))
    smooth = PILImage.linear_gradient("L").rotate(number * 7 % 360).resize((640, 480))
    buffer = io.BytesIO()
    PILImage.merge("RGB", [rough, PILImage.blend(rough, smooth, 0.5), smooth]).save(buffer, "JPEG", quality=90)
    return Image(buffer.getvalue(), 640, 480, "JPEG")


def project(tasks: int, checkpoints: int, items: int):
    """A report's inputs of that size."""
    rng = random.Random(0)

    def say(words):
        return " ".join(rng.choices(WORDS, k=words))

    names = [f"run-{number % 2}/step-{1000 * (number // 2 + 1):06d}" for number in range(checkpoints)]
    ids = [f"example-{index:06d}#0" for index in range(items)]
    results = {}
    for task in range(tasks):
        base = next(iter(inputs("", ids).results["t"].values()))
        asked = [
            row | {"prompt": say(14), "image": {"dataset": "d", "row": task * items + number, "sha256": [row["id"]]}}
            for number, row in enumerate(base.predictions)
        ]
        found = {}
        for number, name in enumerate(names):
            share = 0.3 + 0.5 * number / checkpoints
            scores = [
                {"id": row["id"], "scores": {"exact_match": float(rng.random() < share)}, "parsed": True}
                for row in asked
            ]
            mean = sum(row["scores"]["exact_match"] for row in scores) / items
            estimate = {"mean": mean, "stderr": 0.015, "low": mean - 0.03, "high": mean + 0.03, "n": items}
            slices = [
                {"by": f"by{i // 5}", "value": f"value {i}", "n": items // 5, "metrics": {"exact_match": estimate}}
                for i in range(20)
            ]
            metrics = {**base.metrics, "metrics": {"exact_match": estimate}, "slices": slices, "judged": None}
            said = [row | {"prediction": say(8)} for row in asked]
            found[name] = Evaluated(metrics | {"groups": [f"group {task % 4}"]}, base.lineage, said, scores)
        results[f"task_{task:02d}"] = found
    return inputs(
        results=results,
        checkpoints=names,
        examples=24,
        example=lambda dataset, row: example(picture(row % PICTURES)),
    )


def opened_after(chromium, page: Path) -> tuple[float, float]:
    """Seconds until the page is loaded, and until a first card of another task and a search over all are drawn."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    started = time.perf_counter()
    tab.goto(page.as_uri())
    tab.wait_for_selector(".card img")
    opened = time.perf_counter() - started
    started = time.perf_counter()
    tab.select_option("#f-task", "")
    tab.fill("#f-text", "person holding")
    tab.wait_for_selector(".card")
    searched = time.perf_counter() - started
    tab.close()
    return opened, searched


def main() -> None:
    """The command line."""
    tasks, checkpoints, items = [int(word) for word in sys.argv[1:]] or (50, 10, 1000)
    with tempfile.TemporaryDirectory() as folder, browser.opened() as chromium:
        given = project(tasks, checkpoints, items)
        started = time.perf_counter()
        write(given, Path(folder))
        seconds = time.perf_counter() - started
        page = Path(folder) / "index.html"
        times = [opened_after(chromium, page) for _ in range(5)]
        print(
            json.dumps(
                {
                    "tasks": tasks,
                    "checkpoints": checkpoints,
                    "items": items,
                    "page_bytes": page.stat().st_size,
                    "write_seconds": round(seconds, 1),
                    "open_seconds": [round(opened, 2) for opened, _ in times],
                    "search_all_seconds": [round(searched, 2) for _, searched in times],
                    "chromium": chromium.version,
                }
            )
        )


if __name__ == "__main__":
    main()
