"""A side that runs in a process of its own, perhaps in another environment, and works when it is its turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent


class Peer:
    """A script of this folder in its own process, which does its work once at every call.

    Args:
        python: The interpreter of the peer's environment.
        script: Name of the script, which ends in ``take_turns``.
        arguments: Of the script.
    """

    def __init__(self, python: str, script: str, *arguments: object):
        self.turn, theirs = multiprocessing.Pipe()
        command = [python, "-W", "ignore", str(PEERS / script), str(theirs.fileno()), *map(str, arguments)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.turn.recv()  # it is ready

    def __call__(self) -> Any:
        """What the work returned.

        Raises:
            EOFError: The process ended.
        """
        self.turn.send(None)
        return self.turn.recv()

    def stop(self) -> None:
        """Ends the process."""
        self.turn.close()
        self.process.wait()


def version_of(package: str, python: str) -> str:
    """Which version of a package the environment of the interpreter ``python`` has."""
    code = f"from importlib.metadata import version; print(version({package!r}), end='')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def take_turns(work: Callable[[], object]) -> None:
    """In the peer: works whenever it is told to, until nobody is there to tell."""
    turn = Connection(int(sys.argv[1]))
    turn.send(None)
    with contextlib.suppress(EOFError):
        while True:
            turn.recv()
            turn.send(work())
