"""Families of published datasets: from one description and one small function to a `Family`.

A family of a published set is a `Published` (where it is, which licence, which splits) and a `convert` function from
the fields of a row, as the card describes them, to an example. Everything else is here: reading (`published_rows`),
pictures and films with their bounds, rows that belong together (`row_groups`), bad rows, unique ids, splits.

    FAMILY = family(PUBLISHED, convert, options=Options)

    def convert(fields, files, options):
        picture = files.image(fields["image"], "image")
        return Example(str(fields["id"]), (picture,), (Conversation("my_style", (...)),))
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from molmo_model.artifacts import digest_of
from molmo_model.config import DatasetConfig, lookup
from molmo_model.data.datasets.chat_images import MAX_FILE_BYTES, ImageSource, local_digest
from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.data.datasets.chat_videos import VideoSource
from molmo_model.data.datasets.family import Family
from molmo_model.data.datasets.options import parse_options
from molmo_model.data.datasets.published_rows import (
    ROW_KEY,
    SPLIT_KEY,
    SUBSET_KEY,
    Published,
    Row,
    file_names,
    names_files,
    rows,
)
from molmo_model.data.datasets.row_groups import grouped
from molmo_model.data.datasets.sides import content_digest, drawn_side
from molmo_model.data.downloads import Survivors, is_url
from molmo_model.data.example import BadRow, Example, ExampleError, Image, Video
from molmo_model.errors import DataError, StorageError
from molmo_model.storage import is_remote, join, list_files, open_file

__all__ = [
    "ROW_KEY",
    "SPLIT_KEY",
    "SUBSET_KEY",
    "Files",
    "NoOptions",
    "Published",
    "Row",
    "RowError",
    "each",
    "family",
    "rows",
]

Fields = dict[str, Any]
Convert = Callable[[Any, "Files", Any], "Example | Sequence[Example]"]
"""(fields, files, options) to one example or several; with `group`, a list of fields in place of fields."""
Made = TypeVar("Made")


@dataclass
class NoOptions:
    """A family without options."""


class Files:
    """The pictures and films that rows hold, name or link to, each checked and decoded once before it is an example's.

    Names are paths below `image_root`, by default the snapshot's folder; nothing outside of it is read.
    """

    def __init__(self, config: DatasetConfig, published: Published) -> None:
        self._config, self._published = config, published
        path = config.path
        below = path if path is not None and not names_files(path) else None
        self._has_root = bool(config.image_root or path)
        self._images = ImageSource(config, root=config.image_root or below or ("." if path is None else None))
        self._videos = VideoSource(self._images)

    def image(self, value: Any, field: str) -> Image:
        """The picture of a field.

        Args:
            value: `{"bytes", "path"}` as `datasets` gives it, bytes, a path below the root, or an http(s) URL, which
                is looked up in the list of downloads.
            field: the name of the field, for errors.

        Raises:
            RowError: it is missing, no picture, broken or too large; `known` where the list of downloads says so.
            DataError: there is no list of downloads, or no folder that paths start from.
        """
        return self._images.load(self._found(value, field), field)

    def video(self, value: Any, field: str, clip: tuple[float, float | None] | None = None) -> Video:
        """The film of a field, given as `image` takes pictures, or its part from one second to another.

        Raises:
            RowError, DataError: as `image`.
        """
        seconds = {} if clip is None else {"clip_start": clip[0], "clip_end": clip[1]}
        times = {name: second for name, second in seconds.items() if second is not None}
        return self._videos.load(self._found(value, field), field, times)

    def _found(self, value: Any, field: str) -> Any:
        """What `ImageSource` reads: bytes, the path of a file, or a URL of the list of downloads."""
        if value is None:
            raise RowError(field, "is missing")
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return value["bytes"]
            value = value.get("path")
        if is_url(value):
            if self._config.downloads is None:
                raise DataError(
                    f"family {self._config.family!r} names its pictures by URL: run `python -m pipelines.download "
                    "dataset=NAME` with the dataset's name and set `datasets.NAME.downloads` to the list that it writes"
                )
            return value
        if isinstance(value, str) and self._config.path is None and value.startswith("hf://"):
            return self._from_hub(value, field)
        if isinstance(value, str) and not self._has_root:
            raise DataError(
                f"family {self._config.family!r} names its files by path, such as {value!r}; set `image_root` of the "
                f"dataset to the folder that holds them. See {self._published.card}"
            )
        return value

    def _from_hub(self, url: str, field: str) -> bytes:
        """A file of the dataset's own repository."""
        own = f"hf://datasets/{self._published.hub}@"
        if not url.startswith(own) or ".." in url:
            raise RowError(field, f"{url!r} is no file of {self._published.hub}")
        try:
            with open_file(url, "rb") as file:
                data: bytes = file.read(MAX_FILE_BYTES + 1)
        except StorageError as error:
            raise RowError(field, f"{url!r} cannot be read") from error
        if len(data) > MAX_FILE_BYTES:
            raise RowError(field, f"{url!r} is larger than {MAX_FILE_BYTES} bytes")
        return data


def family(
    published: Published,
    convert: Convert,
    options: type[Any] = NoOptions,
    group: Callable[[Fields], Hashable] | None = None,
) -> Family:
    """A family of a published dataset.

    Args:
        published: where it is.
        convert: (fields, files, options) to an example or several; raises `RowError`. `fields["__key__"]` names the row
            where the data have no id of their own. An id that another example has already gets `~2`, `~3`, ...
        options: dataclass of the family's options. A field `subsets` of it, a list, chooses among
            `published.subset`; a field `eval_split` names the published split to evaluate on.
        group: fields to a key; `convert` then takes the list of the fields of all rows of one key, wherever they stand
            in a split. What is wrong with one of them alone is a `RowError` with its number in `rows`, see `each`: the
            row is told and the others are converted without it.
    """

    def make(config: DatasetConfig, seed: int) -> Iterator[tuple[str, Example | BadRow]]:
        chosen = parse_options(options, config)
        yield from _make(config, published, convert, chosen, group)

    def urls(config: DatasetConfig) -> Iterator[tuple[str, str | None]]:
        find, chosen = published.urls, parse_options(options, config)
        for _, split in _sources(config, published, chosen):
            for row in rows(config, published, split, _subsets(published, chosen)):
                yield from find(row.fields) if find is not None and row.error is None else ()

    def fingerprint(config: DatasetConfig, seed: int) -> dict[str, str]:
        return _fingerprint(config, published, _subsets(published, parse_options(options, config)))

    return Family(
        make=make,
        fingerprint=fingerprint,
        options=options,
        licence=published.licence,
        source=published.source,
        revision=published.revision,
        card=published.card,
        urls=None if published.urls is None else urls,
    )


def each(rows: Sequence[Fields], make: Callable[[Fields], Made]) -> list[Made]:
    """`make` of every row of a group; what it raises tells which row it was.

    Raises:
        RowError: of the first bad row, with its number.
    """
    made = []
    for number, fields in enumerate(rows):
        try:
            made.append(make(fields))
        except RowError as error:
            raise RowError(error.field, error.reason, error.known, rows=(number,)) from error
    return made


def _make(
    config: DatasetConfig, published: Published, convert: Convert, options: Any, group: Any
) -> Iterator[tuple[str, Example | BadRow]]:
    files, names = Files(config, published), _Names()
    room = {"train": config.train_examples, "eval": config.eval_examples}
    for side, split in _sources(config, published, options):
        sides = [side] if side is not None else ["train", "eval"]
        if all(room[one] == 0 for one in sides):
            continue
        found = rows(config, published, split, _subsets(published, options))
        bunches = grouped(found, group) if group is not None else ([row] for row in found)
        for bunch in bunches:
            for made in _converted(bunch, convert, files, options, group is not None):
                if isinstance(made, BadRow):
                    yield side or "train", made
                    continue
                chosen = side or _drawn(made, config)
                if (left := room[chosen]) is None or left > 0:
                    room[chosen] = None if left is None else left - 1
                    yield chosen, names.unique(made)
            if all(room[one] == 0 for one in sides):
                break


def _sources(config: DatasetConfig, published: Published, options: Any) -> list[tuple[str | None, str]]:
    """(our side, their splits) in the order in which they are read; None is divided by a hash of the pictures."""
    sides = dict(published.splits)
    if "eval" in sides and (chosen := getattr(options, "eval_split", None)):
        sides["eval"] = chosen
    if config.path is not None and names_files(config.path):  # files have no split; those of a set with one side have
        return [(next(iter(sides)) if len(sides) == 1 else None, "")]
    if None in sides.values():
        return [(None, split) for split in sides.values() if split is not None]
    return [(side, split) for side, split in sides.items() if split is not None]


def _subsets(published: Published, options: Any) -> list[str] | None:
    """The subsets that the options choose, in the order of the description; None is all."""
    chosen = getattr(options, "subsets", None)
    if not chosen or not isinstance(published.subset, tuple):
        return None
    known = dict.fromkeys(published.subset, True)
    for name in chosen:
        lookup(known, name, "subset")
    return [name for name in published.subset if name in chosen]


def _converted(
    bunch: list[Row], convert: Convert, files: Files, options: Any, is_group: bool
) -> Iterator[Example | BadRow]:
    """The examples of one row or of one group; bad rows of a group first."""
    while bunch:
        try:
            if (bad := bunch[0].error) is not None:
                raise bad
            made = convert([row.fields for row in bunch] if is_group else bunch[0].fields, files, options)
        except (RowError, ExampleError) as error:
            wrong = error.rows if isinstance(error, RowError) else ()
            if isinstance(error, ExampleError) and len(bunch) > 1:
                wrong, error = _alone(bunch, convert, files, options) or (wrong, error)
            more = f" (and {len(bunch) - 1} more rows of its group)" if not wrong and len(bunch) > 1 else ""
            known = isinstance(error, RowError) and error.known
            row = bunch[wrong[0] if wrong else 0]
            name = str(row.fields.get(ROW_KEY)) if row.error is None else None
            yield BadRow(row.file, row.line, name, error.field, error.reason + more, known)
            if not wrong:
                return
            bunch = [row for number, row in enumerate(bunch) if number not in wrong]
            continue
        yield from [made] if isinstance(made, Example) else made
        return


def _alone(
    bunch: list[Row], convert: Convert, files: Files, options: Any
) -> tuple[tuple[int], ExampleError | RowError] | None:
    """The number of the first row of a group that no example can be made of by itself, and why; None if there is none:
    then the rows do not go together."""
    for number, row in enumerate(bunch):
        try:
            convert([row.fields], files, options)
        except ExampleError as error:
            return (number,), error
        except RowError:
            continue  # it needs another row of the group
    return None


def _drawn(example: Example, config: DatasetConfig) -> str:
    """The side of an example of a set without sides.

    Raises:
        DataError: it has several pictures, which other examples may share.
    """
    if len(example.files) > 1:
        raise DataError(
            f"example {example.id!r} has {len(example.files)} pictures; a set of such examples cannot be divided by "
            "its pictures while it is read: name a split of its own for each side"
        )
    return drawn_side(content_digest(example), config.eval_fraction)


class _Names:
    """Ids that are taken."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._times: dict[str, int] = {}

    def unique(self, example: Example) -> Example:
        """The example, with a number behind its id where another has it already."""
        name = example.id
        while name in self._taken:
            self._times[example.id] = self._times.get(example.id, 1) + 1
            name = f"{example.id}~{self._times[example.id]}"
        self._taken.add(name)
        return example if name == example.id else replace(example, id=name)


def _fingerprint(config: DatasetConfig, published: Published, subsets: list[str] | None) -> dict[str, str]:
    """What is read: the hub's revision, or the names and contents of all local files, of `image_root` and of the list
    of downloads too."""
    found: dict[str, str] = {}
    if config.path is None:
        if published.hub is not None:
            chosen = subsets or ([published.subset] if isinstance(published.subset, str) else published.subset)
            what = f" ({', '.join(chosen)})" if chosen else ""
            found["hub"] = f"{published.hub}@{config.revision or published.revision}{what}"
    else:
        found[config.path] = digest_of({name: _file_digest(name) for name in file_names(config.path)})
    if config.image_root:
        names = list_files(config.image_root)
        found[config.image_root] = digest_of({name: _file_digest(join(config.image_root, name)) for name in names})
    if config.downloads:
        found[config.downloads] = Survivors(config.downloads).digest()
    return found


def _file_digest(name: str) -> str:
    """SHA-256 of a local or stored file."""
    if not is_remote(name):
        return local_digest(Path(name))
    digest = hashlib.sha256()
    with open_file(name, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
