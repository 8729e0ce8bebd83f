"""What may and what must not be reused: one change at a time to a small cell of three questions, as a table.

    python -m tests.eval.test_journal_keys       prints the table with what was found

The cell is real in all that its keys are taken from: a checkpoint's folder with a manifest, params, shards, sources,
installed versions. No model runs.
"""

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from molmo_model import remembered, source_digest
from molmo_model.artifacts import write_manifest
from molmo_model.config import Params, params_from_dict
from molmo_model.data.example import Conversation, Example, Image, Message, Video
from molmo_model.data.shard_reader import ShardReader
from molmo_model.data.shards import write_shards
from molmo_model.data.timeline import Timeline
from molmo_model.eval import journal
from molmo_model.preprocessing.preprocessor_config import PreprocessorConfig
from pipelines import predict

ROOT = Path(__file__).resolve().parents[2]
ALL = "one two film"
"""The items: one picture; two pictures in a talk of two turns; a part of a film."""
VERSIONS = dict.fromkeys((*journal.LIBRARIES, *journal.QUANTIZING_LIBRARIES, "scipy", "pandas"), "1.0")


CONFIG = b'{"layer_norm_eps": 1e-06, "text_config": {"model_type": "qwen2"}}'


def talk(*texts: str, style: str = "any_qa", **fields: Any) -> Conversation:
    turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return Conversation(style, tuple(turns), **fields)


def examples() -> dict[str, Example]:
    pictures = [Image(f"picture {n}".encode(), 64, 48, "PNG") for n in range(3)]
    film = Video(b"film", 64, 48, "MP4", Timeline((1, 30), 0, ((1, 90),), 1, (0, 30, 60)), (0.5, 2.0))
    made = {
        "one": Example("one", tuple(pictures[:1]), (talk("What is it?", "A cat."),)),
        "two": Example("two", tuple(pictures[1:]), (talk("What is left?", "A dog.", "And right?", "A hen."),)),
        "film": Example("film", (), (talk("What happens?", "Rain falls."),), videos=(film,)),
    }
    return {name: dataclasses.replace(one, metadata={"was": name}) for name, one in made.items()}


@dataclass
class Project:
    """All that the keys of a cell are taken from, to be changed by a mutation."""

    files: dict[str, bytes]
    params: dict[str, Any]
    examples: dict[str, Example] = field(default_factory=examples)
    versions: dict[str, str] = field(default_factory=lambda: dict(VERSIONS))
    sources: dict[str, Callable[[str], str]] = field(default_factory=dict)
    checkpoint: str = "base/step-000000"
    task: str = "asked"
    dataset: str = "pictures"
    place: str = "project"

    @classmethod
    def plain(cls) -> "Project":
        preprocessor = PreprocessorConfig(image_size=64, patch_size=16, pooling_size=(2, 2), resize="siglip",
                                          vocab_size=600, max_crops=4, overlap_margins=(1, 1))  # fmt: skip
        files = {
            "config.json": CONFIG,
            "generation_config.json": b'{"eos_token_id": 1}',
            "model-00001.safetensors": b"first weights",
            "model-00002.safetensors": b"second weights",
            "model.safetensors.index.json": b"{}",
            "molmo_preprocessor.json": json.dumps(preprocessor.to_json()).encode(),
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b"{}",
            "special_tokens_map.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "params.json": b"{}",
            "train_state/rank-0.distcp": b"moments",
        }
        task = {"metric": "exact_match", "max_new_tokens": 8, "split": "eval"}
        return cls(files, {"task": task, "eval": {}, "runtime": {}, "seed": 1})

    def keys(self, folder: Path) -> dict[str, str]:
        """The key of each item, by the name that its example carries."""
        folder = folder / self.place
        checkpoint = folder / "artifacts/checkpoints" / self.checkpoint
        for name, data in self.files.items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_bytes(data)
        made_from = {"version": 1, "params": {}, "inputs": {}, "code": "c", "summary": {}}
        write_manifest(checkpoint, schema="molmo/checkpoint", **made_from)
        shards = folder / "artifacts/shards" / self.dataset
        write_shards((("eval", one) for one in self.examples.values()), shards, 10**7)
        write_manifest(shards, schema="molmo/shards", **made_from)
        raw = {
            "version": 2,
            "seed": self.params["seed"],
            "datasets": {self.dataset: {"family": "digit_scenes"}},
            "tasks": {self.task: {"dataset": self.dataset, **self.params["task"]}},
            "eval": self.params["eval"],
            "runtime": self.params["runtime"],
        }
        params = read_params(json.dumps(raw, sort_keys=True))
        cell = {"checkpoint": self.checkpoint, "task": self.task}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "version", self.versions.__getitem__)
            if self.sources:
                self._edit_sources(folder / "sources", patch)
            planned = predict.plan(params, cell, checkpoint, ShardReader(shards))
        if self.sources:
            source_digest.forget_sources()
        was = (item.example.metadata["was"] for item in planned.items)
        return dict(zip(was, planned.keys, strict=True))

    def _edit_sources(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        for package in source_digest.PACKAGES:
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "tokenizers"))
        for name, edit in self.sources.items():
            text = (root / name).read_text(encoding="utf-8")
            assert edit(text) != text, name
            (root / name).write_text(edit(text), encoding="utf-8")
        patch.setattr(source_digest, "ROOT", root)
        source_digest.forget_sources()


@cache
def read_params(raw: str) -> Params:
    return params_from_dict(json.loads(raw), "test")


Change = Callable[[Project], Any]


@dataclass(frozen=True)
class Mutation:
    """One change, and the items whose answers must be computed again."""

    name: str
    change: Change
    missing: str = ALL
    given: Change = lambda project: None
    """What holds before and after, where the change makes no sense without it."""


def file(name: str, data: bytes) -> Change:
    return lambda project: project.files.update({name: data})


def one_byte(name: str) -> Change:
    def change(project: Project) -> None:
        data = bytearray(project.files[name])
        data[len(data) // 2] ^= 1
        project.files[name] = bytes(data)

    return change


def preprocessor(**fields: Any) -> Change:
    def change(project: Project) -> None:
        document = json.loads(project.files["molmo_preprocessor.json"])
        assert fields.keys() <= document.keys(), sorted(document)
        project.files["molmo_preprocessor.json"] = json.dumps({**document, **fields}).encode()

    return change


def task(**fields: Any) -> Change:
    return lambda project: project.params["task"].update(fields)


def decoding(**fields: Any) -> Change:
    return lambda project: project.params["task"].setdefault("decoding", {}).update(fields)


def evaluation(**fields: Any) -> Change:
    return lambda project: project.params["eval"].update(fields)


def runtime(**fields: Any) -> Change:
    return lambda project: project.params["runtime"].update(fields)


def library(name: str) -> Change:
    return lambda project: project.versions.update({name: "1.0.1"})


def source(name: str, edit: Callable[[str], str]) -> Change:
    return lambda project: project.sources.update({name: edit})


def added(text: str) -> Callable[[str], str]:
    return lambda old: old + text


def example(name: str, **fields: Any) -> Change:
    def change(project: Project) -> None:
        project.examples[name] = dataclasses.replace(project.examples[name], **fields)

    return change


def said(name: str, *texts: str, **fields: Any) -> Change:
    return example(name, conversations=(talk(*texts, **fields),))


def image(number: int, **fields: Any) -> Change:
    def change(project: Project) -> None:
        images = list(project.examples["two"].images)
        images[number] = dataclasses.replace(images[number], **fields)
        example("two", images=tuple(images))(project)

    return change


def film(**fields: Any) -> Change:
    def change(project: Project) -> None:
        (video,) = project.examples["film"].videos
        example("film", videos=(dataclasses.replace(video, **fields),))(project)

    return change


def timeline(**fields: Any) -> Change:
    def change(project: Project) -> None:
        (video,) = project.examples["film"].videos
        film(timeline=dataclasses.replace(video.timeline, **fields))(project)

    return change


def messages(name: str, place: int, **fields: Any) -> Change:
    def change(project: Project) -> None:
        (conversation,) = project.examples[name].conversations
        turns = list(conversation.messages)
        turns[place] = dataclasses.replace(turns[place], **fields)
        example(name, conversations=(dataclasses.replace(conversation, messages=tuple(turns)),))(project)

    return change


def pointed(label: str) -> Change:
    turns = (Message("user", None, label=label), Message("assistant", points=((1.0, 2.0),), label=label))
    return example("one", conversations=(Conversation("scene_point", turns),))


def offered(*options: str) -> Change:
    turns = (Message("user", "Which one?", options=options), Message("assistant", "A"))
    return example("one", conversations=(Conversation("any_qa", turns),))


def reverse_images(project: Project) -> None:
    example("two", images=project.examples["two"].images[::-1])(project)


def fields_of(name: str, value: Any) -> Change:
    return lambda project: setattr(project, name, value)


def reverse_examples(project: Project) -> None:
    project.examples = dict(reversed(project.examples.items()))


def other_conversation_in_front(project: Project) -> None:
    """The question becomes number 1 of its example; the new one is of a style that is not asked."""
    talks = (talk("What else?", "Nothing.", style="other_qa"), *project.examples["one"].conversations)
    example("one", conversations=talks)(project)


SAMPLED, BEAMS, LOSS = decoding(do_sample=True), decoding(num_beams=3), task(kind="loss")
INT8 = evaluation(quantization="int8")
SLOTS, GENERATE, SERVED = (f"molmo_model/eval/{name}.py" for name in ("slot_inference", "inference", "served"))
MODEL, PICTURES = "molmo_model/nn/molmo.py", "molmo_model/preprocessing/crops.py"
BY_GENERATE, BY_SERVER = evaluation(engine="generate"), evaluation(engine="openai", served_model="ours")
CODE = "\n\ndef more(a: int) -> int:\n    return a + 1\n"

MUST_MISS = [
    Mutation("one byte of the first weights file", one_byte("model-00001.safetensors")),
    Mutation("one byte of the last weights file", one_byte("model-00002.safetensors")),
    Mutation("one more weights file", file("model-00003.safetensors", b"more")),
    Mutation("a value of the model's config", file("config.json", CONFIG.replace(b"1e-06", b"1e-05"))),
    Mutation("one byte of the model's config", file("config.json", CONFIG + b" ")),
    Mutation("the language model's family", file("config.json", CONFIG.replace(b"qwen2", b"qwen3"))),
    Mutation("the generation config", file("generation_config.json", b'{"eos_token_id": 2}')),
    Mutation("no generation config", lambda project: project.files.pop("generation_config.json")),
    Mutation("the tokenizer", file("tokenizer.json", b'{"a": 1}')),
    Mutation("the tokenizer's config", one_byte("tokenizer_config.json")),
    Mutation("the special tokens", file("special_tokens_map.json", b'{"eos": 1}')),
    Mutation("a new tokenizer file", file("merges.txt", b"a b")),
    Mutation("preprocessor: most crops", preprocessor(max_crops=5)),
    Mutation("preprocessor: crop mode", preprocessor(crop_mode="resize")),
    Mutation("preprocessor: overlap", preprocessor(overlap_margins=[1, 0])),
    Mutation("preprocessor: pooling", preprocessor(pooling_size=[1, 1])),
    Mutation("preprocessor: exact resize", preprocessor(exact_resize=True)),
    Mutation("preprocessor: system prompt", preprocessor(system_prompt="style")),
    Mutation("preprocessor: message format", preprocessor(message_format="role")),
    Mutation("preprocessor: point format", preprocessor(point_format="html_v2")),
    *(Mutation(f"version of {name}", library(name)) for name in journal.LIBRARIES),
    Mutation("version of bitsandbytes, where it computes", library("bitsandbytes"), given=INT8),
    Mutation("precision bf16", evaluation(precision="bf16")),
    Mutation("precision fp16", evaluation(precision="fp16")),
    Mutation("precision bf16 weights", evaluation(precision="bf16_weights")),
    Mutation("quantization int8", evaluation(quantization="int8")),
    Mutation("quantization int4 in place of int8", evaluation(quantization="int4"), given=INT8),
    Mutation("most new tokens", task(max_new_tokens=9)),
    Mutation("most crops", task(max_crops=2)),
    Mutation("most frames", task(max_frames=2)),
    Mutation("share of image tokens", task(keep_image_tokens=0.5)),
    Mutation("a loss in place of an answer", LOSS),
    Mutation("the reference, where its loss is measured", messages("one", 1, text="A kitten."), "one", LOSS),
    Mutation("beams", BEAMS),
    Mutation("length penalty of beams", decoding(length_penalty=0.5), given=BEAMS),
    Mutation("sampling", SAMPLED),
    Mutation("seed of sampling", decoding(seed=1), given=SAMPLED),
    Mutation("temperature", decoding(temperature=0.7), given=SAMPLED),
    Mutation("top k", decoding(top_k=5), given=SAMPLED),
    Mutation("top p", decoding(top_p=0.9), given=SAMPLED),
    Mutation("repetition penalty", decoding(repetition_penalty=1.1)),
    Mutation("no repeated n-grams", decoding(no_repeat_ngram_size=3)),
    Mutation("least new tokens", decoding(min_new_tokens=2)),
    Mutation("one byte of a picture", image(0, data=b"picture 0"), "two"),
    Mutation("one byte of the second picture", image(1, data=b"picture 9"), "two"),
    Mutation("order of pictures", reverse_images, "two"),
    Mutation("a picture less", example("two", images=examples()["two"].images[:1]), "two"),
    Mutation("a picture more", example("one", images=examples()["two"].images), "one"),
    Mutation("width of a picture in the shards", image(0, width=65), "two"),
    Mutation("format of a picture in the shards", image(0, format="WEBP"), "two"),
    Mutation("one byte of a film", film(data=b"filn"), "film"),
    Mutation("end of the part of a film", film(clip=(0.5, 2.5)), "film"),
    Mutation("begin of the part of a film", film(clip=(0.25, 2.0)), "film"),
    Mutation("the whole film", film(clip=None), "film"),
    Mutation("times of a film's frames", timeline(steps=((2, 90),)), "film"),
    Mutation("clock of a film", timeline(time_base=(1, 25)), "film"),
    Mutation("a letter of the question", messages("one", 0, text="What is it."), "one"),
    Mutation("a space in the question", messages("one", 0, text="What is  it?"), "one"),
    Mutation("the first question of two", messages("two", 0, text="What is up?"), "two"),
    Mutation("the answer in front of the question", messages("two", 1, text="A cow."), "two"),
    Mutation("the same words in other turns", said("two", "What is left?", "A dog. And", "right?", "A hen."), "two"),
    Mutation("a turn less", said("two", "What is left?", "A dog."), "two"),
    Mutation("what is pointed at", pointed("dogs"), "one", pointed("cats")),
    Mutation("the choices of a question", offered("x", "z"), "one", offered("x", "y")),
    Mutation("order of choices", offered("y", "x"), "one", offered("x", "y")),
    Mutation("another engine", BY_GENERATE),
    Mutation("a server", BY_SERVER),
    Mutation("another model of the server", evaluation(served_model="theirs"), given=BY_SERVER),
    Mutation("a line of the engine that auto stands for", source(SLOTS, added(CODE))),
    Mutation("a line of the engine generate", source(GENERATE, added(CODE)), given=BY_GENERATE),
    Mutation("a line of the engine openai", source(SERVED, added(CODE)), given=BY_SERVER),
    Mutation("a line of the model", source(MODEL, added(CODE))),
    Mutation("a line of the preprocessing", source(PICTURES, added(CODE))),
    Mutation("a number in the model's code", source("molmo_model/nn/generation.py", added("\n\nMOST = 1\n"))),
    Mutation("a template of prompts", source("molmo_model/preprocessing/templates.py", added("\n\nMORE = 1\n"))),
]

CANNOT_MATTER = [
    Mutation("folder of the project", fields_of("place", "elsewhere")),
    Mutation("name of the checkpoint", fields_of("checkpoint", "copy/step-000009")),
    Mutation("name of the task", fields_of("task", "renamed")),
    Mutation("name and folder of the dataset", fields_of("dataset", "renamed")),
    Mutation("batch size", runtime(eval_batch_size=3)),
    Mutation("ranks", runtime(eval_ranks=7)),
    Mutation("workers of the loader", runtime(loader_workers=5)),
    Mutation("where journals are shared", runtime(journal="s3://bucket/journal")),
    Mutation("address of a server", runtime(engine_url="http://127.0.0.1:9/v1")),
    Mutation("requests to a server", runtime(engine_requests=2)),
    Mutation("the judge", evaluation(judge="openai", judge_model="judge")),
    Mutation("confidence of intervals", evaluation(confidence=0.9)),
    Mutation("examples in the report", evaluation(report_examples=2)),
    Mutation("the metric", task(metric="count")),
    Mutation("groups", task(groups=["paper"])),
    Mutation("gates", task(gate={"minimum": 0.5})),
    Mutation("styles that are asked", task(styles=["any_qa"])),
    Mutation("the experiment's seed", lambda project: project.params.update(seed=2)),
    Mutation("order of items", reverse_examples),
    Mutation("ids of examples", example("one", id="another")),
    Mutation("number of the conversation", other_conversation_in_front, given=task(styles=["any_qa"])),
    Mutation("metadata of an example", example("one", metadata={"was": "one", "more": 1})),
    Mutation("metadata of a question", said("one", "What is it?", "A cat.", metadata={"answers": ["cat"]})),
    Mutation("weight of a conversation", said("one", "What is it?", "A cat.", weight=2.0)),
    Mutation("the reference", messages("one", 1, text="A kitten.")),
    Mutation("another style that asks the same", said("one", "What is it?", "A cat.", style="other_qa")),
    Mutation("the optimizer's state", file("train_state/rank-0.distcp", b"others")),
    Mutation("one more rank of it", file("train_state/rank-1.distcp", b"more")),
    Mutation("the record of the params", file("params.json", b'{"seed": 2}')),
    Mutation("index of the weights", file("model.safetensors.index.json", b'{"a": 1}')),
    Mutation("chat template", file("chat_template.jinja", b"{{ other }}")),
    Mutation("adapters beside the merged weights", file("adapter/adapter_model.safetensors", b"low rank")),
    Mutation("version of scipy", library("scipy")),
    Mutation("version of bitsandbytes, where it does not compute", library("bitsandbytes")),
    Mutation("the engine that auto stands for, by its name", evaluation(engine="slots")),
    Mutation("a line of an engine that does not answer", source(GENERATE, added(CODE))),
    Mutation("a comment in the engine", source(SLOTS, added("\n# a comment\n"))),
    Mutation("a docstring of the model", source(MODEL, lambda text: text.replace('"""', '"""More. ', 1))),
    Mutation("empty lines in the preprocessing", source(PICTURES, lambda text: text.replace("\n\n", "\n\n\n", 1))),
    Mutation("a metric's code", source("molmo_model/eval/metrics/text.py", added(CODE))),
    Mutation("the report's code", source("molmo_model/eval/report.py", added(CODE))),
    Mutation("a row of the table of evaluation sets", source("molmo_model/benchmarks.py", added(CODE))),
    Mutation("a preset of a model", source("molmo_model/presets.py", added(CODE))),
    Mutation("the classes of the params", source("molmo_model/config.py", added(CODE))),
    Mutation("the journal's code", source("molmo_model/eval/journal.py", added(CODE))),
    Mutation("the trainer's code", source("molmo_model/train/trainer.py", added(CODE))),
]


@dataclass
class Found:
    """The items that a mutation made missing, in order."""

    mutation: Mutation
    missing: str


class Table:
    """Runs mutations; what holds before them is made once."""

    def __init__(self, folder: Path) -> None:
        self._folders = (folder / str(number) for number in itertools.count())
        self._before: dict[Change, dict[str, str]] = {}

    def keys(self, *changes: Change) -> dict[str, str]:
        project = Project.plain()
        for change in changes:
            change(project)
        folder = next(self._folders)
        try:
            return project.keys(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def found(self, mutation: Mutation) -> str:
        if mutation.given not in self._before:
            self._before[mutation.given] = self.keys(mutation.given)
        known, keys = self._before[mutation.given].values(), self.keys(mutation.given, mutation.change)
        return " ".join(name for name in ALL.split() if keys[name] not in known)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    with remembered.remembering(folder):
        yield Table(folder)


def test_the_table_has_the_number_of_rows_that_is_promised():
    names = [mutation.name for mutation in (*MUST_MISS, *CANNOT_MATTER)]
    assert len(MUST_MISS) >= 40
    assert len(CANNOT_MATTER) >= 12
    assert len(set(names)) == len(names)


def test_a_project_made_twice_has_the_same_different_keys(table):
    first = table.keys()
    assert table.keys() == first
    assert len(set(first.values())) == len(first) == 3


def test_whatever_can_change_an_answer_is_asked_again_and_nothing_else(table):
    wrong = {one.name: found for one in MUST_MISS if (found := table.found(one)) != one.missing}
    assert not wrong


def test_what_cannot_change_an_answer_is_found_again(table):
    wrong = {one.name: found for one in CANNOT_MATTER if (found := table.found(one))}
    assert not wrong


def test_every_library_of_an_engine_counts_or_is_known_to_change_nothing():
    """A library that somebody adds to an engine must be put on one of the two lists."""
    names = {"PIL": "pillow", "cv2": "opencv-python-headless"}
    # settings; bytes of the weights, which have a digest; keys of caches; a release of torch has exactly one of triton
    harmless = {"omegaconf", "safetensors", "xxhash", "triton", "molmo_model"}
    for engine in ("inference", "slot_inference"):
        used = {names.get(name, name) for name in imported_by(f"molmo_model.eval.{engine}") - harmless}
        assert used <= set(journal.LIBRARIES), engine


@pytest.mark.parametrize("engine", ["inference", "slot_inference"])
def test_an_engine_does_not_depend_on_params_and_tables_that_change_every_week(engine):
    """Whoever needs a setting's class there finds it in `molmo_model.decoding`; `lookup` is in `molmo_model.lookup`."""
    names = {path.relative_to(ROOT).as_posix() for path in source_digest.source_closure(f"molmo_model.eval.{engine}")}
    assert not names & {f"molmo_model/{name}.py" for name in ("config", "benchmarks", "presets", "eval/tasks")}


def imported_by(module: str) -> set[str]:
    import ast
    import sys

    found = set()
    for path in source_digest.source_closure(module):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, remembered.remembering(folder):
        table, wrong = Table(Path(folder)), 0
        for title, rows in (("must be asked again", MUST_MISS), ("must be found again", CANNOT_MATTER)):
            print(f"\n{title}: {len(rows)} changes of one thing each")
            for one in rows:
                wanted = one.missing if rows is MUST_MISS else ""
                found = table.found(one)
                wrong += found != wanted
                said = "MISS" if found else "HIT "
                print(f"  {said} {one.name:60} {found or '-':14}{'' if found == wanted else f' WRONG, not {wanted!r}'}")
        print(f"\n{len(MUST_MISS) + len(CANNOT_MATTER) - wrong} as they must be, {wrong} wrong")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
