"""P8: one changed row of 100,000: what the shards stage costs beside a full build, and what peers cost.

    python -m benchmarks.incremental [--quick] [--rows 100000]

Rows of family `chat`, each with a real photograph of its own (pieces of scikit-image's, JPEG, about 18 kB). Every build
is a process of its own: `process` counts its start and imports, `run` the stage alone, `warm` the stage in a process
that had imported everything, as in Dagster. Checked: the incremental artefact has the bytes of a full build of the
changed data, and at most one shard was written. Seconds are CPU time, because a shared machine's clock counts its
neighbours too; wall seconds stand beside them.

Peers, in the same run on a tenth of the rows: `datasets` maps the same rows (opens each picture and keeps its bytes),
and again after one change; `dvc add` of a folder of a thousand pictures, and again after one changed.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import result

ROOT = Path(__file__).resolve().parent.parent
GOAL = 100
KINDS = 200
"""Different photographs; what tells the pictures of 100,000 rows apart is a comment in the file."""
SIZE = (240, 320)
BUILD = """
import json, sys, time
start = time.perf_counter(), time.process_time()
from molmo_model.config import DatasetConfig, Params
from pipelines.shards import STAGE
from pipelines.stage import run
names = sys.argv[1].split(",")
config = {n: DatasetConfig(family="chat", path=f"{n}.jsonl", image_root=".", eval_fraction=0.02) for n in names}
params = Params(seed=5, datasets=config)
def seconds():
    wall, cpu = time.perf_counter(), time.process_time()
    digests = [run(STAGE, params, dataset=name).digest for name in names]
    return {"digest": digests, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
found = seconds()
found["warm"] = None
for line in sys.stdin:
    path, old, new = json.loads(line)
    text = open(path).read()
    assert old in text
    open(path, "w").write(text.replace(old, new))
    found["warm"] = seconds()
print(json.dumps(found))
"""
MAP = """
import io, json, sys
import datasets
from PIL import Image
datasets.disable_progress_bars()
def convert(row):
    data = open(row["image"], "rb").read()
    picture = Image.open(io.BytesIO(data)); picture.draft(None, (1, 1)); picture.load()
    return {"bytes": data, "width": picture.size[0], "height": picture.size[1]}
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir="cache").map(convert)
print(json.dumps(len(rows)))
"""


def write_rows(folder: Path, count: int) -> None:
    """`rows.jsonl` with a picture per row, and ten files `source-N.jsonl` of a hundredth of the rows each."""
    import numpy as np
    from PIL import Image

    from benchmarks.pictures import jpeg, pictures

    wholes = [Image.fromarray(one) for one in pictures(480, 640)[:5]]
    boxes = [(17 * kind % 320, 13 * kind % 240) for kind in range(KINDS)]
    cuts = [wholes[kind % 5].crop((x, y, x + SIZE[1], y + SIZE[0])) for kind, (x, y) in enumerate(boxes)]
    pool = [jpeg(np.asarray(one)) for one in cuts]
    lines = []
    for number in range(count):
        name, data = f"images/{number // 1000:03d}/{number:06d}.jpg", pool[number % KINDS]
        if number % 1000 == 0:
            (folder / name).parent.mkdir(parents=True)
        comment = f"picture {number}".encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / name).write_bytes(data[:2] + marker + data[2:])
        question, answer = f"<image>\nWhat is in picture {number}?", f"A piece of a photograph, number {number}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"id": f"row-{number:06d}", "image": name, "conversations": turns}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "part.jsonl").write_text("".join(lines[: count // 10]))
    for number in range(10):
        part = lines[number * count // 100 : (number + 1) * count // 100]
        (folder / f"source-{number}.jsonl").write_text("".join(part))


def change(path: Path, number: int) -> None:
    """Another answer in one row."""
    text = path.read_text()
    old = f"photograph, number {number}."
    assert old in text
    path.write_text(text.replace(old, f"drawing, number {number}."))


def child(command: list[str], folder: Path, text: str = "") -> dict[str, Any]:
    """Runs a process in `folder`: wall and CPU seconds of all of it, and what its last line of JSON says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("MOLMO_STATE_DIR", None)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True, text=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = json.loads(done.stdout.splitlines()[-1]) if done.stdout.startswith("{") else {}
    return {"process": {"wall": wall, "cpu": cpu}, **said}


def build(folder: Path, names: str = "rows", text: str = "") -> dict[str, Any]:
    return child([sys.executable, "-c", BUILD, names], folder, text)


def inodes(folder: Path, name: str = "rows") -> set[int]:
    return {path.stat().st_ino for path in (folder / "artifacts" / "shards" / name).glob("*.tar")}


def bare(source: Path, target: Path) -> Path:
    """The same data in a folder that knows of no build; the pictures are hard links."""
    shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns("artifacts", ".state", "logs"))
    return target


def peers(folder: Path, part: Path) -> dict[str, Any]:
    """Seconds of the peers at first, and after one change."""
    mapping = [sys.executable, "-c", MAP, str(part)]
    found = {"datasets_first": child(mapping, folder)["process"]}
    change(part, 7)
    found["datasets_after"] = child(mapping, folder)["process"]
    work = folder / "dvc"
    shutil.copytree(folder / "images" / "000", work / "images")
    dvc = [sys.executable, "-m", "dvc"]
    child([*dvc, "init", "--no-scm", "-q"], work)
    found["dvc_first"] = child([*dvc, "add", "-q", "images"], work)["process"]
    picture = next((work / "images").iterdir())
    picture.write_bytes(picture.read_bytes() + b"\0")
    found["dvc_after"] = child([*dvc, "add", "-q", "images"], work)["process"]
    return found


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items() if name != "digest"}
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4,000 rows")
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    count = 4000 if arguments.quick else arguments.rows
    with tempfile.TemporaryDirectory(prefix="incremental-") as name:
        folder = Path(name) / "data"
        write_rows(folder, count)
        full = build(folder)
        before = inodes(folder)
        change(folder / "rows.jsonl", count // 2)
        once = build(folder)
        rewritten = len(inodes(folder) - before)
        # a second change in a process that has just looked: no import is left, nothing else changed
        swap = ["rows.jsonl", f"photograph, number {count // 3}.", f"drawing, number {count // 3}."]
        warm = build(folder, text=json.dumps(swap) + "\n")["warm"]
        again = build(bare(folder, Path(name) / "full"))
        equal = again["digest"] == warm["digest"]
        untouched = build(folder)
        names = ",".join(f"source-{number}" for number in range(10))
        ten = {"full": build(folder, names)}
        change(folder / "source-3.jsonl", 3 * count // 100)
        ten["one_changed"] = build(folder, names)
        found = peers(folder, folder / "part.jsonl")
    if not equal or rewritten > 1:
        raise SystemExit(f"equal to a full build: {equal}; shards written: {rewritten}")
    ratios = {
        "process": full["process"]["cpu"] / once["process"]["cpu"],
        "run": full["cpu"] / once["cpu"],
        "warm": again["cpu"] / warm["cpu"],
        "datasets": found["datasets_first"]["cpu"] / found["datasets_after"]["cpu"],
        "dvc": found["dvc_first"]["cpu"] / found["dvc_after"]["cpu"],
    }
    walls = [full["wall"] / once["wall"], again["wall"] / warm["wall"]]
    result(
        "incremental",
        unit="CPU seconds after one row changed: ours the stage on all rows, the peer's a process on a tenth of them",
        ours=round(once["cpu"], 3),
        peer=round(found["datasets_after"]["cpu"], 3),
        peer_name="datasets.map of the same rows after the same change",
        ratio=ratios["run"],
        spread=[round(min(walls), 2), round(max(walls), 2)],
        goal=GOAL,
        rows=count,
        rewritten_shards=rewritten,
        shards=len(before),
        equal=equal,
        ratios=rounded(ratios),
        seconds=rounded(
            {"full": full, "one_changed": once, "warm": warm, "full_again": again, "nothing_changed": untouched}
            | {f"ten_sources_{kind}": one for kind, one in ten.items()}
            | found
        ),
        versions={package: version(package) for package in ("datasets", "dvc", "pyarrow")},
    )


if __name__ == "__main__":
    main()
