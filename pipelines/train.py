"""Trains one run: torchrun and FSDP2 over the ranks of this machine, exactly resumable.

Prints what the run will need, refuses what cannot fit, then starts `torchrun` as a child and follows it. Checkpoints
appear under artifacts/checkpoints/<run>/ as soon as each is written and hashed. SIGTERM or Ctrl-C saves the state and
ends with exit code 75; running the same command again goes on from there, and gives the bits of an unbroken run.
"""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo_model.artifacts import read_manifest
from molmo_model.config import Params, checkpoint_name, drawn_datasets, model_of, saved_steps, to_dict
from molmo_model.errors import CheckpointError, ConfigError
from pipelines.stage import Build, Key, Stage, main, state_root

if TYPE_CHECKING:  # runs in the child, never here; stands here so that it is part of the stage's code digest
    import molmo_model.train.worker  # noqa: F401

WORKER = "molmo_model.train.worker"
STOPPED = 75
"""Exit code of a run that was stopped on request with its state saved: EX_TEMPFAIL, try again."""
GRACE_SECONDS = 8.0
"""Between asking the ranks to stop and killing them; a cancelled run has to be gone within 10 s."""
SLOW_DISK = 200_000_000
"""Bytes per second at which a checkpoint is surely written; large ones lengthen the grace by their size."""

Report = Callable[[dict[str, Any]], None]


def start_checkpoint(params: Params, run: str) -> str:
    """Folder of the checkpoint that a run starts from."""
    init = params.runs[run].init
    step = saved_steps(params.runs[init].train)[-1] if init in params.runs else 0
    return f"artifacts/checkpoints/{checkpoint_name(init, step)}"


def inputs(params: Params, key: Key) -> dict[str, str]:
    """`init`, `mixture` and `shards/<dataset>` of a run; shards elsewhere count by their digest alone."""
    run = key["run"]
    shards = {} if params.runtime.shards_root else shards_of(params, run, "artifacts/shards")
    return {"init": start_checkpoint(params, run), "mixture": f"artifacts/mixture/{run}", **shards}


def fingerprints(params: Params, key: Key) -> dict[str, str]:
    """Digests of the shards under `runtime.shards_root`: the same as of equal ones in artifacts/, so that the same
    training has one identity wherever it reads from."""
    if not params.runtime.shards_root:
        return {}
    from molmo_model.data.shard_reader import manifest_at

    shards = shards_of(params, key["run"], params.runtime.shards_root)
    return {name: manifest_at(place).digest for name, place in shards.items()}


def shards_of(params: Params, run: str, root: str) -> dict[str, str]:
    """`shards/<dataset>` to its folder or URL below `root`."""
    return {f"shards/{dataset}": f"{root.rstrip('/')}/{dataset}" for dataset in drawn_datasets(params, run)}


def more_params(params: Params, key: Key) -> tuple[str, ...]:
    """With retention, the evaluated checkpoints decide which ones are kept."""
    kept_all = params.runs[key["run"]].train.keep_checkpoints is None
    return (f"models.{model_of(params, key['run'])}", *(() if kept_all else ("eval.checkpoints",)))


def build(build: Build) -> dict[str, Any]:
    """Trains to the end, going on from the newest valid checkpoint.

    Raises:
        PreflightError: the run does not fit this machine.
        TrainingError: a rank failed; carries its message or its traceback.
        SystemExit: with code 75, stopped on request.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from molmo_model.train.supervisor import exclusive

    with exclusive(build.work / "lock") as lock:
        training = _Training(build)
        training.prepare()
        training.run(lock)
        return training.finish()


def _require_same_seed(build: Build) -> None:
    """A mixture of another seed would be trained on in an order that these params do not describe."""
    made_with = read_manifest(build.inputs["mixture"]).params.get("seed")
    if made_with != build.params.seed:
        raise ConfigError(
            f"{build.inputs['mixture']} was made with seed {made_with}, the params say {build.params.seed}; "
            f"run `python -m pipelines.mixture run={build.key['run']}` with the same seed first"
        )


class _Training:
    """One `build` on its way from preflight to summary."""

    def __init__(self, build: Build) -> None:
        from molmo_model.train.history import valid_checkpoints, verified

        self.build, self.run_name = build, build.key["run"]
        self.config = build.params.runs[self.run_name].train
        self.stopped_folder = build.work / "stopped"
        self.timings = Path("logs") / "train" / f"{self.run_name}.jsonl"
        verified(build.inputs["init"])
        self.valid = valid_checkpoints([build.out, self.stopped_folder])
        self.grace = GRACE_SECONDS
        self.stopped_at: int | None = None

    @property
    def resume(self) -> tuple[int, Path] | None:
        return self.valid[-1] if self.valid else None

    def prepare(self) -> None:
        """Preflight, clean folders, and whatever is finished made visible again."""
        from molmo_model.train import preflight
        from molmo_model.train.job import ERRORS, MEETING

        build, done = self.build, self.resume[0] if self.resume else 0
        saved = [step for step, path in self.valid if path.parent == build.out]
        machine = preflight.survey(build.work)
        need = preflight.estimate(
            self.config,
            build.inputs["init"],
            done=done,
            saved=len(saved),
            timings=self.timings,
            machine=machine,
            longest_example=read_manifest(build.inputs["mixture"]).summary.get("longest_example"),
        )
        print("\n".join(preflight.lines(self.run_name, self.config, need, machine)), flush=True)
        _require_same_seed(build)
        preflight.check(self.config, need, machine)
        self.grace += need.checkpoint_bytes / SLOW_DISK
        for name in (ERRORS, MEETING):
            shutil.rmtree(build.work / name, ignore_errors=True)
        (build.work / MEETING).mkdir()
        self.timings.parent.mkdir(parents=True, exist_ok=True)
        for step in saved:
            self.publish(step)

    def run(self, lock: int) -> None:
        """torchrun, from start to end."""
        from molmo_model.train import supervisor
        from molmo_model.train.job import ERRORS, EVENTS, MEETING, Job

        build = self.build
        if self.resume is not None and self.resume[0] >= self.config.steps:
            return
        job = Job(
            run=self.run_name,
            params=to_dict(build.params),
            inputs={name: str(path) for name, path in build.inputs.items()}
            | shards_of(build.params, self.run_name, build.params.runtime.shards_root or "artifacts/shards"),
            out=str(build.out),
            work=str(build.work),
            stamp=build.stamp,
            resume=str(self.resume[1]) if self.resume else None,
            timings=str(self.timings),
            shard_cache=str(state_root() / "shard_cache"),
        )
        output = build.work / "torchrun.log"
        news = supervisor.follow(build.work / EVENTS)
        with _orchestrator() as report, _progress(self.config.steps, self.resume) as show:

            def poll() -> None:
                for event in news():
                    report(self.handle(event))
                    show(event)

            meeting = (build.work / MEETING / "agent").resolve()
            code, asked = supervisor.supervise(
                supervisor.torchrun_command(WORKER, str(job.write()), self.config.processes, meeting),
                environment=supervisor.child_environment(self.config.threads),
                lock=lock,
                output=output,
                poll=poll,
                grace_seconds=self.grace,
            )
        if asked or self.stopped_at is not None:
            self.leave()
        if code != 0:
            raise supervisor.failure(build.work / ERRORS, output, code)

    def handle(self, event: dict[str, Any]) -> dict[str, Any]:
        """Does what an event of the first rank asks for; returns what an orchestrator is told."""
        if event["kind"] == "checkpoint":
            self.publish(event["step"])
            path = str(self.build.target / Path(event["name"]).name)
            return {**{name: event[name] for name in ("kind", "run", "step", "digest")}, "path": path}
        if event["kind"] == "stopped":
            self.stopped_at = event["step"]
        return event

    def publish(self, step: int) -> None:
        """Makes a saved checkpoint visible, and deletes those that retention gives up."""
        from molmo_model.train.history import step_name, steps_in, surplus, wanted_steps

        self.build.publish(step_name(step))
        wanted = wanted_steps(self.build.params.eval.checkpoints, self.run_name)
        saved = [number for number, _ in steps_in(self.build.out)]
        for old in surplus(saved, self.config, wanted):
            for folder in (self.build.target, self.build.out):  # the state last: it is what a resume needs
                shutil.rmtree(folder / step_name(old), ignore_errors=True)

    def leave(self) -> None:
        """Ends this process as one that was stopped on request."""
        from molmo_model.train.history import valid_checkpoints

        valid = valid_checkpoints([self.build.out, self.stopped_folder])
        step = valid[-1][0] if valid else 0
        print(f"train {self.run_name}: stopped; run the same command again to go on after step {step}", file=sys.stderr)
        raise SystemExit(STOPPED)

    def finish(self) -> dict[str, Any]:
        """Puts the metrics beside the checkpoints and returns the summary."""
        from molmo_model.train.history import step_name, steps_in
        from molmo_model.train.metrics_log import LOSS_CURVE, METRICS, SKIPPED, read_metrics, write_loss_curve

        build = self.build
        metrics = read_metrics(build.work / METRICS)
        if [line["step"] for line in metrics] != list(range(1, self.config.steps + 1)):
            raise CheckpointError(
                f"{build.work / METRICS} does not hold steps 1 to {self.config.steps}; delete {build.work.parent}"
            )
        shutil.copyfile(build.work / METRICS, build.out / METRICS)
        write_loss_curve(metrics, build.out / LOSS_CURVE)
        if (build.work / SKIPPED).exists():
            shutil.copyfile(build.work / SKIPPED, build.out / SKIPPED)
        shutil.rmtree(self.stopped_folder, ignore_errors=True)
        steps = [step for step, _ in steps_in(build.out)]
        last = read_manifest(build.out / step_name(steps[-1]))
        return {
            "run": self.run_name,
            "steps": self.config.steps,
            "checkpoints": steps,
            "parameters": last.summary["parameters"],
            "examples": sum(line["examples"] for line in metrics),
            "tokens": sum(line["tokens"] for line in metrics),
            "skipped_examples": sum(line["skipped"] for line in metrics),
            "first_loss": metrics[0]["loss"],
            "last_loss": metrics[-1]["loss"],
        }


@contextlib.contextmanager
def _progress(total: int, resume: tuple[int, Path] | None) -> Iterator[Report]:
    """A bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _print_progress
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=resume[0] if resume else 0, unit="step", dynamic_ncols=True) as bar:

        def show(event: dict[str, Any]) -> None:
            if event["kind"] == "progress":
                bar.set_postfix(loss=f"{event['loss']:.4f}", examples_per_s=event["examples_per_second"], refresh=False)
                bar.update(event["step"] - bar.n)
            elif event["kind"] == "checkpoint":
                bar.write(f"saved {event['name']}")

        yield show


def _print_progress(event: dict[str, Any]) -> None:
    if event["kind"] == "progress":
        print(
            f"step {event['step']}/{event['total']}  loss {event['loss']:.4f}  {event['seconds']:.2f} s/step  "
            f"{event['examples_per_second']:.0f} examples/s  {event['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
    elif event["kind"] == "checkpoint":
        print(f"saved {event['name']}", flush=True)


@contextlib.contextmanager
def _orchestrator() -> Iterator[Report]:
    """Tells a Dagster process that started this one about progress and checkpoints, while the run goes on."""
    if "DAGSTER_PIPES_CONTEXT" not in os.environ:
        yield lambda event: None
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:

        def report(event: dict[str, Any]) -> None:
            if event["kind"] in ("progress", "checkpoint"):
                pipes.report_custom_message(event)

        yield report


STAGE = Stage(
    name="train",
    schema="molmo/checkpoints",
    version=1,
    keys=("run",),
    out="artifacts/checkpoints/{run}",
    params=("runs.{run}.train", "seed"),
    build=build,
    partitions=lambda params: [{"run": run} for run in params.runs],
    inputs=inputs,
    more_params=more_params,
    fingerprints=fingerprints,
    resumable=True,
)

if __name__ == "__main__":
    main(STAGE)
