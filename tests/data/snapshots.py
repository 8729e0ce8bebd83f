"""Small snapshots of published datasets, written as the hub holds them: Parquet with the card's columns and types."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES, BadRow
from molmo_model.data.example import Example


def png(number: int, width: int = 8, height: int = 6) -> bytes:
    """A picture file; another one for every number."""
    file = io.BytesIO()
    PILImage.new("RGB", (width, height), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def hub_image(number: int) -> dict[str, Any]:
    """A picture as a column of type `Image` holds it."""
    return {"bytes": png(number), "path": f"{number}.png"}


def snapshot(folder: Path, features: Any, splits: dict[str, list[dict[str, Any]]], subset: str | None = None) -> Path:
    """Writes `data/<split>-00000-of-00001.parquet` for every split, and a card that says so."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    place = subset or "data"
    (folder / place).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        table = Dataset.from_list(rows, features=features)
        table.to_parquet(str(folder / place / f"{split}-00000-of-00001.parquet"))
    files = "".join(f"\n  - split: {split}\n    path: {place}/{split}-*" for split in splits)
    card = f"---\nlicense: mit\nconfigs:\n- config_name: {subset or 'default'}\n  data_files:{files}\n---\n"
    (folder / "README.md").write_text(card)
    return folder


def json_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(family: str, path: Path | str | None, **config: Any) -> list[tuple[str, Example | BadRow]]:
    """Everything that a family makes of a snapshot."""
    place = None if path is None else str(path)
    return list(FAMILIES[family].make(DatasetConfig(family=family, path=place, **config), 0))


def bad(rows: list[tuple[str, Example | BadRow]]) -> list[tuple[str, int, str, str]]:
    """File's name, line, field and reason of the bad rows."""
    return [(Path(row.file).name, row.line, row.field, row.reason) for _, row in rows if isinstance(row, BadRow)]


def good(rows: list[tuple[str, Example | BadRow]]) -> dict[str, tuple[str, Example]]:
    """Split and example by id."""
    return {row.id: (split, row) for split, row in rows if isinstance(row, Example)}
