"""One of the processes among which `pipelines.predict` shares the questions of a task; it starts them itself.

Reads paths of jobs from its standard input, see `molmo_model.eval.ranks`.
"""

import sys
from functools import cache

from molmo_model.data.shard_reader import ShardReader
from molmo_model.eval.journal import Journal
from molmo_model.eval.ranks import Job, serve
from molmo_model.eval.tasks import light
from pipelines.predict import ask


@cache
def _reader(place: str) -> ShardReader:
    return ShardReader(place)


def work(job: Job) -> None:
    """Answers the questions of a job into its own file of the journal."""
    reader = _reader(job.shards)
    with Journal(job.journal, job.writer, others=False) as journal:
        ask(job, journal, reader, [light(reader.read(one.row)) for one in job.wanted], lambda count: None)


if __name__ == "__main__":
    serve(sys.stdin, work)
