"""The report page as text: self-contained, escaped, complete, small. `test_report_browser` uses it as a person does."""

import base64
import hashlib
import io
import json
import random
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from PIL import Image as PILImage

from molmo_model.data.example import Image
from molmo_model.errors import EvaluationError
from molmo_model.eval import cards, charts, pictures, report_data, standings
from molmo_model.eval.outlines import outline
from molmo_model.eval.pictures import Album, Still, embed
from molmo_model.eval.report import embedded, write
from molmo_model.eval.report_data import DataSource, Evaluated, Inputs, Lineage, TaskResult, Training
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


def example(*images):
    """What stands for an example: its pictures."""
    return SimpleNamespace(images=images or (png(),), videos=())


def inputs(text="a cat", ids=("x#0", "x#1"), **changes):
    """A report's inputs with one task, two checkpoints and two items, and `text` wherever data may hold text."""
    estimate = {"mean": 0.5, "stderr": 0.1, "low": 0.3, "high": 0.7, "n": 2}
    metrics = {
        "task": "t",
        "checkpoint": "c",
        "metric": "exact_match",
        "primary": "exact_match",
        "metrics": {"exact_match": estimate},
        "outputs": {"exact_match": {"definition": text, "lower_is_better": False, "upper": 1.0}},
        "baseline": {"answer": text, "rule": "the commonest", "metrics": {"exact_match": estimate}},
        "unparsed": 0,
        "citation": text,
        "slices": [{"by": "kind", "value": text, "n": 2, "metrics": {"exact_match": estimate}}],
        "judged": {"asked": 2, "missing": 1, "judge": text},
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
    scores = [
        {"id": name, "scores": {"exact_match": float(i)}, "parsed": True, "read": text} for i, name in enumerate(ids)
    ]
    lineage = Lineage("1" * 64, "2" * 64, "3" * 64, "4" * 64, "5" * 64, {"tasks.t": {"note": text}})
    result = Evaluated(metrics, lineage, rows, scores)
    names = ["pretrain/step-000300", "sft/step-000300"]
    arguments = {
        "results": {"t": dict.fromkeys(names, result)},
        "losses": {"pretrain": [(1, 2.0), (2, 1.0)]},
        "example": lambda dataset, row: example(),
        "confidence": 0.95,
        "examples": 6,
        "checkpoints": names,
        "training": {"sft": Training("6" * 64, "7" * 64, {"mixture": "8" * 64}, {"runs.sft": text})},
    }
    return Inputs(**{**arguments, **changes})


def blocks(text):
    """The JSON blocks of a page by id."""
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(content) for name, content in found}


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
    assert [script for script in page.all("script") if script.get("type") != "application/json"] == [{}]
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
    text = (evaluated / "artifacts/report/index.html").read_text(encoding="utf-8")
    page, data = Page(text), blocks(text)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"][1:] for attributes in page.all("a")]
    plain = {link for link in links if not link.startswith(("lineage/", "run/"))}
    assert plain <= ids
    assert {link for link in links if link.startswith("lineage/")} == {
        f"lineage/{task}/{checkpoint}" for task in synthetic.TASKS for checkpoint in synthetic.QUALITY
    }
    for number, task in enumerate(data["numbers"]["tasks"]):
        made = data[f"cards-{number}"]
        assert len(made) == settings.eval.report_examples
        assert all(len(card["answers"]) == len(synthetic.QUALITY) for card in made)
        for one in (picture["at"] for card in made for picture in card["pictures"]):
            assert data[f"pictures-{one[0]}"][one[1]].startswith("data:image/")
        assert all(len(result["lineage"]["weights"]) == 64 for result in task["results"])
    assert len(data["numbers"]["pairs"]) == 3
    everything = [uri for name, uris in data.items() if name.startswith("pictures-") for uri in uris]
    assert len(everything) == len(set(everything))  # a picture that two tasks ask about is there once


@pytest.mark.parametrize("text", [EVIL, "</script><!--<script>\u2028\x00\u202e" + "🐈" * 700, "]]>" * 300])
def test_what_data_say_is_never_markup(tmp_path, text):
    written = render(tmp_path, inputs(text, ids=("x#0", f"x#1{text}")))
    page = check_self_contained(written)
    assert "<script>alert" not in written and 'onerror="' not in written
    assert len(page.all("script")) == 5  # the program, the numbers, the commits, one task's cards and pictures
    (card, *_) = blocks(written)["cards-0"]
    assert card["answers"][0]["text"].startswith(text[:600]) and card["answers"][0]["read"].startswith(text[:600])
    assert len(card["prompt"]) < 640
    task = blocks(written)["numbers"]["tasks"][0]
    assert task["slices"][0]["value"].startswith(text[:600]) and task["citation"] == text


def test_half_a_surrogate_pair_stops_nothing(tmp_path):
    assert "a?b" in render(tmp_path, inputs("a\ud800b"))


def test_json_in_a_page_comes_back_and_cannot_end_its_block():
    value = {"a": "</script><!-- & \u2028\u2029", "b": [1.5, None, "ü"]}
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


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
    assert [path.stem for path in plots] == sorted([*synthetic.TASKS, "training_loss", "group-0"])
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


def test_unread_answers_and_changes_are_among_the_cards():
    scores = [1.0] * 90 + [0.0] * 10
    chosen = cards.choose(scores, 24, unparsed=[3, 95], changed=[40, 41, 42])
    assert {3, 95, 40, 41, 42, *range(90, 100)} <= set(chosen) and len(chosen) == 24
    graded = [index / 100 for index in range(100)]
    assert set(range(8)) <= set(cards.choose(graded, 24))  # half of the imperfect ones are the worst


def row(prediction, references, **more):
    base = {"id": "x#0", "example_id": "x", "prompt": "Point", "prediction": prediction, "references": references}
    return base | {"finish_reason": "stop", "image": {"dataset": "d", "row": 0, "sha256": []}} | more


def test_points_regions_and_outlines_are_in_pixels():
    references = {
        "answer": '<point x="50.0" y="50.0" alt="a">a</point>',
        "points": [[50.0, 50.0]],
        "width": 200,
        "height": 100,
        "metadata": {
            "boxes": [[40.0, 40.0, 60.0, 70.0], "no box"],
            "masks": [{"size": [4, 4], "counts": [5, 2, 2, 2, 5]}, {"size": [4, 4], "counts": [3]}],
        },
    }
    said = row('<point x="25.0" y="50.0" alt="a">a</point>', references)
    score = {"id": "x#0", "scores": {"f1": 0.0}, "parsed": True}
    stills = [Still("k", Image(b"x", 200, 100, "PNG"))]
    card = cards.make([said], [score], "f1", stills)
    assert card["answers"][0]["points"] == [(0, 50.0, 50.0)]
    assert card["targets"] == [(100.0, 50.0)]
    assert card["boxes"] == [(80.0, 40.0, 40.0, 30.0)]
    assert card["outlines"] == ["M50 25L150 25L150 75L50 75Z"]  # runs that do not add up are no outline
    assert card["answers"][0]["text"] == "(25.0, 50.0)"


def test_corners_are_drawn_as_a_box():
    answer = '<points x1="10.0" y1="20.0" x2="60.0" y2="70.0" alt="a">a</points>'
    references = {"answer": answer, "points": None, "width": 200, "height": 100, "metadata": {}}
    score = {"id": "x#0", "scores": {"iou": 1.0, "accuracy": 1.0}, "parsed": True}
    card = cards.make([row(answer, references)], [score], "accuracy", [Still("k", Image(b"x", 200, 100, "PNG"))])
    assert card["answers"][0]["boxes"] == [(20.0, 20.0, 100.0, 50.0)] and "points" not in card["answers"][0]


def test_points_of_several_pictures_and_of_films_are_drawn_where_they_belong():
    references = {"answer": "", "points": None, "width": 100, "height": 100, "metadata": {}}
    said = row('<points coords="2 1 500 250;3 2 100 100">a</points>', references)
    score = {"id": "x#0", "scores": {"f1": 0.0}, "parsed": False}
    image = Image(b"x", 100, 100, "PNG")
    two = cards.make([said], [score], "f1", [Still("a", image), Still("b", image)])
    assert two["answers"][0]["points"] == [(1, 50.0, 25.0)]  # there is no third picture
    film = cards.make([said], [score], "f1", [Still("a", image, 0.5), Still("b", image, 2.25)])
    assert film["answers"][0]["points"] == [(1, 50.0, 25.0), (1, 10.0, 10.0)]


def test_an_outline_goes_round_areas_and_holes():
    ring = [1] * 5 + [1, 0, 0, 0, 1] * 3 + [1] * 5
    counts, last = [0], 1
    for value in ring:
        counts = [*counts[:-1], counts[-1] + 1] if value == last and len(counts) > 1 else [*counts, 1]
        last = value
    path = outline({"size": [5, 5], "counts": counts}, (5, 5))
    assert path.count("M") == path.count("Z") == 2
    assert outline({"size": [3000, 2000], "counts": [0, 6_000_000]}, (2000, 3000)) == "M0 0L2000 0L2000 3000L0 3000Z"
    assert outline({"size": [5, 5], "counts": [25]}, (5, 5)) == ""


def test_small_pictures_are_embedded_as_they_are_and_large_ones_reduced():
    small = png()
    assert base64.b64decode(embed(small).uri.partition(",")[2]) == small.data
    picture = embed(noise())
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/webp;base64"
    with PILImage.open(io.BytesIO(base64.b64decode(data))) as reduced:
        assert max(reduced.size) == pictures.EMBED_SIDE
    assert (picture.width, picture.height) == (900, 600)
    with pytest.raises(EvaluationError, match="too large"):
        embed(Image(b"x" * 99_999, 99_999, 99_999, "PNG"))


def noise():
    buffer = io.BytesIO()
    PILImage.effect_noise((900, 600), 80).save(buffer, "PNG")
    return Image(buffer.getvalue(), 900, 600, "PNG")


def test_all_pictures_together_keep_to_their_budget():
    """Each content once; small ones stay as they are, large ones share what is left."""
    album = Album(60_000)
    for number in range(4):
        album.add(Still(f"large-{number}", noise()))
    album.add(Still("small", png()))
    album.add(Still("small", png()))
    data = album.data()
    assert list(data) == ["large-0", "large-1", "large-2", "large-3", "small"]
    assert data["small"] == embed(png()).uri
    assert 30_000 < sum(map(len, data.values())) <= 60_000


# --- standings


def one_task(scores, lower=False, upper=1.0, primary="s"):
    """A task with the given scores of each checkpoint."""
    results = {}
    for number, values in enumerate(scores):
        given = inputs(ids=[f"x#{index}" for index in range(len(values))]).results["t"]
        base = next(iter(given.values()))
        mean = sum(values) / len(values)
        output = {"definition": "", "lower_is_better": lower, "upper": upper}
        metrics = {
            **base.metrics,
            "primary": primary,
            "metrics": {primary: {"mean": mean, "stderr": 0.0, "low": mean, "high": mean, "n": len(values)}},
            "outputs": dict.fromkeys({primary, "s"}, output),
            "baseline": None,
        }
        rows = [{"id": f"x#{index}", "scores": {"s": value}, "parsed": True} for index, value in enumerate(values)]
        results[f"run{number}/step-000001"] = Evaluated(metrics, base.lineage, base.predictions, rows)
    return TaskResult("t", results, 0.95)


def test_who_is_not_significantly_worse_is_marked_as_the_best_is():
    good, level, bad = [1.0] * 90 + [0.0] * 10, [1.0] * 88 + [0.0] * 12, [1.0] * 20 + [0.0] * 80
    assert one_task([good, level, bad]).best == [True, True, False]
    assert one_task([bad, level, good]).best == [False, True, True]
    assert one_task([good, bad], lower=True).best == [False, True]
    assert one_task([good, good]).best == [True, True]


def test_numbers_without_a_largest_value_are_shown_as_they_are(tmp_path):
    """A loss: less is better, no percent, no baseline; what is derived from it is compared by it."""
    task = one_task([[2.0, 3.0] * 20, [1.0, 2.0, 1.0, 3.0] * 10], lower=True, upper=None, primary="perplexity")
    assert (task.item_score, task.best, task.can_be_averaged) == ("s", [False, True], False)
    text = render(tmp_path, inputs(results={"t": task.results}, checkpoints=list(task.results)))
    assert "1.750" in Page(text).text and "less is better" in Page(text).text
    (pair,) = json.loads((tmp_path / "report.json").read_text())["comparisons"]
    assert pair["difference"] == pytest.approx(-0.75) and (pair["wins"], pair["losses"]) == (30, 0)
    assert [task.scores[1][index] for index in report_data.choose(task, 9)][:2] == [3.0, 3.0]  # the worst come first
    assert task.item_reading.right(0.5) is None  # no loss is right or wrong


def test_groups_average_what_can_be_averaged():
    tasks = [one_task([[1.0, 0.0] * 20, [1.0, 1.0] * 20]), one_task([[0.0] * 40, [1.0, 0.0] * 20])]
    columns = {f"t{number}": task.columns for number, task in enumerate(tasks)}
    group = standings.group("all", {**columns, "loss": None}, 0.95)
    assert [one.mean for one in group.averages] == [0.25, 0.75]
    assert group.best == (False, True) and group.left_out == ("loss",)
    assert standings.group("one", {"t0": columns["t0"], "loss": None}, 0.95) is None


# --- size


@pytest.mark.slow
def test_a_page_of_fifty_tasks_and_ten_checkpoints_is_small(tmp_path):
    """The longest texts of three bytes a character, and a different picture on every card."""
    rng = random.Random(0)
    names = [f"run/step-{step:06d}" for step in range(10)]
    ids = [f"x#{index}" for index in range(26)]
    results = {}
    for task in range(50):
        (base,) = {id(one): one for one in inputs("魚" * 900, ids).results["t"].values()}.values()
        rows = [row | {"image": {**row["image"], "row": task * 26 + i}} for i, row in enumerate(base.predictions)]
        scored = [[{**row, "scores": {"exact_match": float(rng.random() < 0.6)}} for row in base.scores] for _ in names]
        results[f"task{task}"] = {
            name: Evaluated(base.metrics, base.lineage, rows, scores)
            for name, scores in zip(names, scored, strict=True)
        }
    images = [Image(rng.randbytes(5200), 640, 480, "JPEG") for _ in range(1300)]
    given = inputs(results=results, checkpoints=names, example=lambda dataset, row: example(images[row]), examples=24)
    text = render(tmp_path, given)
    assert 14_000_000 < len(text.encode()) < 19_000_000
    assert sum(len(made) for name, made in blocks(text).items() if name.startswith("cards-")) == 50 * 24


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
