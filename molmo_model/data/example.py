"""The one form that every dataset becomes: images or films, and conversations about them.

A family in `molmo_model.data.datasets` makes `Example`s, the shards keep them, the preprocessor turns them into tokens.
An `Example` that exists is valid: its constructor refuses what the rest of the house cannot use, naming id and field.
Shards hold facts: no tokens, no mixture weight, no prompt where a style's template will do.

Several conversations of one example form a message tree: they share the image tokens and do not see each other. An
evaluation item is one conversation; its id is `item_id(example, number)`.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from molmo_model.artifacts import canonical_json
from molmo_model.data.timeline import Timeline
from molmo_model.errors import DataError

ROLES = ("user", "assistant")
SPLITS = ("train", "eval")
_TEXTS = ("alternatives", "options")
"""Fields of a message that are lists of texts; written only where they are not empty."""
_PLAIN = ("role", "text", "points", "label")
"""Fields that a message's JSON always has."""
_OPTIONAL = (*_TEXTS, "explanation", "inline")
"""Fields of a message's JSON that are there only where they say something."""

POINT_MARK = "<|POINT|>"
"""Where inline points stand in an answer's text."""

MAX_OPTIONS = 26
"""Choices of one question: they are lettered from A to Z."""
UNLABELLED_STYLES = frozenset({"ai2_diagram_no_letter"})
"""Styles whose choices are written without letters, and whose answer is the choice itself: in AI2D they are letters
that stand in the diagram."""

PRIVATE = "private_label"
"""Key of a conversation's metadata: true where the makers of a test set keep the right answer to themselves. The last
turn is then a placeholder, that no metric is given and nobody may learn."""

Point = tuple[float, float]
"""x from the left and y from the top, in percent of the image's width and height."""


class ExampleError(DataError):
    """What is wrong with an example, in parts."""

    def __init__(self, id: Any, field: str, reason: str) -> None:
        super().__init__(f"example {id!r}: {field} {reason}")
        self.id, self.field, self.reason = id, field, reason


@dataclass(frozen=True)
class Image:
    """One still picture, as its original encoded file."""

    data: bytes
    """The file's bytes, never re-encoded."""
    width: int
    """Pixels, after the rotation that the file's EXIF asks for."""
    height: int
    format: str
    """Encoding in capitals, such as `PNG` or `JPEG`."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Video:
    """One film, or a part of it, as its original encoded file; `video_file.probe_video` makes one from the bytes."""

    data: bytes
    """The file's bytes, never re-encoded."""
    width: int
    """Pixels, after the rotation that the file asks for."""
    height: int
    format: str
    """Container in capitals, such as `MP4`."""
    timeline: Timeline
    """When its frames are shown."""
    clip: tuple[float, float] | None = None
    """First and last second, on the container's clock, of the part that is meant; None is the whole film."""

    @property
    def frames(self) -> int:
        """Frames of the whole film."""
        return self.timeline.frames

    @property
    def duration(self) -> float:
        """Seconds of the whole film."""
        return float(self.timeline.end - self.timeline.begin)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256 of the part that is meant: two clips of one film differ."""
        if self.clip is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.clip[0]!r} {self.clip[1]!r}".encode()).hexdigest()


@dataclass(frozen=True)
class InlinePoints:
    """Points inside an answer's text, at one `POINT_MARK`: a tag in the middle of a sentence."""

    points: tuple[Point, ...]
    """At least one."""
    text: str
    """What the tag shows, as the sentence reads without it."""
    label: str
    """What is pointed at."""


@dataclass(frozen=True)
class Message:
    """One turn. A user's turn is text or, with text None, a prompt drawn from the style's templates. An assistant's
    turn is either text or points. What has several wordings (answers of equal votes, transcripts, paraphrases) stands
    as `text` and `alternatives`: training draws one of them, evaluation takes `text`."""

    role: str
    """`user` or `assistant`."""
    text: str | None = None
    points: tuple[Point, ...] | None = None
    """The answer as points, rendered to text by the preprocessor; the empty tuple says that there are none."""
    label: str | None = None
    """What is pointed at; fills the place of the label in a prompt template and in the points' text."""
    alternatives: tuple[str, ...] = ()
    """Texts that could stand in place of `text`, each as good."""
    options: tuple[str, ...] = ()
    """Choices that a user's question offers, in order; `prompts` writes them behind the question as `A: ...`. The
    assistant's text is then the letter of the right one; in one of the `UNLABELLED_STYLES` the choices have no letters,
    differ, and it is the choice itself."""
    explanation: str | None = None
    """Reasoning in front of an assistant's text, which is then the short answer."""
    inline: tuple[InlinePoints, ...] = ()
    """Points inside an assistant's text, one for each `POINT_MARK` in it, in order."""


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, alternating, that begin with the user and end with the assistant."""

    style: str
    """The task family, such as `chart_qa`; mixtures and tasks select by it, and prompts depend on it."""
    messages: tuple[Message, ...]
    weight: float = 1.0
    """Factor on the loss of the conversation's answered tokens."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that scoring needs: answers, regions, units."""


@dataclass(frozen=True)
class Example:
    """Images, or films, and what is said about them.

    Raises:
        DataError: naming the id and the field, for whatever is empty, of a wrong type or contradictory.
    """

    id: str
    """Unique within its dataset."""
    images: tuple[Image, ...]
    """None, one or several; they come before the conversation."""
    conversations: tuple[Conversation, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()
    """Films, in place of images; they too come before the conversation."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def files(self) -> "tuple[Image | Video, ...]":
        """Images and films, in order."""
        return (*self.images, *self.videos)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without the bytes of images and films, which stand as facts and SHA-256; see `from_json`.

        An example without films has no field `videos`."""
        videos = {"videos": [_video_json(video) for video in self.videos]} if self.videos else {}
        return videos | {
            "id": self.id,
            "images": [
                {"width": image.width, "height": image.height, "format": image.format, "sha256": image.sha256}
                for image in self.images
            ],
            "conversations": [_conversation_json(conversation) for conversation in self.conversations],
            "metadata": self.metadata,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], image_bytes: Sequence[bytes], verify: bool = True) -> "Example":
        """The example that `to_json` described.

        Args:
            raw: what `to_json` returned.
            image_bytes: the encoded files of images, then those of films, in order.
            verify: compare each file with its SHA-256; False where the caller has already verified the bytes.

        Raises:
            DataError: naming the id and the field, for an unknown or missing field, a wrong type, another number of
                images, or bytes that are not those described.
        """
        name = raw.get("id") if isinstance(raw, Mapping) else None
        films = ("videos",) if isinstance(raw, Mapping) and "videos" in raw else ()
        fields = _fields(raw, name, "example", ("id", "images", "conversations", "metadata", *films))
        described, filmed = _list(fields["images"], name, "images"), _list(fields.get("videos", []), name, "videos")
        if len(described) + len(filmed) != len(image_bytes):
            what = f"{len(described)} images" + (f" and {len(filmed)} videos" if filmed else "")
            _refuse(name, "images", f"describes {what}, but {len(image_bytes)} files are given")
        pairs = zip(described, image_bytes[: len(described)], strict=True)
        images = [_image(item, data, name, f"images[{i}]", verify) for i, (item, data) in enumerate(pairs)]
        pairs = zip(filmed, image_bytes[len(described) :], strict=True)
        videos = [_video(item, data, name, f"videos[{i}]", verify) for i, (item, data) in enumerate(pairs)]
        conversations = [
            _conversation(item, name, f"conversations[{i}]")
            for i, item in enumerate(_list(fields["conversations"], name, "conversations"))
        ]
        return cls(fields["id"], tuple(images), tuple(conversations), fields["metadata"], tuple(videos))

    @classmethod
    def from_trusted(cls, raw: Mapping[str, Any], image_bytes: Sequence[bytes]) -> "Example":
        """As `from_json`, without a single check: for bytes that a checked `Example` was written as and that a hash
        from the same index vouches for. What an example holds is checked once, when it is made, and not at every read
        of a training. Anything else goes through `from_json`.
        """
        count = len(raw["images"])
        images = [
            Image(data, one["width"], one["height"], one["format"])
            for one, data in zip(raw["images"], image_bytes, strict=False)
        ]
        films = zip(raw.get("videos", ()), image_bytes[count:], strict=True)
        talks = [
            Conversation(one["style"], tuple(map(_trusted_message, one["messages"])), one["weight"], one["metadata"])
            for one in raw["conversations"]
        ]
        example = object.__new__(cls)  # `__init__` would check
        example.__dict__.update(
            id=raw["id"],
            images=tuple(images),
            conversations=tuple(talks),
            metadata=raw["metadata"],
            videos=tuple(_video(one, data, raw["id"], "videos", False) for one, data in films),
        )
        return example

    def content_hash(self) -> str:
        """SHA-256 over everything, image bytes included."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


@dataclass(frozen=True)
class BadRow:
    """A row of a dataset that cannot become an example: where it is, and why. Listed in the artefact, never dropped
    silently."""

    file: str
    """As the params name it."""
    line: int
    """1-based: the line of a text file, the row of a table."""
    id: str | None
    """None where the row has no readable id."""
    field: str
    """The field at fault, such as `messages[1].content`; `row` for the row as a whole."""
    reason: str
    known: bool = False
    """Already accounted for elsewhere, as a dead link in the list of downloads is: listed, but no fault of the data, so
    it does not count against the tolerance."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """An example that stands in the previous artefact and was not made again."""

    id: str
    row: int
    """Its row in the previous index."""


def item_id(example: Example, conversation: int) -> str:
    """The id of one evaluation item: one conversation of an example."""
    return f"{example.id}#{conversation}"


def plain_problem(value: Any, where: str) -> tuple[str, str] | None:
    """The first part of `value` that is not plain JSON (text that is not Unicode and NaN included), as field and
    reason; None if there is none."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, str) and _encodes(value)):
        return None
    if isinstance(value, str):
        return where, "holds half a surrogate pair, which is not Unicode text"
    if isinstance(value, float):
        return None if math.isfinite(value) else (where, f"is {value}, which JSON cannot say")
    if isinstance(value, list):
        found = ((f"{where}[{i}]", plain_problem(item, "")) for i, item in enumerate(value))
        return next(((place + problem[0], problem[1]) for place, problem in found if problem), None)
    if not isinstance(value, dict):
        return where, f"is a {type(value).__name__}, which is not plain JSON"
    for key, item in value.items():
        if not isinstance(key, str) or not _encodes(key):
            return where, f"has the key {key!r}, which is not Unicode text"
        if (problem := plain_problem(item, "")) is not None:
            return f"{where}.{key}{problem[0]}", problem[1]
    return None


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(example: Example) -> None:
    name = example.id
    if not isinstance(name, str) or not name.strip():
        _refuse(name, "id", f"is {name!r}; it must be text that is not empty")
    if not example.conversations:
        _refuse(name, "conversations", "is empty; an example needs at least one")
    if example.images and example.videos:
        _refuse(name, "videos", "stand beside images; an example has images or videos, not both")
    for i, image in enumerate(example.images):
        _check_file(image, name, f"images[{i}]")
    for i, video in enumerate(example.videos):
        _check_file(video, name, f"videos[{i}]")
        _check_clip(video, name, f"videos[{i}].clip")
    for i, conversation in enumerate(example.conversations):
        _check_conversation(conversation, bool(example.images), name, f"conversations[{i}]")
    _check_metadata(example.metadata, name, "metadata")
    if problem := plain_problem(name, "id"):
        _refuse(name, *problem)


def _check_file(file: Image | Video, name: str, where: str) -> None:
    """Bytes, sizes and format of an image or a film."""
    if not isinstance(file.data, bytes) or not file.data:
        _refuse(name, f"{where}.data", "is no bytes, or empty")
    for side in ("width", "height"):
        size = getattr(file, side)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            _refuse(name, f"{where}.{side}", f"is {size!r}; it must be a whole number of pixels, at least 1")
    if not isinstance(file.format, str) or not file.format:
        _refuse(name, f"{where}.format", f"is {file.format!r}; it must name the encoding, such as PNG")


def _check_clip(video: Video, name: str, where: str) -> None:
    """The part of a film that is meant encloses some of it."""
    clip, timeline = video.clip, video.timeline
    if clip is None:
        return
    if not isinstance(clip, tuple) or len(clip) != 2 or not all(is_number(value) for value in clip):
        _refuse(name, where, f"is {clip!r}; it must be two finite numbers of seconds, or None")
    if not 0 <= clip[0] < clip[1] or clip[0] >= timeline.end or clip[1] <= timeline.begin:
        begin, end = float(timeline.begin), float(timeline.end)
        _refuse(name, where, f"is {clip}, which encloses nothing of the film, {begin:.3f} to {end:.3f} s")


def _check_conversation(conversation: Conversation, has_image: bool, name: str, where: str) -> None:
    if not isinstance(conversation.style, str) or not conversation.style:
        _refuse(name, f"{where}.style", f"is {conversation.style!r}; it must be text that is not empty")
    weight = conversation.weight
    if not is_number(weight) or weight <= 0:
        _refuse(name, f"{where}.weight", f"is {weight!r}; it must be a finite number above 0")
    _check_metadata(conversation.metadata, name, f"{where}.metadata")
    messages = conversation.messages
    if len(messages) < 2 or len(messages) % 2:
        _refuse(
            name, f"{where}.messages", f"has {len(messages)} turns; it must end with an assistant's answer to a user"
        )
    for i, message in enumerate(messages):
        field_name = f"{where}.messages[{i}]"
        if message.role != ROLES[i % 2]:
            _refuse(
                name,
                f"{field_name}.role",
                f"is {message.role!r} where {ROLES[i % 2]!r} must stand: the roles alternate",
            )
        _check_message(message, has_image, name, field_name)
        if i % 2 and (offered := messages[i - 1].options):
            _check_choice(message, offered, conversation.style in UNLABELLED_STYLES, name, field_name)
        if conversation.style in UNLABELLED_STYLES and (equal := equal_options(message.options)):
            _refuse(
                name, f"{field_name}.options[{equal[1]}]", f"is options[{equal[0]}] again, and no letters part them"
            )


def _check_message(message: Message, has_image: bool, name: str, where: str) -> None:
    for part in ("text", "label"):
        value = getattr(message, part)
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            _refuse(name, f"{where}.{part}", f"is {value!r}; it must be text that is not empty")
        if problem := plain_problem(value, f"{where}.{part}"):
            _refuse(name, *problem)
    _check_texts(message, name, where)
    if message.role == "user":
        if message.points is not None:
            _refuse(name, f"{where}.points", "stands in a user's turn; only an assistant answers with points")
        return
    if (message.text is None) == (message.points is None):
        _refuse(name, where, "must have either text or points, an assistant's turn cannot have both or neither")
    if (message.points is not None or message.inline) and not has_image:
        _refuse(name, f"{where}.{'inline' if message.points is None else 'points'}", "has no image to point at")
    if message.points is None:
        return
    if message.label is None:
        _refuse(name, f"{where}.label", "is missing; points need a label that says what they point at")
    _check_points(message.points, name, f"{where}.points")


def _check_choice(message: Message, offered: tuple[str, ...], unlabelled: bool, name: str, where: str) -> None:
    """The answer to a question with options is one of them, or the letter of one."""
    letters = [] if unlabelled else [chr(ord("A") + i) for i in range(len(offered))]
    for text in (message.text, *message.alternatives):
        if text in letters:
            continue
        if text not in offered:
            known = "" if unlabelled else f" and no letter from A to {letters[-1]}"
            _refuse(name, f"{where}.text", f"is {text!r}, none of the options{known}")
        if offered.count(text) > 1:
            _refuse(name, f"{where}.text", f"is {text!r}, which {offered.count(text)} options are; name its letter")


def equal_options(options: Sequence[str]) -> tuple[int, int] | None:
    """The places of the first two choices that are the same; None where all differ."""
    return next(((options.index(one), i) for i, one in enumerate(options) if one in options[:i]), None)


def _check_texts(message: Message, name: str, where: str) -> None:
    """Alternatives and options."""
    for part in _TEXTS:
        for i, value in enumerate(getattr(message, part)):
            if not isinstance(value, str) or not value.strip():
                _refuse(name, f"{where}.{part}[{i}]", f"is {value!r}; it must be text that is not empty")
            if problem := plain_problem(value, f"{where}.{part}[{i}]"):
                _refuse(name, *problem)
    _check_answer_parts(message, name, where)
    if message.alternatives and message.text is None:
        _refuse(name, f"{where}.alternatives", "stand without the text that they are alternatives of")
    if message.options and (message.role != "user" or message.text is None):
        _refuse(name, f"{where}.options", "belong to a user's turn with a text")
    if not 0 <= len(message.options) <= MAX_OPTIONS or len(message.options) == 1:
        _refuse(name, f"{where}.options", f"are {len(message.options)}; a question offers 2 to {MAX_OPTIONS}")


def _check_answer_parts(message: Message, name: str, where: str) -> None:
    """Explanation and inline points."""
    if message.explanation is not None:
        if message.role != "assistant" or message.text is None:
            _refuse(name, f"{where}.explanation", "belongs to an assistant's turn with a text")
        if not isinstance(message.explanation, str) or not message.explanation.strip():
            _refuse(name, f"{where}.explanation", f"is {message.explanation!r}; it must be text that is not empty")
        if problem := plain_problem(message.explanation, f"{where}.explanation"):
            _refuse(name, *problem)
    if not message.inline:
        return
    if message.role != "assistant" or message.text is None or message.alternatives:
        _refuse(name, f"{where}.inline", "belongs to an assistant's turn with one text")
    if (marks := message.text.count(POINT_MARK)) != len(message.inline):
        _refuse(name, f"{where}.inline", f"has {len(message.inline)} entries, but the text {marks} {POINT_MARK}")
    for i, one in enumerate(message.inline):
        for part in ("text", "label"):
            value = getattr(one, part)
            if not isinstance(value, str) or plain_problem(value, part):
                _refuse(name, f"{where}.inline[{i}].{part}", f"is {value!r}; it must be text")
        if not one.points:
            _refuse(name, f"{where}.inline[{i}].points", "is empty; a mark without points is no mark")
        _check_points(one.points, name, f"{where}.inline[{i}].points")


def _check_points(points: Sequence[Any], name: str, where: str) -> None:
    """Pairs of percent."""
    for i, point in enumerate(points):
        if not isinstance(point, tuple) or len(point) != 2 or not all(is_number(value) for value in point):
            _refuse(name, f"{where}[{i}]", f"is {point!r}; it must be a pair of finite numbers")
        if not all(0 <= value <= 100 for value in point):
            _refuse(name, f"{where}[{i}]", f"is {point}, outside the image: both must lie in [0, 100] percent")


def _check_metadata(metadata: Any, name: str, where: str) -> None:
    if not isinstance(metadata, dict):
        _refuse(name, where, f"is a {type(metadata).__name__}; it must be a mapping")
    if problem := plain_problem(metadata, where):
        _refuse(name, *problem)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _conversation_json(conversation: Conversation) -> dict[str, Any]:
    return {
        "style": conversation.style,
        "messages": [
            {
                "role": message.role,
                "text": message.text,
                "points": None if message.points is None else [list(point) for point in message.points],
                "label": message.label,
                **{name: list(getattr(message, name)) for name in _TEXTS if getattr(message, name)},
                **({} if message.explanation is None else {"explanation": message.explanation}),
                **({"inline": [_inline_json(one) for one in message.inline]} if message.inline else {}),
            }
            for message in conversation.messages
        ],
        "weight": conversation.weight,
        "metadata": conversation.metadata,
    }


def _inline_json(one: InlinePoints) -> dict[str, Any]:
    return {"points": [list(point) for point in one.points], "text": one.text, "label": one.label}


def _image(raw: Any, data: bytes, name: Any, where: str, verify: bool) -> Image:
    fields = _fields(raw, name, where, ("width", "height", "format", "sha256"))
    image = Image(data, fields["width"], fields["height"], fields["format"])
    if verify and image.sha256 != fields["sha256"]:
        _refuse(name, f"{where}.sha256", f"is {fields['sha256']}, but the file's bytes give {image.sha256}")
    return image


def _video_json(video: Video) -> dict[str, Any]:
    timeline = video.timeline
    return {
        "width": video.width,
        "height": video.height,
        "format": video.format,
        "sha256": video.sha256,
        "clip": None if video.clip is None else list(video.clip),
        "time_base": list(timeline.time_base),
        "start": timeline.start,
        "steps": [list(run) for run in timeline.steps],
        "last": timeline.last,
        "keys": list(timeline.keys),
    }


def _video(raw: Any, data: bytes, name: Any, where: str, verify: bool) -> Video:
    times = ("time_base", "start", "steps", "last", "keys")
    fields = _fields(raw, name, where, ("width", "height", "format", "sha256", "clip", *times))
    timeline = _timeline({time: fields[time] for time in times}, name, where)
    clip = fields["clip"]
    video = Video(
        data, fields["width"], fields["height"], fields["format"], timeline, tuple(clip) if clip is not None else None
    )
    if verify and video.sha256 != fields["sha256"]:
        _refuse(name, f"{where}.sha256", f"is {fields['sha256']}, but the file's bytes give {video.sha256}")
    return video


def _timeline(fields: dict[str, Any], name: Any, where: str) -> Timeline:
    """The presentation times of a film, of whole numbers that make sense."""
    steps = [_list(run, name, f"{where}.steps") for run in _list(fields["steps"], name, f"{where}.steps")]
    lists = {
        "time_base": _list(fields["time_base"], name, f"{where}.time_base"),
        "steps": [value for run in steps for value in run],
        "keys": _list(fields["keys"], name, f"{where}.keys"),
    }
    for part, values in {**lists, "start": [fields["start"]], "last": [fields["last"]]}.items():
        lowest = {"start": -sys.maxsize, "last": 0, "keys": 0}.get(part, 1)
        if not all(isinstance(value, int) and not isinstance(value, bool) and value >= lowest for value in values):
            _refuse(name, f"{where}.{part}", f"is {fields[part]!r}; it must be whole numbers of at least {lowest}")
    if len(lists["time_base"]) != 2 or any(len(run) != 2 for run in steps) or not lists["keys"]:
        _refuse(name, where, "has a time_base or a run of steps that is no pair, or no keys")
    numerator, denominator = lists["time_base"]
    runs = tuple((step, count) for step, count in steps)
    return Timeline((numerator, denominator), fields["start"], runs, fields["last"], tuple(lists["keys"]))


def _conversation(raw: Any, name: Any, where: str) -> Conversation:
    fields = _fields(raw, name, where, ("style", "messages", "weight", "metadata"))
    items = enumerate(_list(fields["messages"], name, f"{where}.messages"))
    messages = [_message(item, name, f"{where}.messages[{i}]") for i, item in items]
    return Conversation(fields["style"], tuple(messages), fields["weight"], fields["metadata"])


def _message(raw: Any, name: Any, where: str) -> Message:
    more = tuple(one for one in _OPTIONAL if isinstance(raw, Mapping) and one in raw)
    parts = _fields(raw, name, where, (*_PLAIN, *more))
    lists = [one for one in more if one != "explanation"]
    parts |= {one: tuple(_list(parts[one], name, f"{where}.{one}")) for one in lists}
    if "inline" in more:
        parts["inline"] = tuple(_inline(one, name, f"{where}.inline") for one in parts["inline"])
    points = parts["points"]
    if points is not None:
        parts["points"] = _points(points, name, f"{where}.points")
    return Message(**parts)


def _trusted_message(raw: Mapping[str, Any]) -> Message:
    """As `_message`; the plain ones, which most are, without looking at every field."""
    if len(raw) > len(_PLAIN) or raw["points"] is not None:
        return _message(raw, None, "message")
    return Message(raw["role"], raw["text"], None, raw["label"])


def _inline(raw: Any, name: Any, where: str) -> InlinePoints:
    fields = _fields(raw, name, where, ("points", "text", "label"))
    return InlinePoints(_points(fields["points"], name, f"{where}.points"), fields["text"], fields["label"])


def _points(raw: Any, name: Any, where: str) -> tuple[Any, ...]:
    """A list of pairs as tuples; `_check_points` looks at what they hold."""
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in _list(raw, name, where))


def _fields(raw: Any, name: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The mapping's fields, which must be exactly `names`."""
    if not isinstance(raw, Mapping):
        _refuse(name, where, f"is a {type(raw).__name__}; it must be a mapping")
    if raw.keys() != set(names):
        unknown, missing = sorted(set(raw) - set(names), key=str), sorted(set(names) - set(raw))
        _refuse(name, where, f"has unknown fields {unknown} and lacks {missing}; the fields are {list(names)}")
    return dict(raw)


def _list(value: Any, name: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(name, where, f"is a {type(value).__name__}; it must be a list")
    return value


def _refuse(name: Any, where: str, reason: str) -> NoReturn:
    raise ExampleError(name, where, reason)
