"""Judges and their cache, against a server on this machine that fails in every way, and the metrics that ask them."""

import copy
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from molmo_model.config import EvalConfig, JudgeProvider, RuntimeConfig
from molmo_model.errors import ConfigError, EvaluationError
from molmo_model.eval import judges
from molmo_model.eval.metrics import METRICS
from molmo_model.eval.metrics.dense_captions import CONSISTENT, STATED
from molmo_model.eval.metrics.judged_lists import numbered, statements_of, verdicts
from pipelines import score
from pipelines.stage import run_all

KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Answers `<prompt>!`, or by `rule`, after the failures that `plan` has for the prompt."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan = {}
        self.rule = "{}!".format
        self.seen = []
        self.most = self.now = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            server.seen.append((prompt, self.path, self.headers.get("Authorization"), body))
            server.now += 1
            server.most = max(server.most, server.now)
            failures = server.plan.get(prompt, [])
            failure = failures.pop(0) if failures else None
        time.sleep(0.3 if failure == "slow" else 0.01)
        with server.lock:
            server.now -= 1
        text = json.dumps({"choices": [{"message": {"role": "assistant", "content": server.rule(prompt)}}]})
        if failure == "torn":
            text = text[: len(text) // 2]
        elif failure == "odd":
            text = json.dumps({"choices": []})
        elif failure == "empty":
            text = json.dumps({"choices": [{"message": {"content": " "}}]})
        elif isinstance(failure, int):
            text = f"refused for {self.headers.get('Authorization')}"
        self.send_response(failure if isinstance(failure, int) else 200)
        self.send_header("Content-Length", str(len(text)))
        if failure == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        if failure == "cut":
            self.wfile.write(text.encode()[:5])
            self.close_connection = True
            return
        self.wfile.write(text.encode())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judges, "FIRST_PAUSE", 0.01)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def judge_of(server, folder, provider="openai", model="judge-1", requests=4):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1" if server else None
    settings = EvalConfig(judge=JudgeProvider(provider), judge_model=model)
    runtime = RuntimeConfig(judge_url=url, judge_key="MY_KEY", engine_requests=requests)
    return judges.judge_of(settings, runtime, folder, {"MY_KEY": KEY})


def test_every_prompt_is_asked_once_and_never_again(server, tmp_path, monkeypatch):
    judge = judge_of(server, tmp_path)
    assert judge.ask(["a", "b", "a", "c"]) == ["a!", "b!", "a!", "c!"]
    assert Counter(prompt for prompt, *_ in server.seen) == {"a": 1, "b": 1, "c": 1}
    assert (judge.asked, judge.missing, judge.sent, judge.name) == (4, 0, 3, "openai (judge-1)")
    _, path, authorization, body = server.seen[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)

    again = judge_of(server, tmp_path)
    assert again.ask(["c", "b"]) == ["c!", "b!"]
    assert (len(server.seen), again.sent) == (3, 0)
    assert judge_of(server, tmp_path, model="judge-2").ask(["a"]) == ["a!"]  # another model's word is another's
    assert len(server.seen) == 4
    monkeypatch.setattr(judges, "SETTINGS", {"temperature": 1})
    assert judge_of(server, tmp_path).ask(["a"]) == ["a!"]
    assert len(server.seen) == 5
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_offline_knows_what_was_said_before_and_counts_the_rest(server, tmp_path):
    judge_of(server, tmp_path).ask(["a"])
    offline = judge_of(None, tmp_path, "offline")
    assert offline.ask(["a", "b", "b"]) == ["a!", None, None]
    assert (offline.asked, offline.missing, offline.name) == (3, 2, "offline (judge-1)")
    assert judge_of(None, tmp_path, "offline", model=None).ask(["a"]) == [None]
    assert len(server.seen) == 1
    assert not (tmp_path / "none").exists()
    judge_of(None, tmp_path / "none", "offline").ask(["a"])
    assert not (tmp_path / "none").exists()  # who asks nobody writes nothing


@pytest.mark.parametrize("failure", [429, 500, 503, "torn", "odd", "empty", "cut", "slow"])
def test_a_server_that_fails_is_asked_again_a_few_times(server, tmp_path, monkeypatch, failure):
    if failure == "slow":
        monkeypatch.setattr(judges, "TIMEOUT", 0.1)
    server.plan = {"a": [failure] * 2, "b": [failure] * 9}
    judge = judge_of(server, tmp_path)
    assert judge.ask(["a", "b", "c"]) == ["a!", None, "c!"]
    assert Counter(prompt for prompt, *_ in server.seen) == {"a": 3, "b": judges.ATTEMPTS, "c": 1}
    assert (judge.asked, judge.missing) == (3, 1)
    assert "127.0.0.1" in judge.problems[0]
    assert "5 times" in judge.problems[0]
    server.plan = {}
    assert judge_of(server, tmp_path).ask(["a", "b", "c"]) == ["a!", "b!", "c!"]  # only what is missing
    assert Counter(prompt for prompt, *_ in server.seen)["b"] == judges.ATTEMPTS + 1


def test_a_prompt_that_is_refused_is_missing_and_a_wrong_key_ends_the_run(server, tmp_path):
    server.plan = {"long": [400], "b": [401]}
    judge = judge_of(server, tmp_path, requests=1)
    assert judge.ask(["a", "long"]) == ["a!", None]
    assert Counter(prompt for prompt, *_ in server.seen)["long"] == 1
    with pytest.raises(EvaluationError, match=r"answers 401 to the judge 'judge-1'.*runtime\.judge_key") as error:
        judge.ask(["b"])
    assert KEY not in str(error.value)
    assert KEY not in repr(judge.problems)
    assert judge_of(server, tmp_path).ask(["a"]) == ["a!"]  # what was answered before is kept


def test_requests_run_side_by_side_but_no_more_than_allowed(server, tmp_path):
    prompts = [f"p{i}" for i in range(24)]
    assert judge_of(server, tmp_path, requests=3).ask(prompts) == [f"{prompt}!" for prompt in prompts]
    assert 1 < server.most <= 3


def test_torn_and_damaged_lines_are_asked_again(server, tmp_path):
    judge_of(server, tmp_path, requests=1).ask(["a", "b", "c"])
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    for cut in (1, 2, 30, len(whole.splitlines()[-1]) - 1):
        file.write_bytes(whole[:-cut])
        torn = judges.Judgements(tmp_path)
        problems = [] if cut == 1 else [f"{file}:3: checksum does not match; the judgement is asked for again"]
        assert torn.problems == problems  # without its newline alone the line is whole
        torn.add("new", "said", {})  # goes on its own line
        again = judges.Judgements(tmp_path)
        assert again.get("new") == "said"
        assert again.problems == problems
    damaged = bytearray(whole)
    damaged[40] ^= 1
    file.write_bytes(bytes(damaged))
    assert judge_of(server, tmp_path, requests=1).ask(["a", "b", "c"]) == ["a!", "b!", "c!"]
    assert len(server.seen) == 4


def test_the_judge_openai_needs_an_address_and_a_model(server, tmp_path):
    with pytest.raises(ConfigError, match=r"runtime\.judge_url is not set"):
        judge_of(None, tmp_path)
    with pytest.raises(ConfigError, match=r"eval\.judge_model is not set"):
        judge_of(server, tmp_path, model=None)
    assert list(Path(tmp_path).iterdir()) == []


def test_the_score_stage_asks_once_and_says_what_is_missing(server, workspace, settings, monkeypatch, capsys):
    workspace()
    monkeypatch.setenv("MY_KEY", KEY)
    cell = {"checkpoint": "sft/step-000300", "task": "scene_qa"}
    judged = copy.deepcopy(settings)
    judged.tasks["scene_qa"].metric = "judged_answer"

    def scored():
        ((_, manifest),) = run_all(score.STAGE, judged, cell, overwrite=True)
        folder = Path("artifacts/metrics") / cell["checkpoint"] / cell["task"]
        return manifest, json.loads((folder / "metrics.json").read_text())

    _, nobody = scored()
    asked = nobody["judged"]["asked"]
    assert nobody["judged"] == {"asked": asked, "missing": asked, "judge": "offline"}
    assert nobody["metrics"] == {}
    assert f"{asked} of {asked} judgements by offline are missing" in capsys.readouterr().out

    server.rule = lambda prompt: "Yes" if "1" in prompt.splitlines()[-1] else "No."
    judged.eval.judge, judged.eval.judge_model = JudgeProvider.openai, "judge-1"
    judged.runtime.judge_url, judged.runtime.judge_key = f"http://127.0.0.1:{server.server_address[1]}/v1", "MY_KEY"
    _, online = scored()
    assert online["judged"] == {"asked": asked, "missing": 0, "judge": "openai (judge-1)"}
    requests = len(server.seen)
    assert 0 < requests <= asked
    assert 0.0 < online["metrics"]["correct"]["mean"] < 1.0
    assert online["baseline"] is None
    assert all("\nQuestion: " in prompt for prompt, *_ in server.seen)

    judged.eval.judge, judged.runtime.judge_url = JudgeProvider.offline, None
    _, offline = scored()
    assert offline["metrics"] == online["metrics"]
    assert (len(server.seen), offline["judged"]["missing"]) == (requests, 0)
    assert not any(KEY in path.read_text(errors="replace") for path in Path().rglob("*") if path.is_file())


# --- what is asked


def test_lists_are_read_by_their_numbers():
    assert numbered(["a\nb", "c"]) == "1. a b\n2. c"
    assert statements_of("Here:\n1. A dog.\n 2) It runs.\n\n3: fast") == ["A dog.", "It runs.", "fast"]
    assert statements_of("A dog.\nIt runs.") == ["A dog.", "It runs."]
    assert verdicts("1. Stated\n2. Not Stated\n4. **stated**\n9. Stated", 5, STATED) == [True, False, None, True, None]
    assert verdicts("2. Consistent.\n1. Inconsistent, since it is red\n3. Unclear", 3, CONSISTENT) == [
        False,
        True,
        None,
    ]
    assert verdicts("1. Stated\n1. Not stated", 1, STATED) == [True]
    assert verdicts("1. Statedly", 1, STATED) == [None]


class Scripted:
    """A judge that follows a rule."""

    name = "scripted"

    def __init__(self, rule):
        self.rule, self.asked, self.missing, self.prompts = rule, 0, 0, []

    def ask(self, prompts):
        self.prompts += prompts
        answers = [self.rule(prompt) for prompt in prompts]
        self.asked += len(answers)
        self.missing += answers.count(None)
        return answers


def dense(prompt):
    if prompt.startswith("Below is a description"):
        return "1. A dog.\n2. A cat.\n3. A car." if "caption one" in prompt else "1. A dog.\n2. It rains."
    if prompt.startswith("People made these"):
        return "1. Stated\n2. Not Stated\n3. Stated\n4. Stated" if "caption one" in prompt else "1. Not Stated\n2. Hm"
    if prompt.startswith("People described"):
        return (
            "1. Consistent\n2. Consistent\n3. Inconsistent"
            if "A car." in prompt
            else "1. Inconsistent\n2. Inconsistent"
        )
    return "Yes." if "caption one" in prompt else "No"


STATEMENTS = ["A dog.", "It runs.", "Grass.", "Sun."]
ITEMS = [
    ("caption one", {"answer": "", "metadata": {"statements": STATEMENTS, "transcripts": ["a dog runs", "sunny"]}}),
    ("caption two", {"answer": "a dog in the rain", "metadata": {}}),
]


def test_dense_captions_by_a_scripted_judge():
    judge = Scripted(dense)
    one, two = METRICS["dense_caption"].score_all(ITEMS, judge)
    assert one.values == pytest.approx(
        {"recall": 0.75, "recall_at_10": 0.75, "consistency": 2 / 3, "statements": 3.0}
        | {"average": (0.75 + 2 / 3) / 2, "f1": 2 * 0.75 * (2 / 3) / (0.75 + 2 / 3), "repeats": 1.0}
    )
    assert one.parsed
    assert two.values == {
        "recall": 0.0, "recall_at_10": 0.0, "consistency": 0.0, "statements": 2.0, "average": 0.0, "f1": 0.0,
        "repeats": 0.0,
    }  # fmt: skip
    assert not two.parsed  # `Hm` is no verdict
    assert judge.asked == 2 + 1 + 2 + 2 + 2
    assert any("a dog runs\n\nsunny" in prompt and "(2 of them)" in prompt for prompt in judge.prompts)
    for name in one.values:
        METRICS["dense_caption"].output(name)


def test_dense_captions_leave_out_what_nobody_judged():
    judge = Scripted(lambda prompt: None if prompt.startswith("Below") else dense(prompt))
    one, two = METRICS["dense_caption"].score_all(ITEMS, judge)
    assert one.values == {"recall": 0.75, "recall_at_10": 0.75, "repeats": 1.0}
    assert two.values == {"repeats": 0.0}
    nobody = Scripted(lambda prompt: None)
    assert [score.values for score in METRICS["dense_caption"].score_all(ITEMS, nobody)] == [{}, {}]
    assert nobody.missing == nobody.asked > 0


def test_recall_at_ten_wants_ten_statements_at_most():
    statements = [f"s{i}" for i in range(40)]
    said = "\n".join(f"{i}. {'Stated' if i <= 12 else 'Not Stated'}" for i in range(1, 41))
    judge = Scripted(lambda prompt: said if prompt.startswith("People made") else None)
    (score,) = METRICS["dense_caption"].score_all(
        [("c", {"answer": "", "metadata": {"statements": statements}})], judge
    )
    assert score.values == {"recall": 0.3, "recall_at_10": 1.0}


def test_open_answers_are_judged_with_question_and_all_references():
    judge = Scripted(lambda prompt: {"A": "Yes", "B": "**No**, it is red.", "C": "Perhaps", "D": None}[prompt[-1]])
    references = {"question": "What colour?", "answer": "red", "metadata": {"answers": ["red", "crimson"]}}
    scores = METRICS["judged_answer"].score_all([(text, references) for text in ("A", "B", "C", "D", " ")], judge)
    assert [score.values for score in scores] == [{"correct": 1.0}, {"correct": 0.0}, {}, {}, {"correct": 0.0}]
    assert [score.parsed for score in scores] == [True, True, False, True, True]
    assert judge.asked == 4
    assert "What colour?" in judge.prompts[0]
    assert "red | crimson" in judge.prompts[0]
    assert METRICS["judged_answer"].judged
    for metric in ("judged_answer", "dense_caption", "captions"):
        with pytest.raises(EvaluationError, match="together"):
            METRICS[metric].score("a", references)


# --- loss


def test_loss_weighs_by_tokens():
    metric = METRICS["loss"]
    assert metric.measured
    assert metric.exponentials == {"perplexity": "loss"}
    score = metric.score("", {"measured": {"nll": 6.0, "tokens": 4, "right": 3}})
    assert (score.values, score.weight) == ({"loss": 1.5, "token_accuracy": 0.75}, 4.0)
    with pytest.raises(EvaluationError, match="not measured"):
        metric.score("text", {"answer": "text"})
    for wrong in ({"nll": float("nan")}, {"tokens": 0}, {"right": 5}, {"nll": float("inf")}, {"nll": -1.0}):
        with pytest.raises(EvaluationError, match="is no loss"):
            metric.score("", {"measured": {"nll": 6.0, "tokens": 4, "right": 3} | wrong})
