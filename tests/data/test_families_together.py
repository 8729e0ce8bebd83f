"""Six families in one mixture: from small copies over shards to tokens, with every answer where a model learns it."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Features, Image, List, Value

from molmo_model.config import MixtureEntry
from molmo_model.data.mixture import ExampleCost, resolve
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.model_config import PreprocessingConfig, SystemPrompt, VideoConfig
from molmo_model.preprocessing.collator import collate
from molmo_model.preprocessing.preprocessor import IGNORE, Preprocessor
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from molmo_model.preprocessing.tokenizer import load_tokenizer
from tests.data.films import film
from tests.data.snapshots import downloads, hub_image, json_lines, png, read, write_split

TEXT = Value("string")
POINTS = {"x": Value("float64"), "y": Value("float64")}
FOUND = '<points x1="10.5" y1="20.0" x2="61.2" y2="9.9" alt="cups">cups</points>'
ANSWERS = {
    "pixmo_points": [
        ("pointing", FOUND),
        ("point_count", f"Counting the {FOUND} shows a total of 2."),
        ("pointing", "There are none."),
        ("point_count", "There are none."),
    ],
    "pixmo_cap": [("long_caption", "Two cups."), ("transcript", "I see two cups.")],
    "chart_qa": [("chart_qa", "14")],
    "tulu": [("text_sft", "Done.")],
    "llava_video_mc": [("video_multiple_choice", "B. A dog.")],
    "chat": [("chat", "A cup.")],
}
"""What evaluation expects of the first example of each family: style and last answer of every conversation."""


def copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    """A small copy of each set; the settings that read it."""
    urls = [f"https://pictures.example/{i}.png" for i in range(4)]
    listed = downloads(folder, {url: png(i, 40, 30) for i, url in enumerate(urls)}, monkeypatch)
    spots = [{"x": 61.2, "y": 9.9}, {"x": 10.5, "y": 20.0}]
    points = [
        {"image_url": url, "points": found, "count": len(found), "label": label, "collection_method": "pointing"}
        for url in urls
        for label, found in (("Cups", spots), ("dogs", []))
    ]
    features = {"image_url": TEXT, "points": List(POINTS), "count": Value("int64"), "label": TEXT}
    write_split(folder / "points", "train", points, Features(features | {"collection_method": TEXT}))
    captions = [{"image_url": url, "caption": "Two cups.", "transcripts": ["I see two cups.", "Cups."]} for url in urls]
    features = {"image_url": TEXT, "caption": TEXT, "transcripts": List(TEXT)}
    write_split(folder / "cap", "train", captions, Features(features))
    charts = [{"image": hub_image(i), "query": "How many?", "label": ["14"], "human_or_machine": 0} for i in range(4)]
    names = {"image": Image(), "query": TEXT, "label": List(TEXT), "human_or_machine": ClassLabel(names=["a", "b"])}
    for split in ("train", "val"):
        write_split(folder / "charts", split, charts if split == "train" else charts[:0], Features(names))
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Sum it up."), ("assistant", "Done.")]
    chats = [{"id": f"{i}", "messages": [{"role": role, "content": said} for role, said in turns]} for i in range(4)]
    write_split(
        folder / "tulu", "train", chats, Features({"id": TEXT, "messages": List({"role": TEXT, "content": TEXT})})
    )
    part = folder / "films" / "0_30_s_nextqa"
    part.mkdir(parents=True)
    questions = []
    for i in range(4):
        (part / f"{i}.mp4").write_bytes(film(range(0, (20 + i) * 1001, 1001), size=(64, 48)))
        said = [
            {"from": "human", "value": "<image>\nWhich?\nA. A cup.\nB. A dog."},
            {"from": "gpt", "value": "B. A dog."},
        ]
        questions.append({"id": f"{i}", "data_source": part.name, "video": f"{i}.mp4", "conversations": said})
    (part / "0_30_s_nextqa_mc_qa_processed.json").write_text(json.dumps(questions))
    asked = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cup."}]
    for i in range(4):
        (folder / f"own{i}.png").write_bytes(png(100 + i, 33, 21))
    own = json_lines(
        folder / "own.jsonl", [{"id": f"{i}", "images": [f"own{i}.png"], "messages": asked} for i in range(4)]
    )
    return {
        "pixmo_points": {"path": folder / "points", "downloads": listed},
        "pixmo_cap": {"path": folder / "cap", "downloads": listed},
        "chart_qa": {"path": folder / "charts"},
        "tulu": {"path": folder / "tulu"},
        "llava_video_mc": {"path": folder / "films"},
        "chat": {"path": own},
    }


def preprocessor() -> Preprocessor:
    config = PreprocessorConfig.build(
        PreprocessingConfig(
            max_crops=2,
            overlap_margins=[1, 1],
            system_prompt=SystemPrompt.style,
            video=VideoConfig(max_frames=4),
        ),
        image_size=64,
        patch_size=16,
        pooling_size=2,
        resize="siglip",
        vocab_size=520,
    )
    return Preprocessor(config, load_tokenizer("molmo_model/preprocessing/tokenizers/bytes512"))


def answers(made: Preprocessor, encoded) -> list[str]:
    """The text of each branch's last answer, as its labels spell it."""
    said = []
    for segment in sorted(set(encoded.segment_ids[encoded.labels != IGNORE].tolist())):
        labels = encoded.labels[(encoded.segment_ids == segment) & (encoded.labels != IGNORE)]
        ends = np.flatnonzero(labels == made.eos_id)
        assert ends[-1] == len(labels) - 1, "every answer ends with the token that ends it"
        start = ends[-2] + 1 if len(ends) > 1 else 0
        said.append(made.decode(labels[start:-1].tolist()).strip())
    return said


def test_families_become_tokens(tmp_path, monkeypatch):
    """Shards of six families, one mixture, and every example encoded: costs hold and answers are what was published."""
    made, readers, packs = preprocessor(), {}, []
    for name, config in copies(tmp_path, monkeypatch).items():
        rows = read(name, **{**config, "eval_fraction": 0.0})
        write_shards(rows, tmp_path / "shards" / name, 100_000)
        readers[name] = ShardReader(tmp_path / "shards" / name)

    def cost_of(example):
        sizes = [(image.width, image.height) for image in example.images]
        cost = made.cost_parts(sizes, example.conversations, example.id, example.videos)
        return ExampleCost(cost.prefix, cost.crops, cost.branches)

    entries = {name: MixtureEntry(dataset=name, rate=1.0) for name in readers}
    mixture = resolve(entries, 3, readers, cost_of)
    assert {(len(entry.rows), entry.share) for entry in mixture.entries} == {(4, mixture.entries[0].share)}
    for name, reader in readers.items():
        rng = np.random.default_rng(0)
        for row in range(4):
            example = reader.read(row)
            cost = cost_of(example)
            drawn = made.encode(example, rng=rng)
            assert len(drawn) <= cost.tokens + sum(cost.conversations) and len(drawn.pixels) == cost.crops
        packs.append(drawn)
        first = reader.read(0)
        encoded = made.encode(first)
        assert [talk.style for talk in first.conversations] == [style for style, _ in ANSWERS[name]]
        assert answers(made, encoded) == [answer for _, answer in ANSWERS[name]]
        assert (encoded.loss_weights[encoded.labels != IGNORE] > 0).all()
        text = made.decode(encoded.input_ids[encoded.image_ids == 0].tolist())
        assert all(f"{style}:" in text for style, _ in ANSWERS[name])
    batch = collate([packs[:3], packs[3:]], None, made.config, made.pad_id)
    assert len(batch["pixel_values"]) == sum(len(one.pixels) for one in packs)
    assert batch["example_ids"].amax(dim=1).tolist() == [2, 2], "pictures, text alone and films in one batch"
