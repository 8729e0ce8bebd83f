"""The report in a real headless browser, as a person uses it: with mouse, keyboard, on a phone and in the dark.

One browser for the module; every page is opened from its file, and must say nothing on the console and ask the network
for nothing.
"""

import json
import re

import pytest

from molmo_model.data.example import Image
from tests import browser
from tests.eval import synthetic
from tests.eval.test_report import EVIL, example, inputs, png, write

pytestmark = pytest.mark.slow
SFT, PRETRAIN = "sft/step-000300", "pretrain/step-000300"


@pytest.fixture(scope="module")
def chromium():
    with browser.opened() as running:
        yield running


@pytest.fixture
def visit(chromium):
    """Opens a report; whatever its console says or asks of the network fails the test at its end."""
    contexts, said = [], []

    def go(path, address="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(f"{path.as_uri()}{address}")
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def report(evaluated):
    return evaluated / "artifacts" / "report" / "index.html"


def count(page):
    return int(page.inner_text("#f-count").split()[0])


def test_filter_search_and_order(visit, report, settings):
    page = visit(report)
    each = settings.eval.report_examples
    assert count(page) == page.locator(".card").count() == each
    page.select_option("#f-outcome", "bad")
    wrong = count(page)
    assert 0 < wrong < each
    assert page.locator(".card .answer:not(.off) .chip.good").count() == 0
    page.select_option("#f-outcome", "good")
    assert count(page) == each - wrong
    page.select_option("#f-outcome", "")
    page.select_option("#f-task", "")
    assert count(page) == each * len(synthetic.TASKS)
    assert page.locator(".card").count() == 24
    page.click("#f-more")
    assert page.locator(".card").count() == each * len(synthetic.TASKS)
    assert page.evaluate("document.activeElement.closest('.card') !== null")
    page.fill("#f-text", "point to DIGIT")
    found = page.locator(".card .prompt").all_inner_texts()
    assert found and all("point to digit" in text.lower() for text in found)
    page.fill("#f-text", "no such words")
    assert page.is_visible("#f-empty") and count(page) == 0
    page.fill("#f-text", "")
    page.select_option("#f-task", label="chart_qa")
    page.select_option("#f-order", "id")
    shown = page.evaluate("matching.map((card) => card.id)")
    assert shown == sorted(shown)


def test_failures_come_first_and_flips_are_found(visit, report):
    page = visit(report)
    scores = page.evaluate("matching.map((card) => card.answers[chosen()].score)")
    assert scores == sorted(scores)
    page.select_option("#f-checkpoint", label=SFT)
    page.select_option("#f-outcome", "won")
    page.select_option("#f-than", label=PRETRAIN)
    gains = page.evaluate("matching.map((card) => card.answers[2].score - card.answers[0].score)")
    assert gains and min(gains) > 0
    page.select_option("#f-outcome", "lost")  # the invented answers of a better checkpoint are never worse
    assert count(page) == 0


def test_from_a_number_to_examples_weights_data_code_and_params(visit, report, evaluated):
    page = visit(report)
    page.click(f'a[href="#lineage/scene_qa/{SFT}"]')
    page.wait_for_selector("#panel[open]")
    text = page.inner_text("#panel")
    (row,) = (
        row
        for row in json.loads((evaluated / "artifacts/report/report.json").read_text())["rows"]
        if (row["task"], row["checkpoint"], row["metric"]) == ("scene_qa", SFT, "exact_match")
    )
    for name in ("predictions", "metrics", "checkpoint_digest", "shards", "code"):
        assert row[name] in text
    assert "pipelines.commits" in text and '"metric":"exact_match"' in text
    page.click("#panel >> text=what sft was trained with")
    page.wait_for_function("document.getElementById('panel-title').textContent === 'sft'")
    page.go_back()
    page.click("#panel >> text=/of \\d+ shown/")
    page.wait_for_selector("#panel:not([open])", state="attached")
    assert page.input_value("#f-outcome") in ("bad", "")
    assert re.search(r"#examples/scene_qa/", page.url)


def test_a_card_opens_has_an_address_and_leads_on(visit, report):
    page = visit(report)
    page.click(".card:nth-child(2) .prompt a")
    page.wait_for_selector("#panel[open]")
    first = page.inner_text("#panel-title")
    assert page.locator("#panel img").count() == 1
    address = "#" + page.url.partition("#")[2]
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.getElementById('panel-title').textContent !== {json.dumps(first)}")
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel:not([open])", state="attached")
    assert "#" not in page.url
    again = visit(report, address)
    assert again.inner_text("#panel-title") == first
    nowhere = visit(report, "#card/scene_qa/no%20such%20card")
    assert "has no" in nowhere.inner_text("#panel-body")


def test_two_checkpoints_are_compared(visit, report, evaluated):
    page = visit(report)
    page.select_option("#c-a", label=PRETRAIN)
    page.select_option("#c-b", label=SFT)
    rows = page.locator("#c-table tbody tr")
    assert rows.count() == len(synthetic.TASKS)
    pairs = json.loads((evaluated / "artifacts/report/report.json").read_text())["comparisons"]
    (pair,) = (one for one in pairs if (one["a"], one["b"], one["task"]) == (PRETRAIN, SFT, "scene_qa"))
    row = rows.filter(has_text="scene_qa").inner_text()
    assert f"+{pair['difference'] * 100:.1f}" in row and str(pair["wins"]) in row
    page.select_option("#c-a", label=SFT)
    page.select_option("#c-b", label=PRETRAIN)  # turned round: losses for wins
    assert f"−{pair['difference'] * 100:.1f}" in rows.filter(has_text="scene_qa").inner_text()
    rows.filter(has_text="scene_qa").locator("a").nth(2).click()
    page.wait_for_selector("#panel[open]")
    assert f"{pair['losses']} wins, {pair['wins']} losses" in page.inner_text("#panel")
    page.click("#panel .items a >> nth=0")
    page.wait_for_selector("#panel .large")


def test_tasks_show_their_numbers_and_slices(visit, report):
    page = visit(report, "#task/scene_point")
    text = page.inner_text("details.task[open]")
    assert "f1" in text and "precision" in text and "unparsed answers" in text


def test_points_are_drawn_in_two_colours_and_two_shapes(visit, report):
    page = visit(report, f"#examples/scene_point/{SFT.replace('/', '%2F')}")
    assert page.locator(".card path.said").count() > 0 and page.locator(".card .ref-dot").count() > 0
    colours = page.evaluate(
        "['path.said', '.region'].map((name) => getComputedStyle(document.querySelector('.card ' + name)).stroke)"
    )
    assert len(set(colours)) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(visit, report, scheme):
    """At least 4.5 to 1 between a text's colour and what it stands on (WCAG 2.2, 1.4.3)."""
    page = visit(report, "#task/scene_qa", color_scheme=scheme)
    worst = page.evaluate("""() => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
      const over = (colours) => {
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      let least = [99, ""];
      for (const element of document.querySelectorAll("main *, header *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.closest("svg, option")) continue;
        const behind = [];
        for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
        const [a, b] = [over(behind), over([...behind, getComputedStyle(element).color])];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < least[0]) least = [ratio, element.outerHTML.slice(0, 200)];
      }
      return least;
    }""")
    assert worst[0] >= 4.5, worst


def test_a_phone_scrolls_in_one_direction(visit, report):
    page = visit(report, "#task/scene_point", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.goto(page.url.partition("#")[0] + f"#lineage/scene_qa/{SFT}")
    page.wait_for_selector("#panel[open]")
    box = page.locator("#panel").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate(
        "(() => { const p = document.getElementById('panel'); return p.scrollWidth <= p.clientWidth; })()"
    )
    page = visit(report, "#examples", is_mobile=True, has_touch=True, viewport={"width": 390, "height": 844})
    page.wait_for_timeout(200)
    assert 0 <= page.evaluate("document.getElementById('examples').getBoundingClientRect().top") < 80


def test_everything_can_be_reached_by_keyboard(visit, report):
    page = visit(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator(f'a[href="#lineage/scene_qa/{SFT}"]').focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel[open]")
    assert page.evaluate("document.getElementById('panel').contains(document.activeElement)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel:not([open])", state="attached")
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"#lineage/scene_qa/{SFT}"
    page.locator("#f-text").focus()
    stops = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        stops.add(page.evaluate("document.activeElement.id || document.activeElement.className || 'link'"))
    assert {"f-task", "f-checkpoint", "f-outcome", "f-order"} <= stops
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    details = page.locator("details.task summary").first
    details.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("details.task[open] table")


def test_hostile_texts_are_text(visit, tmp_path):
    """Scripts, markup, bidirectional controls, NUL, emoji, and very long texts in all fields that data fill."""
    evil = EVIL + "</script><script>alert(3)</script>\u202egnp.exe\x00🐈‍⬛" + "長" * 5000
    ids = (evil, "x#1/../%2F")
    wide = Image(png().data, 9000, 3, "PNG")
    write(inputs(evil, ids=ids, example=lambda dataset, row: example(png(), wide, png())), tmp_path)
    page = visit(tmp_path / "index.html")
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert page.evaluate("document.scripts.length") == 5
    text = page.inner_text(".card >> nth=0")
    assert "<script>alert(1)</script>" in text and "⟨U+202E⟩" in text and "⟨U+0000⟩" in text and "🐈" in text
    for number in range(2):
        page.locator(".card .prompt a").nth(number).click()
        page.wait_for_selector("#panel[open] .large img")
        page.keyboard.press("Escape")
    page.goto(page.url.partition("#")[0] + "#lineage/t/sft/step-000300")
    page.wait_for_selector("#panel[open]")
    page.goto(page.url.partition("#")[0] + "#card/t/%E0%A4%A")
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    assert dialogs == []


def test_a_page_without_scripts_still_has_its_scores(visit, report):
    page = visit(report, java_script_enabled=False)
    assert page.locator("#scores td .value").count() >= len(synthetic.TASKS) * len(synthetic.QUALITY)
    assert "Scripts are off" in page.inner_text("main")


def test_the_pinned_browser_is_checked_before_it_is_unpacked(tmp_path):
    with pytest.raises(RuntimeError, match="nothing of it is run"):
        browser.unpack(b"another package", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
