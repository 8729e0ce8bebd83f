"""Processes that share questions: fair shares, one failure ends all, nobody outlives who started them."""

import itertools
import os
import random
import subprocess
import sys
import time

import pytest

from molmo_model.config import Engine, params_from_dict
from molmo_model.errors import CheckpointError, EvaluationError
from molmo_model.eval.ranks import MOST_TOGETHER, Job, Ranks, Wanted, shares
from tests.eval.test_journal import IDENTITY

WORKER = """
import os, sys, time
from molmo_model.errors import CheckpointError
from molmo_model.eval.ranks import serve

def work(job):
    open(f"{job.journal}/started-{job.writer}", "w").write(str(os.getpid()))
    if job.writer == "refuses":
        raise CheckpointError("no such weights")
    if job.writer == "breaks":
        raise ZeroDivisionError("a bug")
    if job.writer == "dies":
        print("last words", flush=True)
        os._exit(7)
    if job.writer == "hangs":
        time.sleep(600)

serve(sys.stdin, work)
"""


def job(folder, writer):
    params = params_from_dict({"version": 2}, "test")
    whole = Job(params, {"task": "qa"}, folder, "d", "shards", Engine.generate, IDENTITY, 2, [Wanted(1, 0, "k", 0)])
    return whole.of(whole.wanted, folder, writer)


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    found = Ranks([sys.executable, "-c", WORKER], 2, 0, tmp_path / "ranks")
    yield found
    found.close(now=True)


def pids(folder):
    return {path.name.removeprefix("started-"): int(path.read_text()) for path in folder.glob("started-*")}


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_jobs_are_done_by_the_same_processes_one_after_another(ranks, tmp_path):
    for round_number in range(2):
        ranks.run([job(tmp_path, f"{round_number}{rank}") for rank in "ab"], lambda: None)
    found = pids(tmp_path)
    assert found["0a"] == found["1a"] != found["0b"] == found["1b"]
    ranks.close()
    assert not any(map(alive, found.values()))


@pytest.mark.parametrize(
    ("writer", "kind", "message"),
    [
        ("refuses", CheckpointError, "^no such weights$"),
        ("breaks", EvaluationError, r"rank 1 failed: ZeroDivisionError: a bug(.|\n)*in work"),
        ("dies", EvaluationError, r"rank 1 of 2 ended with code 7(.|\n)*last words"),
    ],
)
def test_one_that_fails_ends_all_with_its_reason(writer, kind, message, ranks, tmp_path):
    with pytest.raises(kind, match=message):
        ranks.run([job(tmp_path, "hangs"), job(tmp_path, writer)], lambda: None)
    assert not any(map(alive, pids(tmp_path).values()))


def test_an_interrupt_ends_all(ranks, tmp_path):
    def poll():
        if len(pids(tmp_path)) == 1 and all(path.read_text() for path in tmp_path.glob("started-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranks.run([job(tmp_path, "hangs"), job(tmp_path, "hangs")], poll)
    assert not any(map(alive, pids(tmp_path).values()))


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
def test_ranks_end_with_who_started_them_however_it_ends(signal, tmp_path):
    code = (
        "import sys; from pathlib import Path; from molmo_model.eval.ranks import Ranks\n"
        "from tests.eval.test_journal_ranks import WORKER, job\n"
        "folder = Path(sys.argv[1]); ranks = Ranks([sys.executable, '-c', WORKER], 2, 0, folder / 'ranks')\n"
        "ranks.run([job(folder, 'hangs'), job(folder, 'done')], lambda: None)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    while len([path for path in tmp_path.glob("started-*") if path.read_text()]) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    getattr(process, {"SIGTERM": "terminate", "SIGKILL": "kill"}[signal])()
    process.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, pids(tmp_path).values())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shares_are_whole_fair_and_the_same_everywhere():
    rng = random.Random(1)
    for count in (1, 2, 3, 8):
        costs = [(f"picture {rng.randrange(60)}", rng.uniform(1, 30)) for _ in range(300)]
        found = shares(costs, count)
        assert sorted(itertools.chain(*found)) == list(range(300))
        assert found == shares(costs, count)
        homes = [{costs[index][0] for index in share} for share in found]
        assert sum(map(len, homes)) == len({about for about, _ in costs})  # questions of a picture stay together
        loads = [sum(costs[index][1] for index in share) for share in found]
        biggest = max(sum(cost for about, cost in costs if about == one) for one, _ in costs)
        assert max(loads) <= sum(loads) / count + biggest


def test_many_questions_about_one_picture_are_split():
    found = shares([("picture", 1.0)] * (4 * MOST_TOGETHER), 4)
    assert [len(share) for share in found] == [MOST_TOGETHER] * 4


def test_more_ranks_than_questions_leave_some_without_work():
    assert sorted(map(len, shares([("a", 1.0), ("b", 1.0)], 4))) == [0, 0, 1, 1]
