"""The documents say what the code's tables say."""

from pathlib import Path

import pytest

from molmo_model.errors import ConfigError
from molmo_model.nn.tables import BLOCKS, filled, main
from molmo_model.nn.vision_encoder import VISION_ENCODERS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", BLOCKS)
def test_generated_blocks_are_up_to_date(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert filled(text, BLOCKS[document], document) == text, "run `python -m molmo_model.nn.tables`"


def test_every_encoder_stands_in_the_document():
    text = (ROOT / "docs/vision_backbone.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | `{spec.hub_id}` |" in text for name, spec in VISION_ENCODERS.items())


def test_rewriting_and_checking(tmp_path, monkeypatch, capsys):
    blocks = {"a.md": {"one": lambda: "| new \\1 |"}}
    monkeypatch.setattr("molmo_model.nn.tables.BLOCKS", blocks)
    page = tmp_path / "a.md"
    page.write_text("before\n<!-- table: one -->\n| old |\n<!-- end: one -->\nafter\n")
    root = ["--root", str(tmp_path)]
    assert main([*root, "--check"]) == 1 and "out of date: a.md" in capsys.readouterr().err
    assert "old" in page.read_text()
    assert main(root) == 0
    assert page.read_text() == "before\n<!-- table: one -->\n| new \\1 |\n<!-- end: one -->\nafter\n"
    assert main([*root, "--check"]) == 0
    page.write_text("no markers")
    with pytest.raises(ConfigError, match=r"a\.md must hold the lines"):
        main(root)
