"""One rank of a training: `python -m torch.distributed.run ... -m molmo_model.train.worker job.json`.

Started by `pipelines.train`; puts the parts together and leaves the loop to the `Trainer`.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from molmo_model.config import Params
from molmo_model.data.range_cache import RangeCache
from molmo_model.errors import CheckpointError
from molmo_model.nn.build import component_of
from molmo_model.train.batches import build_loader
from molmo_model.train.checkpoint import load_state
from molmo_model.train.distributed import Ranks, StopRequest, process_group, set_determinism
from molmo_model.train.job import ERRORS, EVENTS, MEETING, Job
from molmo_model.train.lora import merged_counts
from molmo_model.train.metrics_log import METRICS, SKIPPED, EventLog, MetricsLog, SkippedLog
from molmo_model.train.optim import build_optimizer
from molmo_model.train.parallelize import build_sharded_model
from molmo_model.train.preflight import pace_key
from molmo_model.train.supervisor import signal_when_parent_dies, write_error_report
from molmo_model.train.trainer import Logs, Places, Trainer


@record
def main(job_file: str) -> None:
    """Trains until done or stopped; a failure leaves a report that the supervisor shows, and ends all ranks."""
    signal_when_parent_dies(signal.SIGKILL)()  # torchrun's agent gone means that nobody looks after this rank
    job = Job.read(Path(job_file))
    try:
        train(job)
    except BaseException as error:
        write_error_report(Path(job.work) / ERRORS, int(os.environ["RANK"]), error, traceback.format_exc())
        raise


def train(job: Job) -> None:
    """Does the job on this rank."""
    stop = StopRequest()
    params = job.load_params()
    config = params.runs[job.run].train
    set_determinism(config)
    with process_group(Path(job.work) / MEETING / "ranks") as ranks:
        trainer, done = build_trainer(job, params, ranks, stop)
        trainer.fit(done)


def build_trainer(job: Job, params: Params, ranks: Ranks, stop: StopRequest) -> tuple[Trainer, int]:
    """The trainer of a job at its start or its resume point, and the number of steps done.

    Raises:
        CheckpointError: the checkpoint to go on from was made with another seed.
    """
    config = params.runs[job.run].train
    start = Path(job.inputs["init"])
    model = build_sharded_model(Path(job.resume or start), config, ranks, start=start, seed=params.seed)
    optimizer = build_optimizer(model, config.optim, component_of)
    done = 0
    if job.resume is not None:
        position = load_state(optimizer, Path(job.resume), model)
        if position.seed != params.seed:
            raise CheckpointError(f"{job.resume} was trained with seed {position.seed}, the params say {params.seed}")
        done = position.step
    parameters = merged_counts(model)
    trainer = Trainer(
        run=job.run,
        train=config,
        seed=params.seed,
        stamp=job.stamp,
        model=model,
        optimizer=optimizer,
        batches=build_loader(job.inputs, start, config, ranks, params.runtime.loader_workers, shard_cache(job, params)),
        ranks=ranks,
        places=Places(start=start, out=Path(job.out), work=Path(job.work)),
        logs=open_logs(job, params, done, sum(parameters.values())) if ranks.first else None,
        stop=stop,
        parameters=parameters,
    )
    return trainer, done


def shard_cache(job: Job, params: Params) -> RangeCache | None:
    """Where this machine keeps what comes from shards in a bucket."""
    folder, limit = params.runtime.shard_cache or job.shard_cache, params.runtime.shard_cache_bytes
    return RangeCache(folder, limit) if folder and limit else None


def open_logs(job: Job, params: Params, done: int, parameters: int) -> Logs:
    """The log files of the first rank."""
    config = params.runs[job.run].train
    work = Path(job.work)
    logs = Logs(
        metrics=MetricsLog(work / METRICS, after_step=done),
        skipped=SkippedLog(work / SKIPPED, after_step=done),
        events=EventLog(work / EVENTS),
        timings=EventLog(Path(job.timings)),
        every=params.runtime.log_every,
    )
    logs.timings.append_timed({"kind": "start", "step": done, "pace": pace_key(config, parameters)})
    return logs


if __name__ == "__main__":
    main(sys.argv[1])
