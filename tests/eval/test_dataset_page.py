"""The page that shows a dataset as the model gets it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from molmo_model.artifacts import write_manifest
from molmo_model.config import DatasetConfig, Params, load_params
from molmo_model.data.example import POINT_MARK, Conversation, Example, Image, InlinePoints, Message
from molmo_model.data.shards import write_shards
from molmo_model.errors import ConfigError
from molmo_model.eval.charts import histogram
from molmo_model.eval.dataset_page import Page, Shown, crop_boxes, render, spans
from molmo_model.model_config import CropMode, ModelConfig, PreprocessingConfig
from molmo_model.preprocessing.preprocessor import IGNORE, Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer
from molmo_model.source_digest import ROOT
from pipelines import assemble, mixture, shards, visualize
from pipelines.stage import run
from tests.preprocessing.examples import picture, png


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("molmo_model/preprocessing/tokenizers/bytes512")


@pytest.fixture
def preprocessor(tokenizer):
    def make(resize="siglip", **section):
        preprocessing = PreprocessingConfig(**{"max_crops": 4, "overlap_margins": [1, 1], **section})
        sizes = {"image_size": 64, "patch_size": 16, "pooling_size": 2, "vocab_size": 520}
        return Preprocessor(PreprocessorConfig.build(preprocessing, resize=resize, **sizes), tokenizer)

    return make


def example(name="e", text="a <b>cat</b> & a dog"):
    turns = (Message("user", "what?"), Message("assistant", text), Message("user", "sure?"), Message("assistant", "y"))
    pointed = (Message("user", "where?"), Message("assistant", points=((25.0, 75.0),), label="<i>nose</i>"))
    return Example(name, (picture(90, 150),), (Conversation("qa", turns), Conversation("point", pointed)))


def test_tokens_are_shown_once_each_and_learned_where_the_loss_is(preprocessor):
    made = preprocessor()
    encoded = made.encode(example(), rng=np.random.default_rng(3))
    found = spans(encoded, made)
    fed = [span for span in found if span.kind not in ("image", "end")]
    assert len(fed) == int((encoded.image_ids == 0).sum())
    learned = [span for span in found if span.kind in ("learned", "end")]
    assert len(learned) == int((encoded.labels != IGNORE).sum())
    by_segment = {k: "".join(s.text for s in learned if s.segment == k) for k in (0, 1)}
    end = made.tokenizer.decode([made.eos_id])
    assert f" a <b>cat</b> & a dog{end} y{end}" in by_segment.values()
    assert {span.kind for span in found if span.segment < 0} == {"image", "prefix"}


@pytest.mark.parametrize(("height", "width"), [(90, 150), (300, 80), (64, 64), (37, 200)])
def test_crops_lie_where_their_pixels_come_from(preprocessor, height, width):
    """A picture whose pixels say where they are, cut by the preprocessor."""
    made = preprocessor()
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, 0 * x], 2).astype(np.uint8)
    shown = Example("e", (Image(png(pixels), width, height, "PNG"),), example().conversations[:1])
    crops = made.encode(shown).pixels[1:]
    boxes = crop_boxes(height, width, made)
    assert len(boxes) == len(crops)
    for box, crop in zip(boxes, crops, strict=True):
        left, top = crop[..., 0].mean(0)[0] / 2.55, crop[..., 1].mean(1)[0] / 2.55
        right, bottom = crop[..., 0].mean(0)[-1] / 2.55, crop[..., 1].mean(1)[-1] / 2.55
        measured = (left, top, right - left, bottom - top)
        assert measured == pytest.approx((box.left, box.top, box.width, box.height), abs=3)  # half a pixel, rounding


def test_a_letterboxed_crop_ends_with_the_picture(preprocessor):
    made = preprocessor("clip")
    for box in crop_boxes(40, 200, made):
        assert min(box.left, box.top, box.width, box.height) >= 0
        assert max(box.left + box.width, box.top + box.height) <= 100.001
    assert crop_boxes(64, 64, preprocessor(crop_mode=CropMode.resize)) == []


def test_everything_is_escaped_and_nothing_is_loaded(preprocessor):
    made = preprocessor()
    hostile = example("<script>alert(1)</script>", "</span><img src=x onerror=alert(1)>")
    shown = [Shown(hostile, made.encode(hostile), [0, 1], "row 0")]
    page = Page("d", {"licence": "<u>"}, [{"file": "<f>", "line": 1, "id": None, "field": "x", "reason": "<r>"}])
    text = render(page, shown, made)
    assert "<script" not in text and "<img src=x" not in text and "<i>nose" not in text and "<u>" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert text == render(page, shown, made)
    assert "left:25.0%;top:75.0%" in text


def test_points_inside_an_answer_are_drawn_and_listed(preprocessor):
    made = preprocessor()
    inline = (InlinePoints(((10.0, 90.0), (30.0, 40.0)), "two dogs", "dog"),)
    answered = Message("assistant", f"I see {POINT_MARK}.", inline=inline)
    one = Example("e", (picture(90, 150),), (Conversation("point_qa", (Message("user", "what?"), answered)),))
    text = render(Page("d", {}), [Shown(one, made.encode(one), [0], "row 0")], made)
    assert "left:10.0%;top:90.0%" in text and "left:30.0%;top:40.0%" in text
    assert "dog, shown as two dogs: (10, 90) (30, 40)" in text


def test_a_huge_example_is_cut_and_the_page_says_so(preprocessor):
    made = preprocessor()
    huge = example(text="word " * 2000)
    encoded = made.encode(huge)
    text = render(Page("d", {}), [Shown(huge, encoded, [0, 1], "row 0")], made)
    assert text.count('<span class="tok') == 5000
    assert f"and {len(spans(encoded, made)) - 5000} more tokens" in text


def test_a_page_without_examples_says_so(preprocessor):
    assert "None: the split is empty" in render(Page("d", {}), [], preprocessor())


def test_a_histogram_counts_every_value():
    svg = histogram("t", [1, 1, 2, 5, 40], x_label="x", bins=10)
    assert sum(int(count) for count in re.findall(r": (\d+)</title></rect>", svg)) == 5
    assert histogram("none", [], x_label="x").startswith("<svg")
    assert '="middle">6.5<' not in histogram("one value", [6, 6], x_label="crops")  # there are no half crops
    far = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="(\w+)">(\d+)<', histogram("t", [0, 15000], x_label="x"))
    x, anchor, _ = next(label for label in far if label[2] == "15000")
    assert anchor == "end" and float(x) <= 360  # within the drawing, with all its digits
    shares = histogram("t", [0.25, 1.0, 0.999], x_label="x", percent=True)
    assert sum(int(count) for count in re.findall(r": (\d+)</title></rect>", shares)) == 3


def test_an_example_that_is_refused_is_a_card_with_its_error(preprocessor, tmp_path, monkeypatch):
    """The others are shown and counted as if it was not there; a picture that nobody can decode is left out."""
    monkeypatch.chdir(tmp_path)
    stamp = {"version": 1, "params": {}, "inputs": {}, "code": "", "summary": {}}
    preprocessor(max_images=2).save_pretrained("artifacts/checkpoints/m/step-000000")
    album = replace(example("album<1>"), images=(picture(90, 150), picture(60, 60), picture(64, 80)))
    conversations = album.conversations[:1]  # points need to know in which picture they lie
    album = replace(album, conversations=conversations)
    broken = replace(album, id="broken", images=(Image(b"GIF89a" + b"\0" * 300_000, 90, 150, "GIF"),))
    written = [("train", one) for one in (example("first"), album, broken, example("last"))]
    write_shards(written, "artifacts/shards/d", 20_000_000)
    write_manifest("artifacts/shards/d", schema="molmo/shards", **stamp)
    params = Params(seed=1, datasets={"d": DatasetConfig(family="chat")}, models={"m": ModelConfig()})
    text = visualize.write(params, {"dataset": "d", "examples": "4"}, []).read_text()
    assert text.count('<article class="example"') == 4 and text.count('<p class="tokens">') == 2
    reason = "album&lt;1&gt;: has 3 images, more than max_images 2; raise the model&#39;s preprocessing.max_images"
    assert f"preprocessing:</strong> example {reason}" in text
    cards = {card.split("<span")[0].strip(): card for card in text.split("<h3>")[1:]}
    assert [cards["album&lt;1&gt;"].count("<img"), cards["broken"].count("<img")] == [3, 0]
    assert "cannot be decoded" in cards["broken"]
    assert f"<dd>1 of 4 examples, first: example {reason}</dd>" in text  # sizes tell nothing of broken pictures
    assert "Tokens of 3 of 4 examples" in text


@pytest.mark.slow
def test_the_command_shows_what_a_run_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    few = [f"datasets.{name}.{split}_examples=6" for name in ("charts", "digit_scenes") for split in ("train", "eval")]
    few += ["runs.sft.train.steps=2", "runs.sft.train.save_every=2", "eval.checkpoints=[sft/step-000002]"]
    params = load_params(overrides=few)
    run(assemble.STAGE, params, model="base")
    for name in ("charts", "digit_scenes"):
        run(shards.STAGE, params, dataset=name)
    visualize.main(["dataset=charts", "split=eval", "examples=3", *few])
    text = Path("artifacts/looks/charts.html").read_text()
    assert text.count('<article class="example"') == 3 and "chart-eval-" in text and "chart-train-" not in text
    run(mixture.STAGE, params, run="sft")
    visualize.main(["dataset=charts", "run=sft", "examples=5", "out=page.html", *few])
    text = Path("page.html").read_text()
    assert text.count('<article class="example"') == 5 and "entry charts, epoch 0" in text and "30.00%" in text
    packs = params.runs["sft"].train.packs_per_step * 2
    document = json.loads(Path("artifacts/mixture/sft/mixture.json").read_text())
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>.*<td>(\d+)</td><td>[\d.]+</td></tr>', text)
    assert {name: int(drawn) for name, drawn in rows} == document["packing"]["drawn"]
    assert f"first {packs} packs," in text  # those of the run, not all that its last window was planned for
    capsys.readouterr()
    for argv, words in (
        (["dataset=charts", "id=nobody"], "no example 'nobody'"),
        (["dataset=nothing"], "unknown dataset 'nothing'"),
        (["dataset=charts", "run=nope"], "unknown run 'nope'"),
        # its tasks ask digit_scenes, which is no drawing from it
        (
            ["dataset=digit_scenes", "run=sft", "runs.sft.mixture.scenes.dataset=charts"],
            "draws nothing of dataset 'digit_scenes'; it draws from charts",
        ),
        (["dataset=charts", "model=nope"], "unknown model 'nope'"),
        (["dataset=charts", "split=eval", "examples=1", "out=artifacts"], "out=artifacts cannot be written"),
    ):
        with pytest.raises(SystemExit) as refused:
            visualize.main([*argv, *few])
        assert refused.value.code == 2 and words in capsys.readouterr().err


def test_wrong_options_are_refused_by_name():
    for argv, words in (
        (["run=sft"], "dataset= is missing"),
        (["dataset=a", "examples=0"], "examples=0"),
        (["dataset=a", "colour=red"], "colour=red"),
        (["dataset=a", "dataset=b"], "twice"),
        (["dataset=a", "run=r", "split=eval"], "split="),
    ):
        with pytest.raises(ConfigError, match=words):
            visualize.parse(argv)
