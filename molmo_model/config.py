"""`params.yaml` as dataclasses: the only place where a hyperparameter lives.

`load_params()` reads the file, migrates old versions, applies `key=value` overrides and refuses what is unknown,
missing, of the wrong type or contradictory, by name. Nothing here imports torch: the transformers configuration of
the model is built from these dataclasses in `molmo_model.nn`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from molmo_model import aliases
from molmo_model.benchmarks import BENCHMARKS
from molmo_model.decoding import DecodingConfig, EvalPrecision, Quantization
from molmo_model.errors import ConfigError
from molmo_model.lookup import lookup, suggest
from molmo_model.model_config import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, ModelConfig
from molmo_model.model_config import BOUNDS as MODEL_BOUNDS
from molmo_model.presets import PRESETS, merge

PARAMS_VERSION = 2
"""The version that this code reads; older files are migrated by `migrate()`, newer ones are refused."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Names of datasets, models, runs and tasks: they become folders, URLs, partition keys and stages of DVC."""


class Precision(StrEnum):
    """Compute precision; parameters and optimizer state stay in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Engine(StrEnum):
    """What turns questions into answers; part of every answer's identity, `auto` by what it stands for."""

    auto = "auto"
    """`slots` where the checkpoint and the decoding allow it, else `generate`; the machine plays no part."""
    slots = "slots"
    """Our decoder: slots of a static cache, refilled as answers end (`molmo_model.nn.slots`)."""
    generate = "generate"
    """transformers' `generate`, batch after batch: beams, selected and pruned image tokens."""
    openai = "openai"
    """A server with OpenAI's chat API at `runtime.engine_url` that has the model `eval.served_model`."""


class JudgeProvider(StrEnum):
    """Who judges answers where a metric asks for it."""

    offline = "offline"
    """Nobody: cached judgements count, the others are reported as missing."""
    openai = "openai"
    """A server with OpenAI's chat API at `runtime.judge_url`."""


class TaskKind(StrEnum):
    """What a task asks of the model."""

    answer = "answer"
    """To answer."""
    loss = "loss"
    """Nothing: the loss on the reference answers is measured."""


class ActivationCheckpointing(StrEnum):
    """Which transformer blocks recompute their activations in the backward pass."""

    none = "none"
    full = "full"


@dataclass
class Expectations:
    """What a dataset as a whole should look like; less or more is a warning of the validate stage, never an error. A
    real set may differ from a usual one: say so here."""

    min_rows: int = 100
    """Conversations that are looked at."""
    max_drop_rate: float = 0.01
    """Bad rows of all rows."""
    min_eval_share: float = 0.001
    """Conversations held out for evaluation, of all."""
    max_eval_share: float = 0.5
    max_majority_answer: float = 0.9
    """Conversations with the most frequent answer of their style."""
    max_repeated_image: float = 0.5
    """Examples' conversations about a picture that an earlier example has too."""
    max_repeated_question: float = 0.1
    """Conversations that ask of the same pictures what an earlier conversation has asked."""
    max_repeated_text: float = 0.1
    """Long answers that an earlier example has word for word."""
    max_near_duplicates: float = 0.0
    """Evaluation examples with a picture that a training example shows too, as the same file or nearly so."""
    median_answer_chars: float = 2000
    """At most, in the middle of all answers."""
    max_answer_chars: int = 8000
    """Of 99% of the answers."""
    max_prompt_chars: int = 8000
    """Of 99% of what comes before the last answer."""
    min_short_side: int = 16
    """Pixels, of 99% of the pictures."""
    max_aspect: float = 10
    """Longer by shorter side, of 99% of the pictures."""
    max_style_divergence: float = 0.1
    """Kullback-Leibler divergence, in nats, of evaluation's styles from training's."""


@dataclass
class DatasetConfig:
    """One dataset: where its examples come from and how many become shards."""

    family: str = MISSING
    """A name of the table in `molmo_model.data.datasets`; `chat` reads your own JSONL or Parquet file."""
    path: str | None = None
    """Where the data lie: the `.jsonl` or `.parquet` file of a `chat` dataset (local path or URL), or a local snapshot
    of a published dataset (folder, `.parquet`, `.jsonl` or `.tar` files). None: the family's own hub repository."""
    revision: str | None = None
    """Commit, tag or branch of a published dataset; None is the one that the family names."""
    downloads: str | None = None
    """List of what could be downloaded, for datasets of URLs: `python -m pipelines.download dataset=NAME` writes it."""
    image_root: str | None = None
    """Folder that relative image paths start from; default: the folder of `path`."""
    train_examples: int | None = None
    """Number of training examples to make (built-in families); None means all there are."""
    eval_examples: int | None = None
    """Number of evaluation examples to make (built-in families); None means all there are."""
    eval_fraction: float = 0.1
    """Share of a `chat` file's examples that is held out for evaluation, chosen by a hash of the images."""
    tolerance: float = 0.0
    """Largest share of bad rows that is skipped and listed; one more and the stage fails."""
    max_image_pixels: int = 50_000_000
    """Images of more pixels are refused before they are decoded."""
    shard_bytes: int = 64_000_000
    """A tar shard is closed once it holds this many bytes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the family; checked against the family's own dataclass."""
    expectations: Expectations = field(default_factory=Expectations)
    """Thresholds of the validate stage; the shards do not depend on them."""


class MixtureRule(StrEnum):
    """How the entries of a group share its rate; docs/mixtures.md has both with numbers."""

    flat = "flat"
    """In the ratio of their rates."""
    root_size = "root_size"
    """In the ratio of rate times square root of size."""


@dataclass
class MixtureEntry:
    """One source of a mixture, some styles of one dataset; or, with `entries`, a group of such, to any depth."""

    dataset: str = ""
    """A name under `datasets:`; a group has none."""
    rate: float = 1.0
    """Share of examples drawn from this entry, relative to the others beside it; under `root_size`, a factor of it."""
    styles: list[str] = field(default_factory=list)
    """Conversations of these styles are kept; empty keeps all."""
    max_conversations: int | None = None
    """At most this many conversations of one example, drawn by the example's own generator; None keeps all."""
    weight: float = 1.0
    """Factor on the loss of every conversation that is drawn here, besides its own: Molmo2 has 0.2 for points, whose
    answers are long and easy, and 0.1 for captions of films."""
    size: float | None = None
    """What the root-size rule of the group around it takes for its size: None is the number of its examples (of a
    group, the sum over its entries), a number up to 1 that share of it (1.0 is all, not one), above 1 the number."""
    rule: MixtureRule = MixtureRule.flat
    """Of a group."""
    entries: dict[str, "MixtureEntry"] = field(default_factory=dict)
    """Makes this a group. Names of sources are unique in the whole mixture: a source's order is drawn from its name."""


@dataclass
class ComponentOptim:
    """Optimizer settings of one component: `vision`, `connector` or `language`."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    max_grad_norm: float = 1.0
    """Gradients of this component are clipped to this L2 norm, apart from the others."""
    freeze: bool = False
    unfreeze_step: int | None = None
    """With `freeze`: training of the component begins with this step, with a warm-up of its own; None never."""


@dataclass
class OptimConfig:
    """AdamW with its own learning rate, warm-up and clipping per component, and a cosine to `final_ratio`."""

    vision: ComponentOptim = field(default_factory=lambda: ComponentOptim(learning_rate=6e-6, warmup_steps=2000))
    connector: ComponentOptim = field(default_factory=lambda: ComponentOptim(learning_rate=2e-4, warmup_steps=200))
    language: ComponentOptim = field(default_factory=lambda: ComponentOptim(learning_rate=2e-5, warmup_steps=2000))
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-6
    final_ratio: float = 0.1
    """Learning rate at the last step, relative to its peak."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT; what they sit on is frozen."""

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by `alpha / rank`."""
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Last part of the names of the linear layers of the language model that get adapters."""
    train_connector: bool = True
    """The connector (extra embedding included) is trained whole beside the adapters."""


class PackingMethod(StrEnum):
    """How the packs of a window are found and ordered; see `molmo_model.data.packing`."""

    best_fit = "best_fit"
    """Best fit decreasing, packs in random order."""
    balanced = "balanced"
    """Fuller packs, and steps of packs of like cost, so that no rank waits for another; wants a `packing_window` of
    about 4,096."""


@dataclass
class TrainConfig:
    """How one run trains. Packs per step, not ranks, decide the batch, so any number of ranks sees the same data."""

    steps: int = MISSING
    """Optimizer steps."""
    packs_per_step: int = MISSING
    """Packs of one global batch; the ranks share them."""
    packs_per_microbatch: int = 1
    """Packs that one rank computes at once; the rest is accumulated, exactly as in one large batch."""
    sequence_length: int = MISSING
    """Tokens of one pack."""
    crops_per_pack: int = MISSING
    """Most image crops of one pack."""
    packing_window: int = 4096
    """Examples of the global stream that are packed together."""
    packing: PackingMethod = PackingMethod.balanced
    save_every: int = MISSING
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int | None = None
    """Keep the newest N checkpoints besides those named in `eval.checkpoints`; None keeps all."""
    processes: int = 2
    """Ranks that torchrun starts on this machine; part of the run's identity, because sums of floats depend on it."""
    threads: int = 1
    """Threads of torch in each rank; part of the run's identity for the same reason."""
    precision: Precision = Precision.fp32
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    compile: bool = False
    """Compiles each transformer block (`torch.compile`): about a minute at the start, then faster steps; for GPUs."""
    deterministic: bool = True
    z_loss: float = 0.0
    """Factor of the squared log-partition term, 1e-4 in Molmo; 0 is off."""
    bad_examples: float = 0.0
    """Largest share of the run's examples that may turn out corrupt or undecodable; they are skipped and listed in
    `skipped.jsonl`. One more ends the run, and 0 ends it at the first."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig | None = None
    """Trains adapters instead of the language model; checkpoints hold the merged weights."""


class MixtureSchedule(StrEnum):
    """How the positions of a run's stream are dealt to the sources of its mixture."""

    stratified = "stratified"
    """Evenly: after any number of positions no source is a whole example off its rate."""
    sampled = "sampled"
    """Each position by itself, as a weighted die would: off by about the square root of the examples drawn."""


class LeakRule(StrEnum):
    """What the mixture does with training examples that show a picture of evaluation."""

    refuse = "refuse"
    """It stops, and names them."""
    drop = "drop"
    """It leaves them out before anything is counted, and lists them."""


@dataclass
class RunConfig:
    """A named training."""

    model: str = MISSING
    """A name under `models:`."""
    init: str = MISSING
    """Where the weights come from: the name of a model (its assembled weights) or of another run (its last step)."""
    mixture: dict[str, MixtureEntry] = field(default_factory=dict)
    """Sources and groups of them by name; at this level their rates count as they are."""
    schedule: MixtureSchedule = MixtureSchedule.stratified
    allow_leaks: list[str] = field(default_factory=list)
    """Ids of training examples that may show a picture of evaluation: of its own datasets or of those of any task."""
    leaks: LeakRule = LeakRule.refuse
    """What becomes of all others that do."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class GateConfig:
    """What a task's primary number must keep for an asset check to pass; without settings nothing is checked."""

    minimum: float | None = None
    """The mean must not be below; for numbers of which lower is better, not above."""
    against: str | None = None
    """A checkpoint, `<run>/step-<six digits>`, that must not be significantly better, example by example."""
    most_loss: float = 0.0
    """By so much the mean may be worse than that of `against` before it is tested."""
    p_value: float = 0.05
    """A difference counts below this two-sided p-value of the paired test."""
    blocking: bool = True
    """True: nothing downstream is made when it fails; False: a warning."""


@dataclass
class TaskConfig:
    """One evaluation task: which conversations are asked and how the answers are scored."""

    benchmark: str | None = None
    """A row of the table in `molmo_model.benchmarks`: what is left out here is as it says."""
    dataset: str = MISSING
    styles: list[str] = field(default_factory=list)
    """Conversations of these styles are asked; empty asks all."""
    metric: str = MISSING
    """A name of the table in `molmo_model.eval.metrics`."""
    also: list[str] = field(default_factory=list)
    """Further metrics of the same answers; `metric` has the number that leaderboards show."""
    groups: list[str] = field(default_factory=list)
    """Groups whose average the report shows, such as `paper`."""
    kind: TaskKind = TaskKind.answer
    split: str = "eval"
    max_new_tokens: int = 32
    max_examples: int | None = None
    """Ask the first N conversations (in id order of the index); None asks all."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    keep_image_tokens: float = 1.0
    """Share of each image's tokens that enters the language model; see `molmo_model.nn.token_pruning`."""
    max_crops: int | None = None
    """Most crops of a picture, in place of the checkpoint's own: low and high resolution of one model."""
    max_frames: int | None = None
    """Most frames of a film, in place of the checkpoint's own."""
    slices: list[str] = field(default_factory=list)
    """Fields of the examples' metadata by whose values scores are shown too; see `molmo_model.eval.slices`."""
    gate: GateConfig = field(default_factory=GateConfig)


@dataclass
class EvalConfig:
    """Which checkpoints are evaluated, and how the report shows them."""

    checkpoints: list[str] = field(default_factory=list)
    """`<run>/step-<six digits>` each; the grid that `dvc repro` computes and the report compares."""
    precision: EvalPrecision = EvalPrecision.fp32
    quantization: Quantization = Quantization.none
    engine: Engine = Engine.auto
    served_model: str | None = None
    """Of the engine `openai`: what the server calls the model."""
    judge: JudgeProvider = JudgeProvider.offline
    judge_model: str | None = None
    """Of the judge `openai`: the model's name; a part of every judgement's key."""
    report_examples: int = 24
    """Example cards per task in the report."""
    confidence: float = 0.95


@dataclass
class RuntimeConfig:
    """What does not change any result: never part of an artefact's identity."""

    eval_batch_size: int = 64
    """Questions that are answered at the same time: slots, or rows of a batch."""
    eval_ranks: int = 0
    """Processes that share the questions of a task, one GPU each; 0 is one per GPU, one on a CPU."""
    journal: str | None = None
    """Where answers are shared (`s3://bucket/journal`): found there, they are not computed again."""
    engine_url: str | None = None
    """Of the engine `openai`: the server's address up to and including `/v1`."""
    engine_key: str = "OPENAI_API_KEY"
    """Environment variable with that server's key, if it wants one."""
    engine_requests: int = 16
    """Requests to that server, and to the judge, at the same time."""
    judge_url: str | None = None
    """Of the judge `openai`: the server's address up to and including `/v1`."""
    judge_key: str = "OPENAI_API_KEY"
    """Environment variable with the judge's key."""
    loader_workers: int = 0
    log_every: int = 10
    """Training steps between two lines of the log."""
    shards_root: str | None = None
    """Where training reads shards: `<shards_root>/<dataset>` of a bucket (`s3://bucket/shards`) in place of
    `artifacts/shards/<dataset>`. Their digests must be those that the mixture was made from."""
    shard_cache: str | None = None
    """Folder that keeps what came from a bucket; None is `shard_cache` in the folder of the unfinished work."""
    shard_cache_bytes: int = 10_000_000_000
    """Most bytes of that folder; what was used least recently makes room. 0 keeps nothing."""


@dataclass
class Params:
    """All of `params.yaml`."""

    version: int = PARAMS_VERSION
    seed: int = 0
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    models: dict[str, ModelConfig] = field(default_factory=dict)
    runs: dict[str, RunConfig] = field(default_factory=dict)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    eval: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def migrate(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Brings a parsed params file of any older version to `PARAMS_VERSION`.

    Version 1 had one `train:` section for a single run and a list of `mixture` weights by dataset name; version 2
    has named `runs`.

    Raises:
        ConfigError: the version is missing, not an integer, or newer than this code.
    """
    version = raw.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"{source}: version is {version!r}; write `version: {PARAMS_VERSION}` as its first line")
    if version > PARAMS_VERSION:
        raise ConfigError(
            f"{source}: version {version} is newer than {PARAMS_VERSION}, the newest that this code reads; update it"
        )
    raw = dict(raw)
    if version == 1:
        if "runs" in raw:
            raise ConfigError(f"{source}: version 1 has no `runs`; write `version: 2`")
        models = raw.get("models") or {}
        if len(models) != 1:
            raise ConfigError(f"{source}: version 1 has exactly one model, this file has {len(models)}")
        (model,) = models
        weights = raw.pop("mixture", {})
        mixture = {name: {"dataset": name, "rate": rate} for name, rate in weights.items()}
        raw["runs"] = {"train": {"model": model, "init": model, "mixture": mixture, "train": raw.pop("train", {})}}
    raw["version"] = PARAMS_VERSION
    return raw


def load_params(path: str | Path = "params.yaml", overrides: Iterable[str] = ()) -> Params:
    """Reads, migrates, overrides and checks the params.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value` each, values read as YAML; the key must exist, as in the file.

    Raises:
        ConfigError: naming the file and the key, for whatever is unknown, missing, of a wrong type or contradictory.
    """
    source = str(path)
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{source} does not exist; run from the folder that holds it") from error
    except Exception as error:  # YAML scanner errors have no common base with OmegaConf's
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} holds a {type(raw).__name__}; it must be a mapping")
    return params_from_dict(migrate({str(k): v for k, v in raw.items()}, source), source, overrides)


def params_from_dict(raw: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> Params:
    """The checked `Params` of a parsed file of the current version; see `load_params`."""
    raw, overrides = aliases.resolve(raw, overrides, source)
    try:
        laid = _with_benchmarks(_with_presets(raw, overrides), overrides)
        config = OmegaConf.merge(OmegaConf.structured(Params), OmegaConf.create(laid))
        for override in overrides:
            key, separator, _ = override.partition("=")
            if not separator:
                raise ConfigError(f"override {override!r} has no '='; write key=value")
            _require_key(config, key)
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        _check_plain(OmegaConf.to_container(config), source)
        params = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, source)) from error
    except TypeError as error:  # of nested entries, without a key
        message = "a list stands where `key: value` lines belong, or the other way round"
        raise ConfigError(f"{source}: {message} ({error}); look at `entries` of the mixtures") from error
    assert isinstance(params, Params)
    _check(params, source)
    return params


def to_dict(config: Any) -> Any:
    """A dataclass of this module as plain JSON values; enums by their value."""
    return _plain(asdict(config))


def pick(params: Params, paths: Iterable[str]) -> dict[str, Any]:
    """The parts of the params at dotted `paths`, as plain values by path: what an artefact depends on.

    Raises:
        ConfigError: a path names nothing.
    """
    container = to_dict(params)
    picked = {}
    for path in paths:
        value: Any = container
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ConfigError(f"params have no {path!r}; {suggest(part, value)}")
            value = value[part]
        picked[path] = value
    return picked


def _with_presets(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The params with each model's values laid over those of its preset, which an override may name."""
    models = raw.get("models")
    if not isinstance(models, Mapping):
        return dict(raw)
    merged = dict(models)
    for name, model in models.items():
        preset = model.get("preset") if isinstance(model, Mapping) else None
        for override in overrides:
            key, _, value = override.partition("=")
            preset = value if key == f"models.{name}.preset" else preset
        if isinstance(model, Mapping) and isinstance(preset, str) and preset != "null":
            merged[name] = merge(lookup(PRESETS, preset, f"preset of models.{name}"), model)
    return {**raw, "models": merged}


def _with_benchmarks(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The params with each task's values laid over those of its benchmark, which an override may name."""
    tasks = raw.get("tasks")
    if not isinstance(tasks, Mapping):
        return dict(raw)
    merged = dict(tasks)
    for name, task in tasks.items():
        benchmark = task.get("benchmark") if isinstance(task, Mapping) else None
        for override in overrides:
            key, _, value = override.partition("=")
            benchmark = value if key == f"tasks.{name}.benchmark" else benchmark
        if isinstance(task, Mapping) and isinstance(benchmark, str) and benchmark != "null":
            row = lookup(BENCHMARKS, benchmark, f"benchmark of tasks.{name}")
            merged[name] = merge(row.task_settings(), task)
    return {**raw, "tasks": merged}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _require_key(config: Any, key: str) -> None:
    """Refuses an override of a key that the params do not have: a typing error must not become a new entry."""
    node: Any = config
    for depth, part in enumerate(key.split(".")):
        if OmegaConf.is_dict(node) and key.split(".")[:depth][-1:] == ["options"]:
            return  # a free mapping: the family that reads it knows its names
        if not OmegaConf.is_dict(node) or part not in node:
            where = ".".join(key.split(".")[:depth]) or "params"
            names = node.keys() if OmegaConf.is_dict(node) else []
            raise ConfigError(f"override {key!r}: {where} has no {part!r}; {suggest(part, dict.fromkeys(names))}")
        node = node._get_node(part) if OmegaConf.is_missing(node, part) else node[part]


def _check_plain(value: Any, source: str, key: str = "") -> None:
    """Refuses `${...}`: DVC reads the same file without resolving it, and the environment may hold secrets."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_plain(item, source, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, source, key)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{source}: {key}: {value!r} is an interpolation; write the value, or use a YAML anchor")


def _explain(error: OmegaConfBaseException, source: str) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None) or "params"
    message = str(getattr(error, "msg", None) or error).splitlines()[0]
    if "missing mandatory value" in message.lower() or "MISSING" in message:
        message = "is required and has no default"
    if "is not a ListConfig" in message:
        message = "must be a list, such as [2, 2]"
    if found := re.match(r"Merge error: \w+ is not a subclass of (\w+)\. value: (.*)", message):
        message = f"{found[2]!r} stands where the keys of a {found[1]} belong; write `key: value` lines"
    return f"{source}: {key}: {message}"


def _check(params: Params, source: str) -> None:
    """Contradictions that types cannot see."""

    def refuse(key: str, message: str) -> None:
        raise ConfigError(f"{source}: {key}: {message}")

    _check_names(params, source)
    _check_bounds(params, source)
    for name, run in params.runs.items():
        key = f"runs.{name}"
        lookup(params.models, run.model, f"model of {key}.model")
        lookup({**params.models, **params.runs}, run.init, f"model or run of {key}.init")
        if not run.mixture:
            refuse(f"{key}.mixture", "is empty; name at least one dataset")
        _check_mixture(run.mixture, f"{source}: {key}.mixture", params.datasets)
        mixture_sources(run.mixture, f"{source}: {key}.mixture")
        model_of(params, name)
        _check_freezing(run.train, f"{source}: {key}.train")
    for name, task in params.tasks.items():
        lookup(params.datasets, task.dataset, f"dataset of tasks.{name}.dataset")
        lookup(dict.fromkeys(("train", "eval")), task.split, f"split of tasks.{name}.split")
        check_decoding(task.decoding, task.max_new_tokens, f"{source}: tasks.{name}.decoding")
        if task.kind is TaskKind.loss and (task.decoding != DecodingConfig() or task.keep_image_tokens != 1.0):
            refuse(
                f"tasks.{name}.kind",
                "loss decodes nothing and reads every image token; leave decoding and keep_image_tokens out",
            )
        if task.gate.against is not None and task.gate.against not in params.eval.checkpoints:
            refuse(f"tasks.{name}.gate.against", f"{task.gate.against!r} is none of eval.checkpoints")
    for checkpoint in params.eval.checkpoints:
        run_name, separator, step = checkpoint.partition("/")
        if not separator or not step.startswith("step-") or not (len(step) == 11 and step[5:].isdigit()):
            refuse("eval.checkpoints", f"{checkpoint!r} is not of the form <run>/step-<six digits>")
        lookup({**params.models, **params.runs}, run_name, "run of eval.checkpoints")
        steps = saved_steps(params.runs[run_name].train) if run_name in params.runs else [0]
        if int(step[5:]) not in steps:
            refuse("eval.checkpoints", f"{checkpoint!r} is never saved; {run_name} has steps {steps}")
    if len(set(params.eval.checkpoints)) < len(params.eval.checkpoints):
        refuse("eval.checkpoints", f"{params.eval.checkpoints} names one twice")


BOUNDS: dict[type, dict[str, tuple[float, float]]] = {
    DatasetConfig: {
        "train_examples": AT_LEAST_0,
        "eval_examples": AT_LEAST_0,
        "eval_fraction": (0, 0.999999),
        "tolerance": (0, 0.999999),
        "max_image_pixels": AT_LEAST_1,
        "shard_bytes": (1024, 1e18),
    },
    Expectations: {
        **dict.fromkeys(("min_rows", "max_answer_chars", "max_prompt_chars", "min_short_side"), AT_LEAST_0),
        **dict.fromkeys(("median_answer_chars", "max_aspect", "max_style_divergence"), AT_LEAST_0),
        **dict.fromkeys(("max_drop_rate", "min_eval_share", "max_eval_share", "max_majority_answer"), (0, 1)),
        **dict.fromkeys(("max_repeated_image", "max_repeated_question", "max_repeated_text"), (0, 1)),
        "max_near_duplicates": (0, 1),
    },
    **MODEL_BOUNDS,
    MixtureEntry: {"rate": (1e-12, 1e12), "max_conversations": AT_LEAST_1, "weight": ABOVE_0, "size": ABOVE_0},
    ComponentOptim: {
        "learning_rate": AT_LEAST_0,
        "weight_decay": AT_LEAST_0,
        "warmup_steps": AT_LEAST_0,
        "max_grad_norm": ABOVE_0,
        "unfreeze_step": AT_LEAST_1,
    },
    LoraConfig: {"rank": AT_LEAST_1, "alpha": ABOVE_0, "dropout": SHARE},
    DecodingConfig: {
        **dict.fromkeys(("num_beams",), AT_LEAST_1),
        **dict.fromkeys(("seed", "top_k", "no_repeat_ngram_size", "min_new_tokens"), AT_LEAST_0),
        "length_penalty": (-100, 100),
        "temperature": (1e-6, 1e6),
        "top_p": (1e-9, 1),
        "repetition_penalty": (1e-6, 1e6),
    },
    OptimConfig: {"betas": (0, 0.9999999), "eps": (1e-30, 1), "final_ratio": (0, 1)},
    TrainConfig: {
        **dict.fromkeys(("steps", "packs_per_step", "packs_per_microbatch", "sequence_length"), AT_LEAST_1),
        **dict.fromkeys(("crops_per_pack", "packing_window", "save_every", "keep_checkpoints"), AT_LEAST_1),
        **dict.fromkeys(("processes", "threads"), AT_LEAST_1),
        "z_loss": AT_LEAST_0,
        "bad_examples": (0, 0.999999),
    },
    TaskConfig: {
        **dict.fromkeys(("max_new_tokens", "max_examples", "max_crops", "max_frames"), AT_LEAST_1),
        "keep_image_tokens": (1e-9, 1),
    },
    GateConfig: {"minimum": AT_LEAST_0, "most_loss": AT_LEAST_0, "p_value": (0, 1)},
    EvalConfig: {"report_examples": AT_LEAST_0, "confidence": (0.5, 0.999999)},
    RuntimeConfig: {
        **dict.fromkeys(("eval_batch_size", "log_every", "engine_requests"), AT_LEAST_1),
        **dict.fromkeys(("loader_workers", "shard_cache_bytes", "eval_ranks"), AT_LEAST_0),
    },
    Params: {"seed": (0, 2**63 - 1)},
}
"""Smallest and largest value of every number, both allowed; of each element where the value is a list."""


def _check_bounds(config: Any, source: str, key: str = "") -> None:
    """Refuses numbers outside their bounds, infinities and NaN among them, wherever they stand below `config`."""
    if isinstance(config, dict):
        for name, item in config.items():
            _check_bounds(item, source, f"{key}.{name}".lstrip("."))
    if not is_dataclass(config):
        return
    for name, (low, high) in BOUNDS.get(type(config), {}).items():
        value = getattr(config, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:
                where = f"{key}.{name}".lstrip(".")
                raise ConfigError(f"{source}: {where} is {value}; it must lie between {low:g} and {high:g}")
    for item in fields(config):
        _check_bounds(getattr(config, item.name), source, f"{key}.{item.name}".lstrip("."))


def _check_names(params: Params, source: str) -> None:
    for section in ("datasets", "models", "runs", "tasks"):
        for name in getattr(params, section):
            if not NAME.fullmatch(name):
                rule = "it becomes a folder; use letters, digits, '_', '-' and '.', at most 64"
                raise ConfigError(f"{source}: {section}: {name!r} is no usable name: {rule}")
    for shared in sorted(set(params.models) & set(params.runs)):
        message = "is also the name of a model; rename one, `init` must mean one thing"
        raise ConfigError(f"{source}: runs.{shared}: {message}")


def check_decoding(decoding: DecodingConfig, max_new_tokens: int, where: str) -> None:
    """Refuses settings that contradict each other or would have no effect.

    Raises:
        ConfigError: beginning with `where`.
    """
    plain = DecodingConfig()
    if decoding.do_sample and decoding.num_beams > 1:
        raise ConfigError(f"{where}: do_sample has one beam, num_beams is {decoding.num_beams}; choose one of the two")
    for name in ("seed", "temperature", "top_k", "top_p"):
        if not decoding.do_sample and getattr(decoding, name) != getattr(plain, name):
            raise ConfigError(f"{where}: {name} is {getattr(decoding, name)}, but do_sample is off; turn it on")
    if decoding.num_beams == 1 and decoding.length_penalty != plain.length_penalty:
        raise ConfigError(f"{where}: length_penalty is {decoding.length_penalty}; it ranks beams, there is one")
    if decoding.min_new_tokens > max_new_tokens:
        raise ConfigError(f"{where}: min_new_tokens {decoding.min_new_tokens} is above max_new_tokens {max_new_tokens}")


def read_decoding(settings: Iterable[str], max_new_tokens: int, source: str) -> DecodingConfig:
    """The decoding of `key=value` settings, such as `num_beams=3`, checked as in the params.

    Raises:
        ConfigError: beginning with `source`.
    """
    try:
        plain = OmegaConf.structured(DecodingConfig)
        decoding = OmegaConf.to_object(OmegaConf.merge(plain, OmegaConf.from_dotlist(list(settings))))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, source)) from error
    assert isinstance(decoding, DecodingConfig)
    _check_bounds(decoding, source, "decoding")
    check_decoding(decoding, max_new_tokens, f"{source}: decoding")
    return decoding


def _check_freezing(train: TrainConfig, where: str) -> None:
    for name in ("vision", "connector", "language"):
        settings: ComponentOptim = getattr(train.optim, name)
        if settings.unfreeze_step is None:
            continue
        key = f"{where}.optim.{name}.unfreeze_step"
        if not settings.freeze:
            raise ConfigError(f"{key} is {settings.unfreeze_step}, but {name} is not frozen; set freeze: true")
        if settings.unfreeze_step > train.steps:
            raise ConfigError(
                f"{key} is {settings.unfreeze_step}, but the run has {train.steps} steps; leave it out to keep {name} "
                "frozen"
            )
        if train.lora is not None:
            raise ConfigError(f"{key}: train.lora keeps all but adapters and connector frozen; leave it out")
    if train.lora is not None and train.optim.language.freeze:
        raise ConfigError(f"{where}.optim.language.freeze: adapters follow it; leave it out with train.lora")
    if train.lora is not None and train.lora.train_connector and train.optim.connector.freeze:
        raise ConfigError(
            f"{where}.optim.connector.freeze is true, but lora.train_connector trains it; set train_connector: false"
        )


def _check_mixture(
    entries: Mapping[str, MixtureEntry],
    key: str,
    datasets: Mapping[str, DatasetConfig],
    rule: MixtureRule = MixtureRule.flat,
) -> None:
    """Unknown datasets, contradictions between the settings of an entry, and settings without effect."""
    plain = MixtureEntry()
    for name, entry in entries.items():
        where = f"{key}.{name}"
        if not name or "/" in name:
            raise ConfigError(f"{key}: {name!r} is no usable name of an entry; it has at least one letter and no '/'")
        if not entry.dataset and not entry.entries:
            raise ConfigError(f"{where}.dataset: is required and has no default (or, in a group, `entries`)")
        for setting in ("dataset", "styles", "max_conversations", "weight") if entry.entries else ("rule",):
            if getattr(entry, setting) != getattr(plain, setting):
                what = "this is a group; set it for its entries" if entry.entries else "only a group has one"
                raise ConfigError(f"{where}.{setting}: is {getattr(entry, setting)!r}, but {what}")
        if entry.size is not None and rule is MixtureRule.flat:
            raise ConfigError(
                f"{where}.size: size is {entry.size}, but what stands beside it is drawn in the ratio of rates; give "
                "the group around it `rule: root_size`, or use rate"
            )
        if entry.dataset:
            lookup(datasets, entry.dataset, f"dataset of {where}.dataset")
        _check_mixture(entry.entries, f"{where}.entries", datasets, entry.rule)


def mixture_sources(mixture: Mapping[str, MixtureEntry], key: str = "mixture") -> dict[str, MixtureEntry]:
    """The sources of a mixture by name, those in groups among them.

    Raises:
        ConfigError: two have one name; begins with `key`, where the mixture stands.
    """
    sources: dict[str, MixtureEntry] = {}
    for name, entry in mixture.items():
        below = mixture_sources(entry.entries, key) if entry.entries else {name: entry}
        if twice := sorted(set(below) & set(sources)):
            raise ConfigError(
                f"{key}: two sources are called {twice[0]!r}; rename one, its order is drawn from its name"
            )
        sources |= below
    return sources


def drawn_datasets(params: Params, run: str) -> list[str]:
    """The datasets that a run's mixture draws from, once each, sorted."""
    return sorted({entry.dataset for entry in mixture_sources(params.runs[run].mixture).values()})


def saved_steps(train: TrainConfig) -> list[int]:
    """The steps at which a run writes a checkpoint: every `save_every` and the last."""
    return sorted({*range(train.save_every, train.steps + 1, train.save_every), train.steps})


def model_of(params: Params, run: str) -> str:
    """The model that a run trains, checked along its chain of `init`.

    Raises:
        ConfigError: the chain has a cycle, or a run starts from one of another model.
    """
    seen = [run]
    while (start := params.runs[seen[-1]].init) in params.runs:
        if start in seen:
            raise ConfigError(f"runs.{run}.init: {' -> '.join([*seen, start])} never reaches a model")
        seen.append(start)
    declared = {name: params.runs[name].model for name in seen}
    if set(declared.values()) != {start}:
        raise ConfigError(f"runs.{run}: starts from model {start!r}, but its chain of runs declares {declared}")
    return start


def checkpoint_name(run: str, step: int) -> str:
    """`<run>/step-<six digits>`: the one name of a checkpoint, in paths, partitions and the report."""
    return f"{run}/step-{step:06d}"
