"""Small snapshots of published datasets, written as the hub holds them: Parquet with the card's columns and types, and
lists of downloads for those that name their pictures by URL."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets import FAMILIES, BadRow
from molmo_model.data.downloads import Download, Status, Store, write_list
from molmo_model.data.example import Example


def png(number: int, width: int = 8, height: int = 6) -> bytes:
    """A picture file; another one for every number."""
    file = io.BytesIO()
    PILImage.new("RGB", (width, height), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def hub_image(number: int) -> dict[str, Any]:
    """A picture as a column of type `Image` holds it."""
    return {"bytes": png(number), "path": f"{number}.png"}


def write_split(
    folder: Path, split: str, rows: Sequence[Mapping[str, Any]], features: Any, place: str = "data"
) -> Path:
    """One split as `push_to_hub` writes it, `data/<split>-00000-of-00001.parquet`, without a card; columns that a row
    does not have are null."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    path = folder / place / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in features}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def snapshot(folder: Path, features: Any, splits: dict[str, list[dict[str, Any]]], subset: str | None = None) -> Path:
    """Writes every split, and a card that names them."""
    place = subset or "data"
    for split, rows in splits.items():
        write_split(folder, split, rows, features, place)
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


def examples(family: str, path: Path | str, **config: Any) -> list[Example]:
    """The examples of a family where no row is bad."""
    found = [row for _, row in read(family, path, **config)]
    bad = [row for row in found if isinstance(row, BadRow)]
    assert not bad, bad
    return [row for row in found if isinstance(row, Example)]


def downloads(folder: Path, files: Mapping[str, bytes | str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A list of downloads, and the store that it names: URLs to the files that were there, or to why there is none."""
    monkeypatch.setenv("MOLMO_DOWNLOAD_DIR", str(folder / "store"))
    rows = []
    for url, file in files.items():
        if isinstance(file, str):
            rows.append(Download(url, Status.GONE, file, http_status=404))
            continue
        digest = hashlib.sha256(file).hexdigest()
        path = Store().path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
        with PILImage.open(io.BytesIO(file)) as picture:
            size = picture.size
        rows.append(Download(url, Status.OK, "", 200, digest, len(file), "PNG", *size))
    write_list(folder / "downloads.parquet", rows)
    return str(folder / "downloads.parquet")
