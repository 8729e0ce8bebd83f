"""The page of metrics says what the table says."""

import re
from pathlib import Path

from molmo_model.eval import metrics_page
from molmo_model.eval.metrics import METRICS

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_table_says(capsys):
    assert metrics_page.main(["--check", "--root", str(ROOT)]) == 0, "run `python -m molmo_model.eval.metrics_page`"


def test_a_page_that_is_old_fails_the_check_and_is_rewritten(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for arguments in (["--root", str(tmp_path)], ["--check", "--root", str(tmp_path)]):
        assert metrics_page.main(arguments) == 0
    page = tmp_path / metrics_page.PAGE
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace("Metrics", "Numbers", 1), encoding="utf-8")
    assert metrics_page.main(["--check", "--root", str(tmp_path)]) == 1
    assert "out of date" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") != whole
    metrics_page.main(["--root", str(tmp_path)])
    assert page.read_text(encoding="utf-8") == whole


def test_every_metric_and_number_is_there_with_its_source_and_links_lead_somewhere():
    page = metrics_page.page()
    sections = dict(re.findall(r"^### Metric `(\w+)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) and set(sections) == set(METRICS)
    for name, metric in METRICS.items():
        for number, output in metric.outputs.items():
            row = next(line for line in sections[name].splitlines() if re.match(rf"\| \**`{re.escape(number)}`", line))
            assert metrics_page.unit(output) in row, (name, number)
            assert row.endswith(f"| {metrics_page.better(output)} |")
        assert f"**`{metric.primary}`**" in sections[name]
        assert metric.citation.split(".")[0][1:] in sections[name]
    assert set(re.findall(r"\(#metric-(\w+)\)", page)) == set(METRICS)


def test_every_metric_is_whole():
    for name, metric in METRICS.items():
        for number in (metric.primary, *metric.macro, *metric.exponentials, *metric.functions):
            assert metric.output(number).definition, (name, number)
        for of in metric.exponentials.values():
            assert metric.output(of)
        assert sum((metric.judged, metric.measured)) <= 1
        assert metric.score_all is not None or not metric.judged, name
        assert len(metric.citation) > 30, name
        assert metric.constant_rule, name
