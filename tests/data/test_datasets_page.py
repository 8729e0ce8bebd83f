"""`docs/datasets.md` names every family with the source, licence and revision that the code reads, and no other."""

import re
from pathlib import Path

from molmo_model.data import datasets
from molmo_model.data.datasets import FAMILIES

FOLDER = Path(datasets.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "docs" / "datasets.md"
COLUMNS = ["family", "source", "licence", "revision", "columns read", "styles", "sides"]


def table() -> dict[str, list[str]]:
    """Cells by family, of all tables that have a column `family`."""
    found: dict[str, list[str]] = {}
    inside = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[:1] == ["family"]:
            assert cells == COLUMNS, f"a table of families has the columns {cells}"
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(line) <= set("|-: "):
            (name,) = re.findall(r"^`(\w+)`$", cells[0])
            assert name not in found, f"{name} stands twice"
            found[name] = cells
    return found


def test_the_page_names_every_family_and_no_other() -> None:
    assert sorted(table()) == sorted(FAMILIES)


def test_the_page_says_what_the_code_reads() -> None:
    for name, cells in table().items():
        family = FAMILIES[name]
        assert (cells[1], cells[2]) == (family.source, family.licence), name
        assert not family.revision or cells[3] == family.revision, name
        assert len(cells) == len(COLUMNS) and all(cells), name


def test_the_styles_are_those_that_the_code_writes() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    for name, cells in table().items():
        for style in re.findall(r"\w+", cells[5].replace("any", "")):
            assert f'"{style}"' in code, f"{name}: no family writes the style {style}"
