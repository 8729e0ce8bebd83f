"""Reads the rows of a published dataset: from the Hugging Face hub, from a local snapshot of its repository, or from
single files.

- `path` empty: the hub, streamed through `datasets`; nothing is decoded, so pictures come as the bytes that were
  published.
- `path` a folder: a snapshot, read by the split patterns of its card (`configs:` of README.md), or by those that
  `datasets` knows (`data/train-*`); also a folder of pictures with `metadata.jsonl`.
- `path` a `.parquet`, `.jsonl`, `.json` or WebDataset `.tar` file, local or in storage, or a pattern such as
  `snapshot/data/train-*.parquet`: these rows, in order of the names.

Rows come one at a time and in a fixed order. A row has a file and a line, so that a defect can be found.
"""

import fnmatch
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from molmo_model.config import DatasetConfig
from molmo_model.data.datasets.chat_rows import RowError, read_rows
from molmo_model.errors import DataError
from molmo_model.storage import is_remote, join, list_files, open_file

FILE_SUFFIXES = (".parquet", ".jsonl", ".json", ".tar")
"""Files that are read one by one, with the number of each row."""
MEDIA_SUFFIXES = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "video": ("mp4", "mkv", "webm", "mov", "avi"),
}
"""Field to the suffixes that its member of a WebDataset's sample may have."""
MAX_JSON_BYTES = 2 * 2**30
"""A larger `.json` file, which is read whole, is refused."""
JSON_LISTS = ("data", "annotations", "questions", "qa_pairs")
"""Names under which the annotations of challenges hold their rows."""
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "testmini", "eval", "evaluation"),
}
"""Published split to the words that say so in the name of a file or a folder; digits may follow, as in `val2014`."""
ROW_KEY = "__key__"
"""Field that the reader adds: a name of the row within the dataset; in a WebDataset it is there already."""
SUBSET_KEY = "__subset__"
"""Field that the reader adds: the subset (the hub's config name) that the row is from, where there are several."""

SPLIT_KEY = "__split__"
"""Field that the reader adds: the published split that the row is from; not where `path` names files."""


@dataclass(frozen=True)
class Published:
    """A dataset as its makers publish it."""

    hub: str | None
    """Repository on the Hugging Face hub; None where there is none."""
    revision: str
    """Commit, tag or branch that is read where the params name none."""
    licence: str
    """SPDX identifier, or the name that the card gives."""
    card: str
    """URL of the page that describes the data."""
    splits: Mapping[str, str | None]
    """Ours (`train`, `eval`) to theirs; several of theirs are joined by `+`. None: this side is held out of the other,
    by a hash of the bytes of the pictures and by `eval_fraction`. A side that is not named has no examples. The option
    `eval_split` of a family, where it has one, stands in place of the one for `eval`."""
    subset: str | tuple[str, ...] | None = None
    """The hub's config name; of several, each is read in order, those of the option `subsets` if the family has it."""
    by_hand: str | None = None
    """How to get the data where no program may; raised while `path` is empty."""
    files: Mapping[str, str] | None = None
    """Patterns of files by their split, where the repository's own are not meant."""
    urls: Callable[[dict[str, Any]], list[tuple[str, str | None]]] | None = None
    """Fields of a row to the URLs that it names and, where known, the SHA-256 of what lies there."""

    @property
    def source(self) -> str:
        """For people: the repository, or the page."""
        return self.hub or self.card


@dataclass(frozen=True)
class Row:
    """One row as it was published."""

    file: str
    """As the params name it, or `hub@revision/subset/split`."""
    line: int
    """1-based: the line of a text file, the row of a table or of a stream."""
    fields: dict[str, Any]
    """Without those that are null; with `__key__`, and `__split__` and `__subset__` where they apply."""
    error: RowError | None = None
    """Why the row cannot be read; the fields are empty then."""


def rows(config: DatasetConfig, published: Published, split: str, subsets: list[str] | None = None) -> Iterator[Row]:
    """The rows of one of the published splits, in order.

    Args:
        config: where to read.
        published: what is there.
        split: theirs, several joined by `+`; means nothing where `path` names files.
        subsets: only these of `published.subset`; None is all.

    Raises:
        DataError: there is no such split or file, it is broken as a whole, or the hub cannot be reached; or `path` is a
            pattern that matches files of several published splits.
    """
    if config.path is not None and names_files(config.path):
        files = _matching(config.path)
        _refuse_mixed_splits(config.path, files, published)
        yield from _keyed((row for file in files for row in _file_rows(file, file)), "row", {})
        return
    if config.path is None and published.by_hand is not None:
        raise DataError(
            f"the data of family {config.family!r} must be fetched by hand: {published.by_hand} Then set `path` of the "
            f"dataset to them. See {published.card}"
        )
    several = isinstance(published.subset, tuple)
    chosen: Sequence[str | None] = published.subset if isinstance(published.subset, tuple) else [published.subset]
    for subset in subsets or chosen:
        for part in split.split("+"):
            read = _hub_rows if config.path is None else _snapshot_rows
            name = f"{subset}-{part}" if several else part
            added: dict[str, Any] = {SPLIT_KEY: part, **({SUBSET_KEY: subset} if several else {})}
            yield from _keyed(read(config, published, subset, part), name, added)


def names_files(path: str) -> bool:
    """Whether a `path` of the params names single files, not a folder."""
    return path.endswith(FILE_SUFFIXES) or glob.has_magic(path)


def file_names(path: str) -> list[str]:
    """All local or stored files that a `path` of the params means: one, those of a pattern, or everything below a
    folder, hidden folders such as `.git` and `.cache` left out.

    Raises:
        DataError: there are none.
    """
    if names_files(path):
        return _matching(path)
    names = [name for name in _below(path) if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    return [join(path, name) for name in names]


def _keyed(found: Iterator[Row], name: str, added: Mapping[str, Any]) -> Iterator[Row]:
    """The rows with the fields that the reader adds."""
    for number, row in enumerate(found):
        key: dict[str, Any] = {} if ROW_KEY in row.fields else {ROW_KEY: f"{name}-{number:07d}"}
        present = {field: value for field, value in row.fields.items() if value is not None}
        yield Row(row.file, row.line, {**present, **key, **added}, row.error)


def _hub_rows(config: DatasetConfig, published: Published, subset: str | None, split: str) -> Iterator[Row]:
    import datasets

    if published.hub is None:
        raise DataError(f"family {config.family!r} is on no hub; set `path` of the dataset to a copy: {published.card}")
    revision = config.revision or published.revision
    where = "/".join([f"{published.hub}@{revision}", *([subset] if subset else []), split])
    files = {"data_files": dict(published.files)} if published.files is not None else {}

    def stream() -> Any:
        found = datasets.load_dataset(
            published.hub, name=subset, split=split, revision=revision, streaming=True, **files
        )
        return found.decode(False)

    advice = (
        f"the hub was asked for {published.hub!r} at {revision!r}; without the network copy the repository "
        f"(`hf download {published.hub} --repo-type dataset --revision {revision} --local-dir FOLDER`) and set `path` "
        "of the dataset to that folder"
    )
    yield from _streamed(stream, where, advice)


def _snapshot_rows(config: DatasetConfig, published: Published, subset: str | None, split: str) -> Iterator[Row]:
    path = str(config.path)
    if published.files is not None:
        pattern = published.files.get(split)
        names = [name for name in _below(path) if pattern and fnmatch.fnmatch(name, pattern)]
        if not names:
            raise DataError(f"{path} has no file {pattern!r} for the split {split!r}; see {published.card}")
        for name in names:
            yield from _file_rows(join(path, name), join(path, name))
        return
    if is_remote(path):
        raise DataError(f"{path} is a folder in storage; name its files, such as {join(path, 'data/train-*.parquet')}")
    yield from _folder_rows(path, subset, split)


def _folder_rows(path: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of a local snapshot, which `datasets` divides into splits and files."""
    import datasets

    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path} is no folder and no file of {', '.join(FILE_SUFFIXES)}; set `path` of the dataset")
    if not (folder / "README.md").is_file() and subset is not None:  # without its card a snapshot has no subsets
        folder, subset = (folder / subset if (folder / subset).is_dir() else folder), None
    try:
        builder = datasets.load_dataset_builder(str(folder.resolve()), name=subset)
    except Exception as error:  # ValueError, FileNotFoundError, DataFilesNotFoundError, ...
        raise DataError(f"{folder}: no dataset can be read from it: {_first_line(error)}") from error
    found = {str(name): list(map(str, files)) for name, files in (builder.config.data_files or {}).items()}
    if split == "val" and "validation" in found and split not in found:
        split = "validation"  # what `datasets` calls it where no card does
    if split not in found:
        raise DataError(
            f"{folder} has no split {split!r}; it has {', '.join(sorted(found)) or 'none'}; a side that is not wanted "
            "is left out with `train_examples: 0` or `eval_examples: 0`"
        )
    if all(name.endswith(FILE_SUFFIXES) for name in found[split]):
        for name in found[split]:
            yield from _file_rows(name, join(path, os.path.relpath(name, Path(path).resolve())))
        return
    yield from _streamed(
        lambda: builder.as_streaming_dataset(split).decode(False), join(path, split), "look at its files"
    )


def _file_rows(place: str, shown: str) -> Iterator[Row]:
    """The rows of one file of `FILE_SUFFIXES`."""
    if place.endswith((".parquet", ".jsonl")):
        for row in read_rows(place):
            yield Row(shown, row.line, row.fields, row.error)
    elif place.endswith(".json"):
        for number, fields in enumerate(_json_list(place, shown)):
            bad = None if isinstance(fields, dict) else RowError("row", f"is a JSON {type(fields).__name__}")
            yield Row(shown, number + 1, fields if bad is None else {}, bad)
    else:
        yield from _tar_rows(place, shown)


def _tar_rows(place: str, shown: str) -> Iterator[Row]:
    import datasets

    def stream() -> Any:
        found = datasets.load_dataset("webdataset", data_files={"train": [place]}, split="train", streaming=True)
        return found.decode(False)

    for row in _streamed(stream, shown, "it must be a WebDataset"):
        yield Row(row.file, row.line, _sample(row.fields))


def _sample(members: dict[str, Any]) -> dict[str, Any]:
    """The fields of a WebDataset's sample: its members by their suffixes, what its `json` holds, and, where it has one
    picture or film under the suffix of a format, that one as `image` or `video`."""
    inside = members.get("json")
    fields = {**(inside if isinstance(inside, dict) else {}), **members}
    for name, suffixes in MEDIA_SUFFIXES.items():
        found = [suffix for suffix in suffixes if members.get(suffix) is not None]
        if len(found) == 1 and name not in members:
            fields[name] = members[found[0]]
    return fields


def _json_list(place: str, shown: str) -> list[Any]:
    """The rows of a JSON file, in the forms in which annotations are published: a list, an object with one of the lists
    `JSON_LISTS`, an object of rows by their names (which become `__key__`), or a single row."""
    with open_file(place, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise DataError(f"{shown} is larger than {MAX_JSON_BYTES} bytes; write it as JSONL, one row on a line")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown} is not JSON: {error}") from error
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise DataError(f"{shown} is a JSON {type(document).__name__}; it must hold rows")
    for name in JSON_LISTS:
        if isinstance(document.get(name), list):
            found: list[Any] = document[name]
            return found
    if all(isinstance(row, dict) for row in document.values()):
        return [row | {ROW_KEY: name} for name, row in document.items()]
    return [document]


def _streamed(start: Callable[[], Any], where: str, advice: str) -> Iterator[Row]:
    """The rows of a stream of `datasets`; whatever it raises becomes a `DataError` with advice."""
    number, stream = 0, None
    while True:
        try:
            stream = iter(start()) if stream is None else stream
            fields = next(stream)
        except StopIteration:
            return
        except Exception as error:  # of the hub, the network, the file system, Arrow, ...
            raise DataError(f"{where} cannot be read after row {number}: {_first_line(error)}; {advice}") from error
        number += 1
        yield Row(where, number, dict(fields))


def _matching(path: str) -> list[str]:
    """The files of a pattern, sorted; a plain path is itself.

    Raises:
        DataError: there is none, of local files.
    """
    if not glob.has_magic(path):
        if not is_remote(path) and not Path(path).is_file():
            raise DataError(f"{path} is no file; set `path` of the dataset")
        return [path]
    if is_remote(path):
        folder = _fixed_folder(path)
        found = [join(folder, name) for name in list_files(folder)]
        found = [name for name in found if fnmatch.fnmatch(name, path)]
    else:
        found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"no file is named like {path}; set `path` of the dataset")
    return found


def _refuse_mixed_splits(path: str, files: Sequence[str], published: Published) -> None:
    """A pattern over several splits would train on what was published to evaluate on. Splits that the family joins for
    one of its sides may stand together.

    Raises:
        DataError: it names the splits, each with a file.
    """
    folder = _fixed_folder(path)
    splits: dict[str, str] = {}
    for name in files:
        if split := _split_in(name[len(folder) :]):
            splits.setdefault(split, name)
    sides = [{_split_in(part) for part in side.split("+")} for side in published.splits.values() if side]
    if len(splits) > 1 and not any(set(splits) <= side for side in sides):
        listed = ", ".join(f"{split} ({name})" for split, name in sorted(splits.items()))
        raise DataError(
            f"{path} matches files of {len(splits)} published splits: {listed}. Files have no split of their own, so "
            "evaluation would be trained on; set `path` of the dataset to the files of one split, as `train-*` does, "
            "or to the folder, whose splits are kept apart"
        )


def _split_in(name: str) -> str | None:
    """The published split that a file's name says, or else the nearest folder's; the first of several words counts."""
    for part in reversed(PurePosixPath(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            for split, words in SPLIT_WORDS.items():
                if word in words:
                    return split
    return None


def _fixed_folder(path: str) -> str:
    """The folder in front of a pattern's first wildcard."""
    return re.split(r"[*?\[]", path)[0].rpartition("/")[0]


def _below(path: str) -> list[str]:
    """Names of all files below a folder, sorted."""
    if not is_remote(path) and not Path(path).is_dir():
        raise DataError(f"{path} is no folder and no file of {', '.join(FILE_SUFFIXES)}; set `path` of the dataset")
    return list_files(path)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
