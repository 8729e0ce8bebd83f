"""Your own data with no code: the rows of a JSONL or Parquet file become examples.

Two forms are read, `docs/guides/own_data.md` shows an example of each:

- messages, as transformers' processors take them: `{"id", "images": [...], "messages": [{"role", "content"}]}`
- LLaVA: `{"id", "image": "...", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}`

A row may have films in place of images: `videos` or `video`, entries `"film.mp4"` or `{"path", "clip_start",
"clip_end"}` in seconds; beside a single film the clip may stand in the row itself. Their place in messages is `{"type":
"video"}`, in LLaVA's text `<video>`.

The last question may have `options` to choose from, its answer `alternatives` and an `explanation` (`chat_texts`).

One row is one example with one conversation. What is wrong with a row becomes a `BadRow` with file, line, id, field and
reason; nothing is guessed and nothing is left out silently.

Images and films, not rows, are divided between training and evaluation: by a hash of their bytes, so rows that share an
image, directly or through other rows, always stand on the same side, and so do all clips of one film.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from molmo_model.artifacts import digest_of
from molmo_model.config import DatasetConfig
from molmo_model.data.datasets.chat_images import ImageSource
from molmo_model.data.datasets.chat_rows import Line, RawRow, RowError, read_lines, read_rows
from molmo_model.data.datasets.chat_texts import ANSWER_FIELDS, PARTS, PLACEHOLDERS, last_turns, row_text
from molmo_model.data.datasets.chat_videos import CLIP_FIELDS, VideoSource, split_clip
from molmo_model.data.datasets.options import parse_options
from molmo_model.data.datasets.sides import Sides, content_digest, drawn_side
from molmo_model.data.downloads import Survivors, is_url
from molmo_model.data.example import (
    SPLITS,
    BadRow,
    Conversation,
    Example,
    ExampleError,
    Image,
    Message,
    Unchanged,
    is_number,
    plain_problem,
)
from molmo_model.data.row_memory import Outcome, RowMemory
from molmo_model.errors import ConfigError, DataError
from molmo_model.source_digest import source_digest
from molmo_model.storage import open_file

POINT_UNITS = ("percent", "pixel")
MAX_ID_LETTERS = 256
STYLE = re.compile(r"[\w.:-]{1,64}")
STYLE_RULE = "it must be a name of 1 to 64 letters, digits and _ . : -"
FIELDS = (
    "id",
    "images",
    "image",
    "videos",
    "video",
    "clip_start",
    "clip_end",
    "messages",
    "conversations",
    "points",
    "points_unit",
    "label",
    *ANSWER_FIELDS,
    "weight",
    "style",
    "metadata",
    "split",
)
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass
class Options:
    """What rows that do not say it themselves have."""

    style: str = "chat"
    """The conversation's style; mixtures and tasks select by it."""
    points_unit: str = "percent"
    """Unit of `points`: `percent` of the image's width and height, or `pixel`."""

    def __post_init__(self) -> None:
        if self.points_unit not in POINT_UNITS:
            raise ConfigError(f"dataset option points_unit is {self.points_unit!r}; known: {', '.join(POINT_UNITS)}")
        if not STYLE.fullmatch(self.style):
            raise ConfigError(f"dataset option style is {self.style!r}; {STYLE_RULE}")


def make(config: DatasetConfig, seed: int) -> Iterator[tuple[str, Example | BadRow]]:
    """(split, example or bad row) for every row of the file, in its order.

    Raises:
        ConfigError: no `path`, a wrong suffix, or unknown options.
        DataError: the file holds no rows, or is broken as a whole.
        StorageError: the file cannot be opened.
    """
    for split, row in remake(config, seed, RowMemory(None, "")):
        if not isinstance(row, Unchanged):  # nothing is where nothing is remembered
            yield split, row


def remake(config: DatasetConfig, seed: int, memory: RowMemory) -> Iterator[tuple[str, Example | BadRow | Unchanged]]:
    """As `make`, but rows that are known and whose examples the previous artefact holds are not read again."""
    options = parse_options(Options, config)
    path, images = _path(config), ImageSource(config)
    videos = VideoSource(images)
    sides = Sides(config.eval_fraction)
    rows = 0
    for line in read_lines(path):
        _learn(sides, line, images, memory)
        rows += 1
    if not rows:
        raise DataError(f"{path} holds no rows")
    limits = {"train": config.train_examples, "eval": config.eval_examples}
    room = {split: math.inf if limit is None else limit for split, limit in limits.items()}
    lines: dict[str, int] = {}
    for line in read_lines(path):
        place, known = _recall(line, images, memory)
        name = None if known is None else known.id
        example: Example | Unchanged | None = None
        try:
            if known is None:
                row = line.parse()
                name = _readable_id(row)
                example = _made(row, images, videos, options)
                known = Outcome(example.id, len(example.files), row.fields.get("split"), content_digest(example))
            if known.id in lines:
                raise RowError("id", f"stands in line {lines[known.id]} already; ids must be unique")
            split = _side(sides, known)
            if example is None and room[split] > 0:
                example = memory.unchanged(known) or _made(line.parse(), images, videos, options)
        except (RowError, ExampleError) as error:
            is_known = isinstance(error, RowError) and error.known
            yield "train", BadRow(path, line.number, name, error.field, error.reason, is_known)
            continue
        lines[known.id] = line.number
        if isinstance(example, Example):
            _remember(memory, line, example, known, images, room[split] > 0)
        elif place is not None:
            memory.keep(place)
        if example is not None and room[split] > 0:
            room[split] -= 1
            yield split, example


def fingerprint(config: DatasetConfig, seed: int) -> dict[str, str]:
    """Digests of the file and of all images that it names."""
    path, images, rows = _path(config), ImageSource(config), memory(config)
    digest = hashlib.sha256()
    with open_file(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    names: dict[str, None] = {}
    for line in read_lines(path):
        place = rows.find(line.sha256)
        names.update(dict.fromkeys(_names(line.parse(), images) if place is None else rows.names(place)))
    # the file's own digest says which names these are
    found = {path: digest.hexdigest(), f"{path} images": digest_of([images.digest(name) for name in names])}
    return found if config.downloads is None else found | {config.downloads: Survivors(config.downloads).digest()}


def memory(config: DatasetConfig) -> RowMemory:
    """What is remembered of the rows of a file, as this code and these options read them."""
    path, images = _path(config), ImageSource(config)
    code = [source_digest(module, parents=False) for module in (__name__, "molmo_model.data.shards")]
    decoders = [version("pillow"), version("av")]
    options = [config.options, config.max_image_pixels, config.downloads]
    return RowMemory.of(path, [code, decoders, options, images.root])


def _recall(line: Line, images: ImageSource, memory: RowMemory) -> tuple[int | None, Outcome | None]:
    """The place of a row in the memory, and what it became, if neither its text nor its files have changed."""
    place = memory.find(line.sha256)
    if place is None:
        return None, None
    return place, memory.recall(place, [images.digest(name) for name in memory.names(place)])


def _remember(
    memory: RowMemory, line: Line, example: Example, known: Outcome, images: ImageSource, written: bool
) -> None:
    """Remembers what a row became, unless a file of it changed while it was read."""
    if memory.path is None or line.sha256 is None:
        return
    names = _names(line.parse(), images)
    digests = [images.digest(name) for name in names]
    if {file.sha256 for file in example.files}.issuperset(digests):
        memory.learn(line.sha256, names, digests, known, written)


def _names(row: RawRow, images: ImageSource) -> list[str]:
    """The files that a row names, in order."""
    return [name for item in _file_items(row.fields) if (name := images.name(item))]


def _made(row: RawRow, images: ImageSource, videos: VideoSource, options: Options) -> Example:
    """The example of a row; raises what is wrong with it."""
    if row.error is not None:
        raise row.error
    return _example(row.fields, images, videos, options)


def urls(config: DatasetConfig) -> Iterator[tuple[str, str | None]]:
    """The images and films that rows name by URL, in order, for `python -m pipelines.download`; nothing is said of
    their content."""
    path, images = _path(config), ImageSource(config)
    for row in read_rows(path):
        for item in _file_items(row.fields):
            if (name := images.name(item)) is not None and is_url(name):
                yield name, None


def _learn(sides: Sides, line: Line, images: ImageSource, memory: RowMemory) -> None:
    """Takes in what a row says of the sides of its images. Most rows, with one image and no `split`, say nothing; only
    the others are read here, a first time."""
    place = memory.find(line.sha256)
    if place is not None and not memory.joins(place):
        return
    if place is not None:
        digests = [images.digest(name) for name in memory.names(place)]
        known = memory.recall(place, digests)
        if known is not None and known.files == len(digests):
            sides.join(digests, known.asked)
            return
    row = line.parse()
    items, asked = _file_items(row.fields), row.fields.get("split")
    if len(items) < 2 and asked is None:
        return
    try:
        digests = [hashlib.sha256(images.read(item, "")).hexdigest() for item in items]
    except RowError:
        return  # a bad row, told when it is made
    sides.join(digests, asked if asked in SPLITS else None)


def _side(sides: Sides, row: Outcome) -> str:
    """The side of an example.

    Raises:
        RowError: the row asks for another side than the one that its images are on already.
    """
    if not row.files:
        return row.asked or drawn_side(row.content, sides.eval_fraction)
    side = sides.side(row.content)
    if row.asked is not None and row.asked != side:
        raise RowError("split", f"is {row.asked!r}, but another row put an image of this one into {side!r}")
    return side


def _path(config: DatasetConfig) -> str:
    if not config.path:
        raise ConfigError(f"a dataset of family {config.family!r} needs `path`, a .jsonl or .parquet file")
    return config.path


def _readable_id(row: RawRow) -> str | None:
    name = row.fields.get("id")
    return str(name)[:MAX_ID_LETTERS].encode("utf-8", "replace").decode() if isinstance(name, str | int) else None


def _image_items(fields: dict[str, Any]) -> list[Any]:
    """The entries of `images`, or the one of `image`; nothing where they are not well formed."""
    items = fields.get("images", [])
    if "image" in fields:
        return [fields["image"]]
    return items if isinstance(items, list) else []


def _video_items(fields: dict[str, Any]) -> list[Any]:
    """The entries of `videos`, or the one of `video`; nothing where they are not well formed."""
    items = fields.get("videos", [])
    if "video" in fields:
        return [fields["video"]]
    return items if isinstance(items, list) else []


def _file_items(fields: dict[str, Any]) -> list[Any]:
    """Images and films as images are written: without the clips."""
    return [*_image_items(fields), *(split_clip(item)[0] for item in _video_items(fields))]


def _example(fields: dict[str, Any], images: ImageSource, videos: VideoSource, options: Options) -> Example:
    """The example of one row.

    Raises:
        RowError: naming the field, for whatever is wrong with the row itself.
        ExampleError: for what no example may be.
    """
    _check_fields(fields)
    name = _id(fields)
    items, films = _image_items(fields), _video_items(fields)
    messages, places = _messages(fields)
    for kind, count, found in zip(PARTS, places or (), (len(items), len(films)), strict=places is not None):
        if count != found:
            field = "messages" if "messages" in fields else "conversations"
            raise RowError(field, f"has {count} places for {found} {kind}s")
    pictures = tuple(
        images.load(item, "image" if "image" in fields else f"images[{i}]") for i, item in enumerate(items)
    )
    clip = {name: fields[name] for name in CLIP_FIELDS if name in fields}
    clips = tuple(
        videos.load(item, "video" if "video" in fields else f"videos[{i}]", clip) for i, item in enumerate(films)
    )
    if "points" in fields:
        messages = [*messages, _point_answer(fields, messages, pictures, options)]
    elif "label" in fields or "points_unit" in fields:
        raise RowError("label" if "label" in fields else "points_unit", "stands without `points`")
    _check_turns(messages, "messages" if "messages" in fields else "conversations")
    style = _typed(fields, "style", str, options.style)
    messages[-2:] = last_turns(fields, messages[-2], messages[-1], style)
    metadata = _metadata(fields)
    weight = fields.get("weight", 1.0)
    if not is_number(weight) or weight <= 0:
        raise RowError("weight", f"is {weight!r}; it must be a finite number above 0")
    if not STYLE.fullmatch(style):
        raise RowError("style", f"is {style!r}; {STYLE_RULE}")
    conversation = Conversation(style, tuple(messages), float(weight), metadata)
    return Example(name, pictures, (conversation,), videos=clips)


def _check_fields(fields: dict[str, Any]) -> None:
    """What a row may have, by name."""
    for name in fields:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RowError(name, f"is no field of a row; {hint}what else you know of it goes into `metadata`")
    for one, other in (("images", "image"), ("videos", "video"), ("messages", "conversations")):
        if one in fields and other in fields:
            raise RowError(other, f"stands beside `{one}`; give one of them")
    for name in ("images", "videos"):
        if name in fields and not isinstance(fields[name], list):
            raise RowError(name, f"is a {type(fields[name]).__name__}; it must be a list")
    films, images = len(_video_items(fields)), len(_image_items(fields))
    if films and images:
        raise RowError("video" if "video" in fields else "videos", "stand beside images; a row has one or the other")
    for name in CLIP_FIELDS:
        if name in fields and films != 1:
            raise RowError(name, f"needs exactly one video; the row has {films}, write it into the entries of `videos`")
    if fields.get("split") not in (None, *SPLITS):
        raise RowError("split", f"is {fields['split']!r}; known: {', '.join(SPLITS)}")


def _id(fields: dict[str, Any]) -> str:
    name = fields.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if name is None or (isinstance(name, str) and not name.strip()):
        raise RowError("id", "is missing or empty")
    if not isinstance(name, str):
        raise RowError("id", f"is {name!r}; it must be text or a number")
    if len(name) > MAX_ID_LETTERS or not name.isprintable():
        raise RowError("id", f"must be printable and at most {MAX_ID_LETTERS} letters long")
    return name


def _messages(fields: dict[str, Any]) -> tuple[list[Message], tuple[int, ...] | None]:
    """The turns of a row, and how many places for images and for films they have; None where none is needed."""
    if "messages" in fields:
        return _chat_messages(_typed(fields, "messages", list, []))
    if "conversations" in fields:
        return _llava_messages(_typed(fields, "conversations", list, []))
    raise RowError("messages", "is missing")


def _chat_messages(turns: list[Any]) -> tuple[list[Message], tuple[int, ...] | None]:
    messages, places, has_parts = [], [0, 0], False
    for i, turn in enumerate(turns):
        where = f"messages[{i}]"
        _check_keys(turn, ("role", "content"), where)
        role, content = turn.get("role"), turn.get("content")
        if isinstance(content, list):
            has_parts = True
            text, counts = _join_parts(content, f"{where}.content")
        else:
            text, counts = content, [0, 0]
        for kind, count in zip(PARTS, counts, strict=True):
            if count and i:
                article = "an" if kind == "image" else "a"
                raise RowError(
                    f"{where}.content",
                    f"has {article} {kind}; {kind}s stand in the first message, where Molmo sees them",
                )
        messages.append(_message(role, text, where, "role", "content"))
        places = [sum(pair) for pair in zip(places, counts, strict=True)]
    return messages, tuple(places) if has_parts else None


def _join_parts(parts: list[Any], where: str) -> tuple[str, list[int]]:
    """The text of a list of parts, and how many of them are images and films."""
    texts, counts = [], [0, 0]
    for i, part in enumerate(parts):
        _check_keys(part, ("type", "text"), f"{where}[{i}]")
        kind, text = part.get("type"), part.get("text")
        if kind in PARTS and text is None:
            counts[PARTS.index(kind)] += 1
        elif kind == "text" and isinstance(text, str):
            texts.append(text.strip())
        else:
            raise RowError(
                f"{where}[{i}]", 'is neither {"type": "image"}, {"type": "video"} nor {"type": "text", "text": "..."}'
            )
    return " ".join(text for text in texts if text), counts


def _llava_messages(turns: list[Any]) -> tuple[list[Message], tuple[int, ...]]:
    messages, places = [], [0, 0]
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        _check_keys(turn, ("from", "value"), where)
        value = turn.get("value")
        text = value
        for number, (kind, placeholder) in enumerate(zip(PARTS, PLACEHOLDERS, strict=True)):
            count = text.count(placeholder) if isinstance(text, str) else 0
            if count and i:
                raise RowError(
                    f"{where}.value", f"has {placeholder}; {kind}s stand in the first turn, where Molmo sees them"
                )
            text = text.replace(placeholder, "") if count else text
            places[number] += count
        speaker = turn.get("from")
        role = LLAVA_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        messages.append(_message(role, text, where, "from", "value"))
    return messages, tuple(places)


def _message(role: Any, text: Any, where: str, role_field: str, text_field: str) -> Message:
    if role not in ("user", "assistant"):
        hint = "; put what it says into the first question" if role == "system" else ""
        raise RowError(f"{where}.{role_field}", f"is {role!r}, not the user or the assistant{hint}")
    return Message(role, row_text(text, f"{where}.{text_field}"))


def _check_keys(value: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise RowError(where, f"is a {type(value).__name__}; it must have {' and '.join(names)}")
    for name in value:
        if name not in names and value[name] is not None:
            named = name in ("image", "image_url", "video", "url", "path")
            hint = "; name the image in the row's `images`, a film in its `videos`" if named else ""
            raise RowError(f"{where}.{name}", f"is an unknown field; known: {', '.join(names)}{hint}")


def _point_answer(
    fields: dict[str, Any], messages: list[Message], pictures: tuple[Image, ...], options: Options
) -> Message:
    """The assistant's last turn of a row with `points`, in percent."""
    if len(pictures) != 1:
        raise RowError("points", f"needs exactly one image to point at; the row has {len(pictures)}")
    if messages and messages[-1].role == "assistant":
        raise RowError("points", "are the last answer, so the messages must end with the user's turn")
    label = _typed(fields, "label", str, "")
    if not label.strip():
        raise RowError("label", "is missing; points need a label that says what they point at")
    unit = fields.get("points_unit", options.points_unit)
    if unit not in POINT_UNITS:
        raise RowError("points_unit", f"is {unit!r}; known: {', '.join(POINT_UNITS)}")
    picture = pictures[0]
    limits = (100.0, 100.0) if unit == "percent" else (float(picture.width), float(picture.height))
    points = []
    for i, point in enumerate(_typed(fields, "points", list, [])):
        if not isinstance(point, list) or len(point) != 2 or not all(is_number(value) for value in point):
            raise RowError(f"points[{i}]", f"is {point!r}; it must be [x, y], two finite numbers")
        if not all(0 <= value <= limit for value, limit in zip(point, limits, strict=True)):
            size = f"{picture.width} x {picture.height} pixels" if unit == "pixel" else "0 to 100 percent"
            raise RowError(f"points[{i}]", f"is {point}, outside the image of {size}")
        points.append((100.0 * point[0] / limits[0], 100.0 * point[1] / limits[1]))
    return Message("assistant", points=tuple(points), label=label.strip())


def _check_turns(messages: list[Message], field: str) -> None:
    for i, message in enumerate(messages):
        if message.role != ("user", "assistant")[i % 2]:
            raise RowError(
                f"{field}[{i}]", f"is the {message.role}'s turn; user and assistant alternate, the user first"
            )
    if not messages or len(messages) % 2:
        raise RowError(field, "must end with the assistant's answer; there is none to learn")


def _metadata(fields: dict[str, Any]) -> dict[str, Any]:
    metadata = _typed(fields, "metadata", dict, {})
    if problem := plain_problem(metadata, "metadata"):
        raise RowError(*problem)
    return metadata


def _typed(fields: dict[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    value = fields.get(name, default)
    if not isinstance(value, kind):
        raise RowError(name, f"is a {type(value).__name__}; it must be a {kind.__name__}")
    return value
