"""The report page: self-contained, escaped, complete, and alive in a real browser where there is one."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image as PILImage

from molmo_model.data.example import Image
from molmo_model.errors import EvaluationError
from molmo_model.eval import cards, charts
from molmo_model.eval.report import DataSource, Evaluated, Inputs, Lineage, write
from tests.eval import synthetic

EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)">' " & </style> {{ 7*7 }} ]]>"""


class Page(HTMLParser):
    """All elements with their attributes, and the text outside script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def png(side=8, colour=(10, 20, 30)):
    buffer = io.BytesIO()
    PILImage.new("RGB", (side, side), colour).save(buffer, "PNG")
    return Image(buffer.getvalue(), side, side, "PNG")


def inputs(text="a cat", ids=("x#0", "x#1"), **changes):
    """A report's inputs with one task, two checkpoints and two items, and `text` wherever data may hold text."""
    estimate = {"mean": 0.5, "stderr": 0.1, "low": 0.3, "high": 0.7, "n": 2}
    metrics = {
        "metric": "exact_match",
        "primary": "exact_match",
        "metrics": {"exact_match": estimate},
        "baseline": {"answer": text, "rule": "the commonest", "metrics": {"exact_match": estimate}},
        "unparsed": 0,
        "citation": "none",
    }
    rows = [
        {
            "id": name,
            "example_id": text,
            "prompt": text,
            "prediction": text,
            "references": {"answer": text, "points": None, "width": 8, "height": 8, "metadata": {}},
            "finish_reason": "stop",
            "image": {"dataset": "d", "row": 0, "sha256": []},
        }
        for name in ids
    ]
    scores = [{"id": name, "scores": {"exact_match": float(i)}, "parsed": True} for i, name in enumerate(ids)]
    lineage = Lineage("1" * 64, "2" * 64, "3" * 64, "4" * 64, "5" * 64, {"tasks.t": {"note": text}})
    result = Evaluated(metrics, lineage, rows, scores)
    names = ["pretrain/step-000300", "sft/step-000300"]
    arguments = {
        "results": {"t": dict.fromkeys(names, result)},
        "losses": {"pretrain": [(1, 2.0), (2, 1.0)]},
        "pictures": lambda dataset, row: [png()],
        "confidence": 0.95,
        "examples": 6,
        "checkpoints": names,
        "params": {"sft": {"runs.sft": text}},
    }
    return Inputs(**{**arguments, **changes})


def render(tmp_path, given):
    write(given, tmp_path)
    return (tmp_path / "index.html").read_text(encoding="utf-8")


def check_self_contained(text):
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), value
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert not {"link", "iframe", "object", "embed", "base"} & {name for name, _ in page.elements}
    assert len(page.all("script")) == 1
    assert "@import" not in text
    assert "url(" not in text
    return page


def test_the_page_loads_nothing_and_runs_only_its_own_script(evaluated):
    text = (evaluated / "artifacts/report/index.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert len(text) < 3_000_000


def test_the_data_behind_the_numbers(tmp_path):
    """Licence, source, revision and what became no example, of every dataset; what is not recorded is a dash."""
    summary = {
        "examples": {"train": 28299, "eval": 1920},
        "licence": "GPL-3.0 <b>",
        "source": "owner/ChartQA",
        "revision": "b605b6e0",
        "card": "https://example.org/card",
        "bad_rows": 3,
        "missing_downloads": 71,
    }
    data = [DataSource("charts", summary, ["sft"], ["t"]), DataSource("old", {})]
    text = render(tmp_path, inputs(data=data))
    check_self_contained(text)
    section = text.split('<section id="data"')[1].split("</section>")[0]
    rows = [" ".join(Page(row).text.split()) for row in section.split("<tr>")[2:]]
    assert rows[0] == (
        "chartstrains sft; asked by t GPL-3.0 <b> owner/ChartQAhttps://example.org/card b605b6e0 28299 / 1920 3 71"
    )
    assert rows[1].startswith("old – – – – / – – –")
    (first, second) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["data"]
    assert (first["licence"], first["missing_downloads"], first["runs"]) == ("GPL-3.0 <b>", 71, ["sft"])
    assert second["revision"] is None and second["tasks"] == []


def test_the_report_names_the_data_of_tasks_and_runs(evaluated, settings):
    found = json.loads((evaluated / "artifacts/report/report.json").read_text(encoding="utf-8"))["data"]
    assert [(item["dataset"], item["runs"]) for item in found] == [
        ("digit_scenes", ["pretrain", "sft"]),
        ("charts", []),
    ]
    assert found[1]["tasks"] == ["chart_qa"] and len(found[0]["tasks"]) == 4


def test_every_number_has_its_lineage_and_every_task_its_examples(evaluated, settings):
    page = Page((evaluated / "artifacts/report/index.html").read_text(encoding="utf-8"))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"][1:] for attributes in page.all("a")]
    assert set(links) <= ids
    assert sum(link.startswith("lineage-") for link in links) == len(synthetic.QUALITY) * len(synthetic.TASKS)
    shown = [attributes for attributes in page.all("article") if attributes["class"] == "card"]
    assert len(shown) == settings.eval.report_examples * len(synthetic.TASKS)
    assert all(len(card["data-scores"].split()) == len(synthetic.QUALITY) for card in shown)
    assert len([name for name in ids if name.startswith("f-")]) == 6


def test_what_data_say_is_shown_as_text_everywhere(tmp_path):
    text = render(tmp_path, inputs(EVIL))
    page = check_self_contained(text)
    assert "<script>alert" not in text
    assert 'onerror="' not in text
    assert "49" not in re.findall(r"baseline.*", page.text)
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert page.text.count("{{ 7*7 }}") >= 6


def test_equal_inputs_give_equal_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(inputs(), tmp_path / "a")
    write(inputs(), tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [str(name) for name in files] == [
        "index.html",
        "plots/t.svg",
        "plots/training_loss.svg",
        "report.csv",
        "report.json",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_checkpoints_that_were_asked_different_items_are_refused(tmp_path):
    first, second = inputs(), inputs(ids=("x#0", "x#2"))
    names = list(first.checkpoints)
    mixed = {"t": {names[0]: first.results["t"][names[0]], names[1]: second.results["t"][names[1]]}}
    with pytest.raises(EvaluationError, match="other items than the checkpoints before"):
        write(inputs(results=mixed), tmp_path)


def test_plots_are_xml_that_stands_alone(evaluated):
    plots = sorted((evaluated / "artifacts/report/plots").iterdir())
    assert [path.stem for path in plots] == sorted([*synthetic.TASKS, "training_loss"])
    for path in plots:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


# --- cards


def test_failures_come_first_and_right_answers_are_not_forgotten():
    scores = [1.0] * 50 + [0.0, 0.5] * 20
    chosen = cards.choose(scores, 24)
    assert len(set(chosen)) == 24
    assert [scores[index] for index in chosen] == sorted(scores[index] for index in chosen)
    assert sum(scores[index] < 1 for index in chosen) == 16
    few = [0.0] * 10 + [1.0] * 100
    assert sum(few[index] < 1 for index in cards.choose(few, 24)) == 10
    assert len(cards.choose([0.0] * 100, 24)) == 24
    assert len(cards.choose([0.0, 1.0] * 4, 24)) == 8
    assert cards.choose([], 24) == []


def test_points_are_drawn_in_pixels(evaluated, settings):
    row = {
        "id": "x#0",
        "example_id": "x",
        "prompt": "Point",
        "prediction": '<point x="25.0" y="50.0" alt="a">a</point>',
        "references": {
            "answer": '<point x="50.0" y="50.0" alt="a">a</point>',
            "points": [[50.0, 50.0]],
            "width": 200,
            "height": 100,
            "metadata": {"boxes": [[40.0, 40.0, 60.0, 70.0]]},
        },
        "finish_reason": "stop",
        "image": {"dataset": "d", "row": 0, "sha256": []},
    }
    card = cards.make([row], [{"id": "x#0", "scores": {"f1": 0.0}, "parsed": True}], "f1", lambda d, r: [png()])
    assert card.said[0].points == [(50.0, 50.0)]
    assert card.targets == [(100.0, 50.0)]
    assert card.boxes == [(80.0, 40.0, 40.0, 30.0)]
    assert card.said[0].words == [("(25.0, 50.0)", False)]


def test_differing_words_are_marked():
    assert cards.marked("1 2 / 3", "1 4 / 3") == [("1", False), ("2", True), ("/", False), ("3", False)]
    assert cards.marked("1 2", "1 2 3") == [("1 2", False)]


def test_small_pictures_are_embedded_as_they_are_and_large_ones_reduced():
    small = png()
    assert base64.b64decode(cards.embed(small).uri.partition(",")[2]) == small.data
    noise = PILImage.effect_noise((900, 600), 80)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    picture = cards.embed(Image(buffer.getvalue(), 900, 600, "PNG"))
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/webp;base64"
    with PILImage.open(io.BytesIO(base64.b64decode(data))) as reduced:
        assert max(reduced.size) == cards.EMBED_SIDE
    assert (picture.width, picture.height) == (900, 600)
    with pytest.raises(EvaluationError, match="too large"):
        cards.embed(Image(b"x" * 99_999, 99_999, 99_999, "PNG"))


# --- charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3.7), (-2, 2), (0, 300), (0, 1e-6), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    ticks = charts.ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_long_curves_are_thinned_to_means():
    points = [charts.Point(step, float(step % 10)) for step in range(1, 1001)]
    thin = charts.thin(points)
    assert len(thin) <= 150
    assert thin[-1].x == 1000
    assert sum(point.y for point in thin) / len(thin) == pytest.approx(4.5, abs=0.3)


def test_charts_escape_their_names():
    svg = charts.line_chart(EVIL, [charts.Series(EVIL, (charts.Point(1, 0.5, 0.4, 0.6),))])
    ElementTree.fromstring(svg)
    assert "<script" not in svg


# --- in a browser

CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_works_in_a_browser(evaluated, tmp_path):
    """Its script runs without a word on the console: examples are counted, and the lineage that was asked for opens."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
        Path(evaluated / "artifacts/report/index.html").as_uri() + "#lineage-scene_qa-sft-step-000300",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr  # neither errors nor refusals of the page's own policy
    assert re.search(r'<output id="f-count"[^>]*>30 of 30 examples</output>', done.stdout)
    assert re.search(r'<details class="lineage" id="lineage-scene_qa-sft-step-000300" open', done.stdout)
