"""How a stage's command line reaches the hardware: one table, one entry for each way.

A launcher turns `python -m pipelines.<stage> key=value` into the command that runs it and stays in the foreground until
it has ended. `local` runs it on this machine, where the stage itself starts `torchrun` with the run's own
`train.processes`.
"""

import sys
from collections.abc import Callable, Sequence


def local(module: str, arguments: Sequence[str]) -> list[str]:
    """On this machine, with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


LAUNCHERS: dict[str, Callable[[str, Sequence[str]], list[str]]] = {"local": local}
