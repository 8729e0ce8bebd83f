"""The one resource: runs a long stage as a child process, live and cancellable, over Dagster Pipes."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from molmo_assets import process_tree
from molmo_assets.launchers import LAUNCHERS
from molmo_model.config import lookup

STOPPED_ON_REQUEST = 75
"""Exit code of a stage that got SIGTERM and saved its state."""


class StageProcess(dg.ConfigurableResource):
    """Runs `python -m pipelines.<stage>` through a launcher and hands on what it reports while it runs."""

    launcher: str = "local"
    """A name of the table in `molmo_assets.launchers`."""
    grace_seconds: float = 7.0
    """How long a cancelled stage may take to save and exit before everything that is left of it is killed."""
    poll_seconds: float = 0.2

    def run(
        self,
        context: dg.AssetExecutionContext | dg.OpExecutionContext,
        module: str,
        arguments: list[str],
        on_message: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        """Runs one stage to its end.

        Args:
            context: of the step that waits for it.
            module: such as `pipelines.train`.
            arguments: `key=value` each.
            on_message: called in this thread with every custom message of the stage, soon after it was sent; None for
                a stage that sends none.

        Raises:
            Failure: the stage exited with another code than 0; carries the last lines of its stderr.
        """
        command = lookup(LAUNCHERS, self.launcher, "launcher")(module, arguments)
        if on_message is None:
            tree = process_tree.start(command, {})
            last_lines = self._wait(context, tree, command, lambda: None)
        else:
            with dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=dg.PipesTempFileMessageReader(),
            ) as session:
                mailbox = _Mailbox(session, on_message)
                tree = process_tree.start(command, session.get_bootstrap_env_vars())
                last_lines = self._wait(context, tree, command, mailbox.hand_on)
            mailbox.hand_on()
        if (code := tree.process.returncode) != 0:
            stopped = "stopped on request, its state is saved" if code == STOPPED_ON_REQUEST else f"exited with {code}"
            text = "\n".join(last_lines)
            raise dg.Failure(f"{module} {' '.join(arguments)} {stopped}\n{text}", metadata={"exit_code": code})

    def _wait(
        self, context: Any, tree: process_tree.Tree, command: list[str], hand_on: Callable[[], None]
    ) -> deque[str]:
        """Waits for the child, handing on its messages; returns its last lines. An interrupt ends its whole tree."""
        context.log.info(f"process {tree.process.pid}: {' '.join(command)}")
        last_lines, reader = _forward_stderr(tree)
        try:
            while tree.process.poll() is None:
                time.sleep(self.poll_seconds)
                hand_on()
        except BaseException:  # a cancelled run arrives as an interrupt, wherever this thread is
            process_tree.end(tree, self.grace_seconds, context.log.warning)
            hand_on()
            raise
        if tree.alive():  # it ended by itself but left something behind
            process_tree.end(tree, 1.0, context.log.warning)
        reader.join(timeout=5)
        return last_lines


class _Mailbox:
    """The custom messages of a Pipes session, each handed on once."""

    def __init__(self, session: Any, on_message: Callable[[Mapping[str, Any]], None]) -> None:
        self.session, self.on_message, self.seen = session, on_message, 0

    def hand_on(self) -> None:
        messages = self.session.get_custom_messages()
        for message in messages[self.seen :]:
            self.on_message(message)
        self.seen = len(messages)


def _forward_stderr(tree: process_tree.Tree) -> tuple[deque[str], threading.Thread]:
    """Copies the child's stderr to ours and keeps its last lines for the failure's message."""
    last_lines: deque[str] = deque(maxlen=20)

    def forward() -> None:
        for line in tree.process.stderr or ():
            sys.stderr.write(line)
            if line.strip():
                last_lines.append(line.rstrip())

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    return last_lines, thread
