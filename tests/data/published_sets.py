"""What the tests of published families need beside `snapshots.py`: single splits, lists of downloads, short answers."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image as PILImage

from molmo_model.data.downloads import Download, Status, Store, write_list
from molmo_model.data.example import BadRow, Example
from tests.data.snapshots import read


def write_split(folder: Path, split: str, rows: Sequence[Mapping[str, Any]], features: datasets.Features) -> Path:
    """One split as `push_to_hub` writes it, `data/<split>-00000-of-00001.parquet`, without a card; columns that a row
    does not have are null."""
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in features}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


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


def examples(family: str, path: Path | str, **config: Any) -> list[Example]:
    """The examples of a family where no row is bad."""
    found = [row for _, row in read(family, path, **config)]
    bad = [row for row in found if isinstance(row, BadRow)]
    assert not bad, bad
    return [row for row in found if isinstance(row, Example)]


def bad_rows(family: str, path: Path | str, **config: Any) -> list[BadRow]:
    """The bad rows alone."""
    return [row for _, row in read(family, path, **config) if isinstance(row, BadRow)]
