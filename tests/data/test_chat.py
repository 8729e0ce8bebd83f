"""Data of one's own: good rows come through whole, every kind of bad row is told by line, id, field and reason."""

import base64
import io
import json
import re
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image as PILImage
from PIL import ImageOps
from skimage import data as photos

from molmo_model.config import DatasetConfig, load_params
from molmo_model.data.datasets import FAMILIES, BadRow
from molmo_model.data.datasets.chat_images import check_image
from molmo_model.data.datasets.chat_rows import RowError
from molmo_model.errors import ConfigError, DataError, StorageError
from tests.data.films import film

MAKE, FINGERPRINT = FAMILIES["chat"].make, FAMILIES["chat"].fingerprint
ROOT = Path(__file__).resolve().parents[2]
TALK = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cup."}]


def encoded(pixels, form="JPEG", side=64, **options):
    picture = PILImage.fromarray(pixels)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


PICTURES = {
    "cup.jpg": encoded(photos.coffee()),
    "cat.png": encoded(photos.chelsea(), "PNG"),
    "rocket.webp": encoded(photos.rocket(), "WEBP"),
    "sub/coins.jpg": encoded(photos.coins()),
}
BROKEN = {
    "cut.jpg": PICTURES["cup.jpg"][: len(PICTURES["cup.jpg"]) // 2],
    "cut.png": PICTURES["cat.png"][: len(PICTURES["cat.png"]) // 2],
    "text.jpg": b"this is no picture",
    "empty.jpg": b"",
    "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, content in {**PICTURES, **BROKEN}.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "secret.jpg").write_bytes(PICTURES["cup.jpg"])
    frames = [PILImage.fromarray(photos.camera()[:20, i : i + 20]) for i in (0, 200)]
    frames[0].save(tmp_path / "set" / "moving.gif", save_all=True, append_images=frames[1:])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "set"


def row(**changes):
    fields = {"id": "a", "images": ["cup.jpg"], "messages": TALK, **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def read(folder, *rows, **config):
    """The results of JSON lines, given as values or as bytes."""
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return list(MAKE(DatasetConfig(family="chat", path="set/rows.jsonl", **config), 0))


def only(folder, *rows, **config):
    ((_, result),) = read(folder, *rows, **config)
    return result


def test_messages_with_parts_and_without(folder):
    parts = [{"type": "image"}, {"type": "text", "text": " What is\nit? "}, {"type": "text", "text": "Say."}]
    example = only(
        folder,
        row(
            id=7,
            messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": " A cup. "}, *TALK],
            weight=2,
            style="qa",
            metadata={"answers": ["cup", None]},
        ),
    )
    (conversation,) = example.conversations
    assert [(m.role, m.text) for m in conversation.messages] == [
        ("user", "What is\nit? Say."),
        ("assistant", "A cup."),
        ("user", "What is it?"),
        ("assistant", "A cup."),
    ]
    assert (example.id, conversation.weight, conversation.style) == ("7", 2.0, "qa")
    assert conversation.metadata == {"answers": ["cup", None]}
    (image,) = example.images
    assert (image.data, image.format) == (PICTURES["cup.jpg"], "JPEG")
    assert (image.width, image.height) == PILImage.open(io.BytesIO(image.data)).size


def test_llava(folder):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    example = only(folder, {"id": "x", "image": "cup.jpg", "conversations": turns})
    assert [(m.role, m.text) for m in example.conversations[0].messages] == [("user", "What?"), ("assistant", "A cup.")]
    assert example.conversations[0].style == "chat"


def test_options_alternatives_and_explanations_belong_to_the_last_turns(folder):
    options = ["tea", " A cup. ", "C"]
    rows = [
        row(id="text", messages=TALK * 2, options=options, alternatives=["A", "C"], explanation=" So. "),
        row(id="letter", messages=[TALK[0], {"role": "assistant", "content": "B"}], options=options),
        row(id="unlabelled", options=options, style="ai2_diagram_no_letter"),
        row(id="words", alternatives=["cup", " A  cup"], explanation=None, options=None),
    ]
    made = {one.id: one.conversations[0].messages for _, one in read(folder, *rows)}
    question, answer = made["text"][-2:]
    assert (question.text, question.options) == ("What is it?", ("tea", "A cup.", "C"))
    assert (answer.text, answer.alternatives, answer.explanation) == ("B", ("A", "C"), "So.")
    assert not made["text"][0].options and made["text"][1].explanation is None
    assert (made["letter"][0].options, made["letter"][1].text) == (question.options, "B")
    assert made["unlabelled"][1].text == "A cup."
    answer = made["words"][1]
    assert (answer.text, answer.alternatives, answer.explanation) == ("A cup.", ("cup", "A  cup"), None)


def test_points_in_percent_and_pixels(folder):
    question = TALK[:1]
    rows = [
        row(id="p", messages=question, points=[[0, 100], [25.5, 50]], label="cup"),
        row(id="q", messages=question, points=[[16, 21]], points_unit="pixel", label=" cup "),
        row(id="r", messages=question, points=[], label="cup"),
    ]
    percent, pixel, none = (result for _, result in read(folder, *rows))
    width, height = PILImage.open(io.BytesIO(PICTURES["cup.jpg"])).size
    assert percent.conversations[0].messages[-1].points == ((0.0, 100.0), (25.5, 50.0))
    assert pixel.conversations[0].messages[-1].points == ((100 * 16 / width, 100 * 21 / height),)
    assert pixel.conversations[0].messages[-1].label == "cup"
    assert none.conversations[0].messages[-1].points == ()
    again = only(folder, row(messages=question, points=[[16, 21]], label="c"), options={"points_unit": "pixel"})
    assert again.conversations[0].messages[-1].points == pixel.conversations[0].messages[-1].points


def test_pixel_points_follow_the_turned_picture(folder):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encoded(photos.coffee(), exif=exif))
    example = only(
        folder, row(images=["turned.jpg"], messages=TALK[:1], points=[[1, 60]], points_unit="pixel", label="x")
    )
    assert (example.images[0].width, example.images[0].height) == (43, 64)
    assert example.conversations[0].messages[-1].points == ((100 / 43, 100 * 60 / 64),)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_size_is_that_of_the_upright_picture(form, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    data = encoded(photos.coffee(), form, exif=exif)
    upright = ImageOps.exif_transpose(PILImage.open(io.BytesIO(data)))
    image = check_image(data, 10**6, "image")
    assert (image.width, image.height) == upright.size
    assert image.format == form


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_all_kinds_are_read(mode):
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    picture = (
        PILImage.fromarray(pixels) if mode == "I;16" else PILImage.fromarray(photos.chelsea()[:9, :7]).convert(mode)
    )
    file = io.BytesIO()
    picture.save(file, "TIFF")
    image = check_image(file.getvalue(), 100, "image")
    assert (image.width, image.height) == picture.size


def test_images_inside_the_row(folder):
    content = base64.b64encode(PICTURES["cat.png"]).decode()
    example = only(folder, row(images=[{"base64": content}, {"path": "sub/coins.jpg"}]))
    assert [image.data for image in example.images] == [PICTURES["cat.png"], PICTURES["sub/coins.jpg"]]


def test_a_row_without_pictures(folder):
    assert only(folder, row(images=...)).images == ()


BAD = [
    (row(id=...), "id", "missing"),
    (row(id="  "), "id", "empty"),
    (row(id=True), "id", "True"),
    (row(id="a\nb"), "id", "printable"),
    (row(id="x" * 300), "id", "256"),
    (row(messages=...), "messages", "missing"),
    (row(messages=[]), "messages", "answer"),
    (row(messages="hello"), "messages", "must be a list"),
    (row(messages=TALK[:1]), "messages", "must end with the assistant's answer"),
    (row(messages=TALK[1:]), "messages[0]", "the user first"),
    (row(messages=[*TALK, *TALK[1:]]), "messages[2]", "alternate"),
    (row(messages=[{"role": "system", "content": "Be kind."}, *TALK]), "messages[0].role", "first question"),
    (row(messages=[TALK[0], {"role": "assistant", "content": ""}]), "messages[1].content", "is empty"),
    (row(messages=[TALK[0], {"role": "assistant", "content": " \n"}]), "messages[1].content", "is empty"),
    (row(messages=[TALK[0], {"role": "assistant"}]), "messages[1].content", "is empty"),
    (row(messages=[TALK[0], {"role": "assistant", "content": 4}]), "messages[1].content", "no text"),
    (row(messages=[TALK[0], {"role": "assistant", "content": "\ud800"}]), "messages[1].content", "surrogate"),
    (
        row(messages=[TALK[0], {"role": "assistant", "content": "a", "name": "b"}]),
        "messages[1].name",
        "role and|role, ",
    ),
    (row(messages=["hi", TALK[1]]), "messages[0]", "is a str"),
    (row(messages=[{"role": "user", "content": [{"type": "audio"}]}, TALK[1]]), "messages[0].content[0]", "neither"),
    (row(messages=[{"role": "user", "content": [{"type": "text"}]}, TALK[1]]), "messages[0].content[0]", "neither"),
    (
        row(messages=[{"role": "user", "content": [{"type": "image", "url": "x.jpg"}]}, TALK[1]]),
        "messages[0].content[0].url",
        "`images`",
    ),
    (row(messages=[{"role": "user", "content": "<image> What?"}, TALK[1]]), "messages[0].content", '"type": "image"'),
    (
        row(messages=[{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "?"}]}, TALK[1]]),
        "messages",
        "2 places for 1 images",
    ),
    (
        row(messages=[{"role": "user", "content": [{"type": "text", "text": "?"}]}, TALK[1]]),
        "messages",
        "0 places for 1 images",
    ),
    (row(messages=[*TALK, {"role": "user", "content": [{"type": "image"}]}, TALK[1]]), "messages[2].content", "first"),
    (row(conversations=[]), "conversations", "beside `messages`"),
    (row(image="cup.jpg"), "image", "beside `images`"),
    (row(mesages=[]), "mesages", "did you mean 'messages'"),
    (row(answers=["x"]), "answers", "metadata"),
    (row(images="cup.jpg"), "images", "must be a list"),
    (row(images=["none.jpg"]), "images[0]", "does not exist"),
    (row(images=["cup.jpg", 3]), "images[1]", "path of an image"),
    (row(images=[""]), "images[0]", "path of an image"),
    (row(images=["sub"]), "images[0]", "does not exist"),
    (row(images=["cup.jpg\0"]), "images[0]", "no path"),
    (row(images=["x" * 5000]), "images[0]", "no path|cannot be read"),
    (row(images=["../secret.jpg"]), "images[0]", "leads out of"),
    (row(images=["/etc/hostname"]), "images[0]", "leads out of"),
    (row(images=["http://169.254.169.254/latest"]), "images[0]", "not fetched"),
    (row(images=["file:///etc/hostname"]), "images[0]", "not fetched"),
    (row(images=["data:image/png;base64,AAAA"]), "images[0]", "not fetched"),
    (row(images=[{"path": "cup.jpg", "mime": "x"}]), "images[0]", "'mime'"),
    (row(images=[{"base64": "no base 64!"}]), "images[0].base64", "not base64"),
    (row(images=[{"base64": 3}]), "images[0].base64", "not base64"),
    (row(images=[{"bytes": "abc"}]), "images[0].bytes", "base64"),
    (row(images=["cut.jpg"]), "images[0]", "broken or cut short"),
    (row(images=["cut.png"]), "images[0]", "broken or cut short"),
    (row(images=["text.jpg"]), "images[0]", "no image of"),
    (row(images=["page.svg"]), "images[0]", "no image of"),
    (row(images=["empty.jpg"]), "images[0]", "empty file"),
    (row(images=["moving.gif"]), "images[0]", "2 frames"),
    (row(points=[[1, 2]], label="x"), "points", "end with the user's turn"),
    (row(messages=TALK[:1], points=[[1, 2]]), "label", "missing"),
    (row(messages=TALK[:1], points=[[1, 100.5]], label="x"), "points[0]", "outside the image of 0 to 100 percent"),
    (row(messages=TALK[:1], points=[[1, -1]], label="x"), "points[0]", "outside"),
    (row(messages=TALK[:1], points=[[65, 1]], points_unit="pixel", label="x"), "points[0]", "64 x 43 pixels"),
    (row(messages=TALK[:1], points=[[1, 2, 3]], label="x"), "points[0]", "two finite numbers"),
    (row(messages=TALK[:1], points=[[1, 10**400]], label="x"), "points[0]", "two finite numbers"),
    (row(messages=TALK[:1], points=[["1", 2]], label="x"), "points[0]", "two finite numbers"),
    (row(messages=TALK[:1], points={"x": 1}, label="x"), "points", "must be a list"),
    (row(messages=TALK[:1], points=[[1, 2]], points_unit="mm", label="x"), "points_unit", "percent, pixel"),
    (row(messages=TALK[:1], points=[[1, 2]], images=..., label="x"), "points", "exactly one image"),
    (row(label="x"), "label", "without `points`"),
    (row(options="A cup."), "options", "is a str; it must be a list of texts"),
    (row(options=["A cup."]), "options", "are 1; a question offers 2 to 26"),
    (row(options=[]), "options", "are 0"),
    (row(options=[*map(str, range(26)), "A cup."]), "options", "are 27"),
    (row(options=["A cup.", " A cup. "]), r"options[1]", "is 'A cup.', as options.0. is"),
    (row(options=["A cup.", None]), "options[1]", "is empty"),
    (row(options=["A cup.", 7]), "options[1]", "no text"),
    (row(options=["A cup.", "a\x07"]), "options[1]", "control character"),
    (row(options=["A cup.", "<image>"]), "options[1]", "has <image> as text"),
    (row(options=["cup", "tea"]), "options", "answer 'A cup.', which is none of the options, nor a letter from A to B"),
    (row(options=["A cup.", "B"], alternatives=["b"]), "alternatives[0]", "'b', which is none of the options"),
    (row(options=["A cup.", "A"], alternatives=["A"]), "alternatives[0]", "letter of one .* and the text of another"),
    (row(options=["A cup.", "B."], alternatives=["A"], style="ai2_diagram_no_letter"), "alternatives[0]", "options$"),
    (row(alternatives="cup"), "alternatives", "is a str; it must be a list of texts"),
    (row(alternatives=["cup", ""]), "alternatives[1]", "is empty"),
    (row(alternatives=["\ud800"]), "alternatives[0]", "surrogate"),
    (row(explanation=" "), "explanation", "is empty"),
    (row(explanation=["so"]), "explanation", "no text"),
    (row(messages=TALK[:1], points=[[1, 2]], label="x", explanation="so"), "explanation", "stands beside `points`"),
    (row(messages=TALK[:1], points=[[1, 2]], label="x", options=["a", "b"]), "options", "stands beside `points`"),
    (row(weight=0), "weight", "above 0"),
    (row(weight="1"), "weight", "above 0"),
    (row(weight=float("nan")), "weight", "above 0"),
    (row(weight=10**400), "weight", "above 0"),
    (row(style=3), "style", "must be a str"),
    (row(style=""), "style", "must be a name"),
    (row(style="</script><script>alert(1)"), "style", "must be a name"),
    (row(metadata=[1]), "metadata", "must be a dict"),
    (row(metadata={"a": float("inf")}), "metadata.a", "JSON"),
    (row(metadata={"a": "\udfff"}), "metadata.a", "surrogate"),
    (row(split="test"), "split", "train, eval"),
    (b"{not json", "row", "not JSON"),
    (b'"text"', "row", "JSON str"),
    (b"[1]", "row", "JSON list"),
    (b'{"id": "caf\xe9"}', "row", "not UTF-8: byte 11"),
    (b'{"id": "a", "id": "b"}', "id", "stands twice"),
    (b"[" * 100_000, "row", "nested too deeply|not JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "row", "not JSON"),
    (
        {
            "id": "a",
            "image": "cup.jpg",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
        },
        "conversations",
        "0 places for 1 images",
    ),
    (
        {"id": "a", "conversations": [{"from": "human", "value": "?"}, {"from": "bot", "value": "!"}]},
        "conversations[1].from",
        "'bot'",
    ),
    (
        {"id": "a", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<image>"}]},
        "conversations[1].value",
        "first turn",
    ),
]


@pytest.mark.parametrize(("bad", "field", "reason"), BAD)
def test_every_bad_row_is_told(folder, bad, field, reason):
    good = row(id="good", images=["cat.png"])
    (_, first), (_, found), (_, last) = read(folder, good, bad, row(id="last"), train_examples=5)
    assert isinstance(found, BadRow), found
    assert (found.file, found.line, found.field) == ("set/rows.jsonl", 2, field)
    assert re.search(reason, found.reason)
    assert found.id == (
        str(bad["id"])[:256] if isinstance(bad, dict) and isinstance(bad.get("id"), str | int) else None
    )
    json.dumps(asdict(found)).encode()  # can be written down
    assert "0x" not in found.reason  # no addresses of objects: the reason is the same every time
    assert (first.id, last.id) == ("good", "last")


def test_the_second_of_two_equal_ids_is_bad(folder):
    results = [result for _, result in read(folder, row(), row(id="b"), row(images=["cat.png"]))]
    assert [isinstance(result, BadRow) for result in results] == [False, False, True]
    assert (results[2].line, results[2].id, results[2].field) == (3, "a", "id")
    assert "line 1" in results[2].reason


def test_an_id_of_a_bad_row_can_be_used_again(folder):
    results = [result for _, result in read(folder, row(images=["none.jpg"]), row())]
    assert [isinstance(result, BadRow) for result in results] == [True, False]


def test_lines(folder):
    """Blank lines and a byte order mark are fine and lines are still counted right; an endless line is not read."""
    results = read(folder, b"\xef\xbb\xbf" + json.dumps(row()).encode(), b"", b"  ", b"oops", row(id="c"))
    assert [getattr(result, "line", result.id) for _, result in results] == ["a", 4, "c"]


def test_a_line_that_is_too_long_is_skipped(folder, monkeypatch):
    monkeypatch.setattr("molmo_model.data.datasets.chat_rows.MAX_LINE_BYTES", 400)
    (_, bad), (_, good) = read(folder, row(metadata={"x": "y" * 5000}), row(id="b"))
    assert (bad.line, bad.field, good.id) == (1, "row", "b")


def test_a_picture_too_large_is_refused_from_its_header(folder):
    """A PNG whose header promises 10^9 pixels holds a few bytes; nothing of that size is ever allocated."""
    header = (30_000).to_bytes(4, "big") + (40_000).to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    bomb = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(1000)))
    (folder / "bomb.png").write_bytes(bomb)
    assert "pixels" in only(folder, row(images=["bomb.png"])).reason
    assert "64 x 43, more than 2000 pixels" in only(folder, row(), max_image_pixels=2000).reason
    with pytest.raises(RowError, match="pixels"):
        check_image(bomb, 10**6, "image")


def _chunk(name, content):
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def test_links_out_of_the_folder_are_refused(folder):
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    assert "leads out" in only(folder, row(images=["link.jpg"])).reason
    assert isinstance(only(folder, row(images=["loop.jpg"])), BadRow)
    assert only(folder, row(images=["set/cup.jpg"]), image_root=".").images[0].data == PICTURES["cup.jpg"]


def test_images_in_storage(folder):
    from molmo_model.storage import open_file

    with open_file("memory://pictures/sub/cup.jpg", "wb") as file:
        file.write(PICTURES["cup.jpg"])
    rows = [
        row(id="a", images=["sub/cup.jpg"]),
        row(id="b", images=["none.jpg"]),
        row(id="c", images=["../cup.jpg"]),
        row(id="d", images=["/cup.jpg"]),
    ]
    (_, good), *bad = read(folder, *rows, image_root="memory://pictures")
    assert good.images[0].data == PICTURES["cup.jpg"]
    assert [b.reason.split(" ", 1)[1].split(" memory")[0] for _, b in bad] == [
        "cannot be read from",
        "leads out of",
        "leads out of",
    ]


def test_parquet_in_the_form_of_hugging_face(folder):
    rows = [
        {
            "id": "a",
            "images": [{"bytes": PICTURES["cup.jpg"], "path": "elsewhere.jpg"}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            ],
            "points": None,
            "label": None,
        },
        {
            "id": "b",
            "images": [{"bytes": None, "path": "cat.png"}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Point."}]}
            ],
            "points": [[50.0, 50.0]],
            "label": "cat",
        },
        {
            "id": "c",
            "images": [{"bytes": PICTURES["cup.jpg"][:100], "path": None}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            ],
            "points": None,
            "label": None,
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    config = DatasetConfig(family="chat", path="set/rows.parquet")
    (_, first), (_, second), (_, third) = MAKE(config, 0)
    assert first.images[0].data == PICTURES["cup.jpg"]
    assert second.conversations[0].messages[-1].points == ((50.0, 50.0),)
    assert (third.line, third.id, third.field) == (3, "c", "images[0]")
    plain = [{"id": 1, "images": [PICTURES["cup.jpg"]], "messages": TALK, "when": None}]
    pq.write_table(pa.Table.from_pylist(plain), folder / "rows.parquet")
    ((_, example),) = MAKE(config, 0)
    assert (example.id, example.images[0].format) == ("1", "JPEG")


def test_parquet_text_that_is_not_utf8_is_one_bad_row(folder):
    ids = pa.array([b"a", b"caf\xe9", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ids, "messages": [TALK] * 3}), folder / "rows.parquet")
    results = [result for _, result in MAKE(DatasetConfig(family="chat", path="set/rows.parquet"), 0)]
    assert [isinstance(result, BadRow) for result in results] == [False, True, False]
    assert (results[1].line, results[1].reason) == (2, "holds text that is not UTF-8")


def test_files_that_cannot_be_read_at_all(folder):
    with pytest.raises(StorageError, match=r"none.jsonl"):
        list(MAKE(DatasetConfig(family="chat", path="set/none.jsonl"), 0))
    with pytest.raises(ConfigError, match=r"\.jsonl or \.parquet"):
        list(MAKE(DatasetConfig(family="chat", path="set/rows.csv"), 0))
    with pytest.raises(ConfigError, match="needs `path`"):
        list(MAKE(DatasetConfig(family="chat"), 0))
    with pytest.raises(DataError, match="holds no rows"):
        read(folder, b"")
    (folder / "rows.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(MAKE(DatasetConfig(family="chat", path="set/rows.parquet"), 0))
    with pytest.raises(ConfigError, match="did you mean 'style'"):
        read(folder, row(), options={"styles": "qa"})
    with pytest.raises(ConfigError, match="points_unit"):
        read(folder, row(), options={"points_unit": "mm"})


def unlike(number):
    """A small picture that no other number has, as base64."""
    pixels = np.full((4, 4, 3), [number % 256, number // 256, 7], dtype=np.uint8)
    return {"base64": base64.b64encode(encoded(pixels, "PNG")).decode()}


def test_about_the_right_share_of_pictures_is_held_out(folder):
    rows = [row(id=str(i), images=[unlike(i)]) for i in range(600)]
    sides = [side for side, _ in read(folder, *rows, eval_fraction=0.25)]
    assert 0.18 < sides.count("eval") / len(sides) < 0.32
    assert {side for side, _ in read(folder, *rows[:50], eval_fraction=0.0)} == {"train"}
    backwards = [side for side, _ in read(folder, *rows[::-1], eval_fraction=0.25)]
    assert backwards == sides[::-1]  # the order of the rows decides nothing
    assert [side for side, _ in read(folder, *rows[:50], eval_fraction=0.25)] == sides[:50]  # nor how many there are


def test_rows_that_share_a_picture_are_on_one_side(folder):
    """Chains of pairs: 0-1, 1-2, ... are one group, however they are ordered; brute force over random pairs."""
    rng = np.random.default_rng(0)
    pairs = [sorted(rng.choice(60, 2, replace=False).tolist()) for _ in range(40)] + [[i] for i in range(60)]
    rows = [row(id=str(i), images=[unlike(k) for k in pair]) for i, pair in enumerate(pairs)]
    sides = [side for side, _ in read(folder, *rows, eval_fraction=0.5)]
    assert len(set(sides)) == 2
    of_picture = {}
    for pair, side in zip(pairs, sides, strict=True):
        for picture in pair:
            assert of_picture.setdefault(picture, side) == side


def test_a_row_can_ask_for_its_side(folder):
    rows = [
        row(id="a", images=["cup.jpg"]),
        row(id="b", images=["cup.jpg", "cat.png"], split="eval"),
        row(id="c", images=["cat.png"], split="train"),
        row(id="d", images=["rocket.webp"], split="train"),
        row(id="e", images=..., split="eval"),
    ]
    results = read(folder, *rows, eval_fraction=0.0)
    assert [(side, result.id) for side, result in results if not isinstance(result, BadRow)] == [
        ("eval", "a"),
        ("eval", "b"),
        ("train", "d"),
        ("eval", "e"),
    ]
    (bad,) = [result for _, result in results if isinstance(result, BadRow)]
    assert (bad.id, bad.field) == ("c", "split")


def test_at_most_so_many_examples(folder):
    rows = [row(id=str(i), images=[unlike(i)]) for i in range(40)]
    everything = read(folder, *rows, eval_fraction=0.5)
    some = read(folder, *rows, eval_fraction=0.5, train_examples=3, eval_examples=2)
    assert [side for side, _ in some].count("train") == 3
    assert [side for side, _ in some].count("eval") == 2
    assert [example.id for side, example in some if side == "train"] == [
        example.id for side, example in everything if side == "train"
    ][:3]


def test_fingerprint_sees_the_file_and_every_picture(folder):
    rows = [row(id="a"), row(id="b", images=["cat.png", {"path": "sub/coins.jpg"}, "none.jpg"]), b"no json"]
    read(folder, *rows)
    config = DatasetConfig(family="chat", path="set/rows.jsonl")
    first = FINGERPRINT(config, 0)
    assert FINGERPRINT(config, 1) == first
    (folder / "rocket.webp").write_bytes(b"not named by any row")
    assert FINGERPRINT(config, 0) == first
    (folder / "sub" / "coins.jpg").write_bytes(PICTURES["cup.jpg"])
    second = FINGERPRINT(config, 0)
    assert second != first
    (folder / "none.jpg").write_bytes(PICTURES["cup.jpg"])
    third = FINGERPRINT(config, 0)
    assert third != second
    read(folder, *rows, row(id="c"))
    assert FINGERPRINT(config, 0)["set/rows.jsonl"] != third["set/rows.jsonl"]


def test_the_example_of_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_params("data/example/params.yaml").datasets["photos"]
    results = list(MAKE(config, 17))
    bad = [result for _, result in results if isinstance(result, BadRow)]
    assert bad == []
    assert {result.id: side for side, result in results}["coins"] == "eval"
    assert len(results) == 8
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) < 100_000


def test_the_guide_is_true(tmp_path):
    """Every row that the guide shows is read, and its YAML is what params take."""
    guide = (ROOT / "docs" / "guides" / "own_data.md").read_text(encoding="utf-8")
    rows = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", guide, re.DOTALL)]
    assert len(rows) >= 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    shutil.copytree(ROOT / "data" / "example", tmp_path / "root")
    films = [item for row in rows for item in (*row.get("videos", ()), row.get("video")) if item]
    for name in {item if isinstance(item, str) else item["path"] for item in films}:
        container = "matroska" if name.endswith(".mkv") else "mp4"
        (tmp_path / "root" / name).write_bytes(film(range(0, 15_000, 500), (1, 1000), container))
    config = DatasetConfig(family="chat", path=str(tmp_path / "rows.jsonl"), image_root=str(tmp_path / "root"))
    results = [result for _, result in MAKE(config, 0)]
    assert len(films) >= 3
    assert [result for result in results if isinstance(result, BadRow)] == []
    from molmo_model.config import params_from_dict

    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)]
    assert (
        params_from_dict({"version": 2, "datasets": blocks[0]["datasets"]}, "guide").datasets["photos"].tolerance
        == 0.02
    )
    for field in re.findall(r"`(\w+)`", guide.split("| field |")[1].split("A field with null")[0]):
        known = {name for row in rows for name in row}
        assert field in known | {"points_unit", "chat", "train", "eval"}
