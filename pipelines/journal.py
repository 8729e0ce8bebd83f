"""Lists, shows, prunes, merges and shares the journal: the answers that `pipelines.predict` never asks for twice.

    python -m pipelines.journal                     what there is, per checkpoint, engine, precision and code
    python -m pipelines.journal show task=NAME      its answers: engine, batch size, ranks and device of each
    python -m pipelines.journal show key=START      one answer with its history, whole
    python -m pipelines.journal prune               what would go: damaged lines, and answers that newer ones replaced
        days=30                                     also answers that are older
        gone=true                                   also those of checkpoints that no artefact holds any more
        apply=true                                  really; without it nothing is touched
    python -m pipelines.journal merge FROM...       takes over the answers of other journals, folders or files
    python -m pipelines.journal push [place=URL]    publishes what is not yet in `runtime.journal`
    python -m pipelines.journal pull [place=URL]    brings what others have published there

Answers that the cells of the present params need stay, whatever their age; so do all of a checkpoint and task that the
params name and that cannot be looked up just now.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo_model.artifacts import MANIFEST, canonical_json, read_manifest
from molmo_model.config import Params, load_params, lookup
from molmo_model.errors import ArtifactError, ConfigError, MolmoError
from molmo_model.eval import shared_journal
from molmo_model.eval.journal import FOLDER_CHARACTERS, Entry, Line, exclusive, read_lines
from pipelines import predict
from pipelines.stage import exit_on_error, option

WIDTH = 60
"""Characters of an answer in a table."""
Place = tuple[Path, int]
"""A file and the number of a line in it."""


@dataclass
class Folder:
    """All journals of one checkpoint's weights."""

    path: Path
    lines: dict[Path, list[Line]]
    winners: dict[str, Place] = field(default_factory=dict)
    """Where the answer stands that counts, by key."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What identities stand for, by their digest."""

    @property
    def entries(self) -> Iterator[tuple[Place, Entry]]:
        """All answers, those that newer ones replaced too."""
        for path, lines in self.lines.items():
            for line in lines:
                if line.entry is not None:
                    yield (path, line.number), line.entry

    @property
    def damaged(self) -> list[Place]:
        return [(path, line.number) for path, lines in self.lines.items() for line in lines if line.damaged]

    def winning(self) -> Iterator[Entry]:
        """The answers that count."""
        return (entry for place, entry in self.entries if self.winners[entry.key] == place)

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.lines)

    @property
    def used(self) -> float:
        """Seconds since the epoch when something was last written."""
        return max((path.stat().st_mtime for path in self.lines), default=0.0)


@dataclass(frozen=True)
class Pruning:
    """What is to go, and why."""

    lines: dict[Path, set[int]]
    """Numbers of lines by file."""
    reasons: Counter[str]
    bytes: int


def folders() -> list[Folder]:
    """Every folder of the journal, read."""
    root = predict.journals()
    return [read_folder(path) for path in sorted(root.glob("*")) if path.is_dir()]


def read_folder(path: Path) -> Folder:
    """All lines of a folder's files, in order."""
    folder = Folder(path, {file: list(read_lines(file)) for file in sorted(path.glob("*.jsonl"))})
    best: dict[str, Entry] = {}
    for place, entry in folder.entries:
        if entry.stands_over(best.get(entry.key)):
            best[entry.key], folder.winners[entry.key] = entry, place
    folder.facts = {line.facts[0]: line.facts[1] for lines in folder.lines.values() for line in lines if line.facts}
    return folder


def checkpoints() -> dict[Path, list[str]]:
    """Names of the checkpoints among the artefacts, by the folder of their journals."""
    found: dict[Path, list[str]] = {}
    root = Path("artifacts/checkpoints")
    for manifest in sorted(root.glob(f"*/*/{MANIFEST}")):
        try:
            folder = predict.journal_folder(read_manifest(manifest.parent))
        except ArtifactError:
            continue
        found.setdefault(folder, []).append(manifest.parent.relative_to(root).as_posix())
    return found


def describe(folder: Folder, names: Sequence[str]) -> Iterator[str]:
    """Lines of the listing for one folder.

    Args:
        names: of the checkpoints that have its weights.
    """
    recorded = sorted({str(entry.made.get("checkpoint", "?")) for _, entry in folder.entries})
    who = ", ".join(names) or f"gone, was {', '.join(recorded) or 'never named'}"
    age = (time.time() - folder.used) / 86400
    history = sum(1 for _ in folder.entries) - len(folder.winners)
    yield (
        f"{folder.path.name}  {who}: {len(folder.winners)} answers, {history} replaced, {folder.bytes / 1e6:.1f} MB, "
        f"used {age:.1f} days ago"
    )
    groups: dict[str, Counter[str]] = {}
    for entry in folder.winning():
        groups.setdefault(entry.identity, Counter())[str(entry.made.get("task", "?"))] += 1
    for identity, tasks in sorted(groups.items()):
        each = ", ".join(f"{task} {count}" for task, count in sorted(tasks.items()))
        yield f"  {sum(tasks.values())} by {summary(folder.facts.get(identity))}: {each}"
    for path, number in folder.damaged:
        yield f"  {path}:{number}: damaged, is computed again where it is needed"


def summary(facts: Mapping[str, Any] | None) -> str:
    """An identity in a few words."""
    if facts is None:
        return "an engine that was not recorded"
    quantization = facts.get("decoding", {}).get("quantization", "none")
    fewer = "" if quantization == "none" else f" {quantization}"
    return f"{facts.get('engine')} {facts.get('precision')}{fewer}, code {str(facts.get('code'))[:8]}"


def show(task: str | None, key: str | None) -> Iterator[str]:
    """Answers of a task, one line each, or the whole history of those whose key begins so."""
    for folder in folders():
        for place, entry in folder.entries:
            if key is not None and entry.key.startswith(key):
                counts = "counts" if folder.winners[entry.key] == place else "replaced"
                facts = folder.facts.get(entry.identity)
                text = json.dumps({"counts": counts, **vars(entry), "facts": facts}, indent=1, ensure_ascii=False)
                yield f"{place[0]}:{place[1]}\n{text}"
            elif key is None and entry.made.get("task") == task and folder.winners[entry.key] == place:
                yield _row(entry, folder.facts.get(entry.identity))


def _row(entry: Entry, facts: Mapping[str, Any] | None) -> str:
    made = entry.made
    how = "  ".join(f"{name} {made.get(name, '?')}" for name in ("batch_size", "ranks", "device"))
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.at)) if entry.at else "?"
    text = " ".join(str(entry.answer.get("text", "")).split())
    return f"{entry.key[:12]}  {made.get('checkpoint')}  {summary(facts)}  {how}  {when}  {text[:WIDTH]}"


def needed(params: Params) -> tuple[set[str], set[tuple[str, str]]]:
    """What the cells of the params need: keys, and the cells that cannot be looked up now, whose answers all stay."""
    from molmo_model.data.shard_reader import ShardReader

    keys: set[str] = set()
    unknown: set[tuple[str, str]] = set()
    for cell in predict.STAGE.partitions(params):
        places = predict.STAGE.inputs(params, cell)
        try:
            planned = predict.plan(params, cell, Path(places["checkpoint"]), ShardReader(places["shards"]))
            keys.update(planned.keys)
        except (MolmoError, OSError):
            unknown.add((cell["checkpoint"], cell["task"]))
    return keys, unknown


def to_prune(params: Params, days: float | None, gone: bool) -> dict[Path, Pruning]:
    """What would go, by folder; see the module."""
    keys, unknown = needed(params)
    held, found = checkpoints(), {}
    for folder in folders():
        lines: dict[Path, set[int]] = {}
        reasons: Counter[str] = Counter()
        for place in folder.damaged:
            lines.setdefault(place[0], set()).add(place[1])
            reasons["damaged"] += 1
        for place, entry in folder.entries:
            if reason := _reason(folder, place, entry, days, gone and folder.path not in held):
                if reason != "replaced" and (entry.key in keys or _of_unknown(entry, unknown)):
                    continue
                lines.setdefault(place[0], set()).add(place[1])
                reasons[reason] += 1
        if lines:
            size = sum(
                len(line.raw) for path, some in lines.items() for line in folder.lines[path] if line.number in some
            )
            found[folder.path] = Pruning(lines, reasons, size)
    return found


def _reason(folder: Folder, place: Place, entry: Entry, days: float | None, gone: bool) -> str | None:
    if folder.winners[entry.key] != place:
        return "replaced"
    if gone:
        return "of a checkpoint that is gone"
    written = entry.at or place[0].stat().st_mtime
    return "old" if days is not None and written < time.time() - days * 86400 else None


def _of_unknown(entry: Entry, unknown: set[tuple[str, str]]) -> bool:
    """Whether an answer may be one of a cell that cannot be looked up; old lines do not say of which task they are."""
    checkpoint, task = entry.made.get("checkpoint"), entry.made.get("task")
    return any(checkpoint in (None, its) and task in (None, of) for its, of in unknown)


def prune(found: Mapping[Path, Pruning]) -> list[str]:
    """Deletes those lines; returns which files were left alone because somebody writes them just now."""
    busy = []
    for folder, pruning in found.items():
        for path, numbers in pruning.lines.items():
            try:
                with exclusive(path):
                    _rewrite(path, numbers)
            except BlockingIOError:
                busy.append(f"{path} is being written; prune it later")
        if not any(path.stat().st_size for path in folder.glob("*.jsonl")):
            shutil.rmtree(folder)
    return busy


def _rewrite(path: Path, without: set[int]) -> None:
    """The file without some lines; what was appended since they were counted stays. Held by the caller."""
    before, lines = path.stat(), [line for line in read_lines(path) if line.number not in without]
    used = {line.entry.identity for line in lines if line.entry is not None}
    kept = [line.raw for line in lines if line.facts is None or line.facts[0] in used]
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(part, path)
    shared_journal.rewritten(path.parent, path.name, before.st_size, path.stat().st_size)


@dataclass
class Merged:
    """What a merge did."""

    new: int = 0
    known: int = 0
    damaged: list[str] = field(default_factory=list)


def merge(sources: Sequence[str]) -> Merged:
    """Takes over every whole answer of other journals that is not known here; damaged lines are told and left.

    Args:
        sources: state folders, journals, folders of one checkpoint's journals, or files in one.

    Raises:
        ConfigError: one of them holds no journal.
    """
    done = Merged()
    for source in sources:
        files = _journal_files(Path(source))
        if not files:
            raise ConfigError(f"{source} holds no journal: no <weights>/<writer>.jsonl is there")
        for path in files:
            _merge_file(path, predict.journals() / path.parent.name, done)
    return done


def _merge_file(path: Path, target: Path, done: Merged) -> None:
    known = {_content(entry) for _, entry in read_folder(target).entries} if target.is_dir() else set()
    lines, facts = [], {}
    for line in read_lines(path):
        if line.damaged:
            done.damaged.append(f"{path}:{line.number}")
        elif line.facts is not None:
            facts[line.facts[0]] = line.raw
        elif line.entry is not None and _content(line.entry) in known:
            done.known += 1
        elif line.entry is not None:
            known.add(_content(line.entry))
            lines.append(line)
    if lines:
        used = {line.entry.identity for line in lines if line.entry is not None}
        data = b"".join([raw for name, raw in facts.items() if name in used] + [line.raw for line in lines])
        target.mkdir(parents=True, exist_ok=True)
        part = target / f".merged.{os.getpid()}"
        part.write_bytes(data)
        os.replace(part, target / f"merged.{hashlib.sha256(data).hexdigest()[:FOLDER_CHARACTERS]}.jsonl")
        done.new += len(lines)


def _content(entry: Entry) -> tuple[str, int, str]:
    return entry.key, entry.turn, canonical_json(entry.answer)


def _journal_files(source: Path) -> list[Path]:
    """Files of journals below a place, each in a folder that is named by its weights."""
    found = [source] if source.is_file() else sorted(source.rglob("*.jsonl"))
    named = re.compile(f"[0-9a-f]{{{FOLDER_CHARACTERS}}}")
    return [
        path
        for path in (one.resolve() for one in found)
        if path.suffix == ".jsonl" and named.fullmatch(path.parent.name)
    ]


def push(place: str) -> int:
    """Publishes everything that is not yet there; returns how many pieces that took."""
    return sum(shared_journal.push(place, path) for path in sorted(predict.journals().glob("*")) if path.is_dir())


def pull(place: str) -> int:
    """Brings everything that is there and not here; returns how many pieces that was."""
    return sum(
        shared_journal.fetch(place, predict.journals() / name) for name in shared_journal.published_folders(place)
    )


OPTIONS = {
    "list": (),
    "show": ("task", "key"),
    "prune": ("days", "gone", "apply", "params"),
    "merge": (),
    "push": ("place", "params"),
    "pull": ("place", "params"),
}
"""Options of each action."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        print((__doc__ or "").strip())
        return
    with exit_on_error("journal"):
        action = words.pop(0) if words and "=" not in words[0] else "list"
        allowed = lookup(OPTIONS, action, "action of the journal")
        sources = [word for word in words if action == "merge"]
        options = dict(map(option, [] if action == "merge" else words))
        for name in options:
            lookup(dict.fromkeys(allowed), name, f"option of {action}")
        _act(action, options, sources)


def _act(action: str, options: Mapping[str, str], sources: Sequence[str]) -> None:
    if action == "list":
        names = checkpoints()
        if not (found := folders()):
            print(f"nothing has been answered yet: {predict.journals()} is empty")
        for folder in found:
            print("\n".join(describe(folder, names.get(folder.path, []))))
    elif action == "show":
        if len(options) != 1:
            raise ConfigError("show wants task=NAME or key=START")
        texts = list(show(options.get("task"), options.get("key")))
        for text in texts:
            print(text)
        if not texts:
            print(f"no answer of {'='.join(*options.items())}; `python -m pipelines.journal` lists what there is")
    elif action == "prune":
        _prune(load_params(options.get("params", "params.yaml")), options)
    elif action == "merge":
        if not sources:
            raise ConfigError("merge wants at least one journal, folder or file to take over")
        done = merge(sources)
        for place in done.damaged:
            print(f"{place}: damaged, left out")
        print(f"{done.new} answers taken over, {done.known} were known, {len(done.damaged)} damaged")
    else:
        shared = options.get("place") or load_params(options.get("params", "params.yaml")).runtime.journal
        if not shared:
            raise ConfigError(f"{action}: set runtime.journal, or give place=s3://bucket/journal")
        count = push(shared) if action == "push" else pull(shared)
        print(f"{count} pieces {'published' if action == 'push' else 'fetched'}")


def _prune(params: Params, options: Mapping[str, str]) -> None:
    flags = {name: options.get(name, "false") for name in ("gone", "apply")}
    for name, value in flags.items():
        if value not in ("true", "false"):
            raise ConfigError(f"{name}={value} is neither true nor false")
    try:
        days = float(options["days"]) if "days" in options else None
    except ValueError as error:
        raise ConfigError(f"days={options['days']} is no number of days") from error
    found = to_prune(params, days, flags["gone"] == "true")
    for folder, pruning in found.items():
        print(f"{folder}: {', '.join(f'{count} {reason}' for reason, count in pruning.reasons.items())}")
    size = sum(pruning.bytes for pruning in found.values()) / 1e6
    if flags["apply"] == "true":
        for busy in prune(found):
            print(busy)
        print(f"freed about {size:.3f} MB")
    else:
        print(f"would free {size:.3f} MB; add apply=true to do it")


if __name__ == "__main__":
    main()
