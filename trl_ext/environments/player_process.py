"""Player in a process of its own: the side that asks, and `main`, which that process runs.

A process can be stopped whatever its code is doing, and it may die without ending the training run. A thread can do
neither. The process is a fresh interpreter and not a fork, because a trainer's process has threads and its script may
have no main guard.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from . import player
from .player import EnvironmentFailure, Outcome, Spaces, installed

START_SECONDS = 60.0
"""How long a process may take to start and to import and make its environment."""
_ORPHANED_SECONDS = 10.0
"""How long after its limit a process ends by itself, in case nobody is left to end it."""


class PlayerProcess:
    """Plays in a process of its own, with a time limit for every reset and step.

    The process starts with the object, so that those of a batch start side by side. After a failure the next reset
    starts a new one.

    Args:
        make: Makes the environment. It goes to the other process by cloudpickle.
        pictures: Whether to render after every reset and step.
        seconds: The time limit.
    """

    def __init__(self, make: Callable[[], Any], pictures: bool, seconds: float) -> None:
        self._setup = installed("cloudpickle").dumps((make, pictures, seconds))
        self._seconds = seconds
        self._start()

    def spaces(self) -> Spaces:
        """Returns the spaces of the environment."""
        return self._ask("spaces")

    def reset(self, seed: int) -> Outcome:
        """Begins an episode, after a failure in a new environment."""
        return self._ask("reset", seed)

    def step(self, action: Any) -> Outcome:
        """Takes an action."""
        return self._ask("step", action)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
            )
        self._connection = Connection(ours.detach())
        self._ready = False
        self._stop = weakref.finalize(self, _stop, self._process, self._connection)

    def _ask(self, command: str, *arguments: Any) -> Any:
        """Sends a command and returns the answer."""
        if not self._stop.alive:  # the last process was stopped
            self._start()
        if not self._ready:
            self._use_connection(lambda: self._connection.send_bytes(self._setup))
            self._receive(START_SECONDS)
            self._ready = True
        self._use_connection(lambda: self._connection.send((command, *arguments)))
        return self._receive(self._seconds)

    def _receive(self, seconds: float) -> Any:
        """Waits for an answer and returns it, or stops the process if none comes in time."""
        if not self._use_connection(lambda: self._connection.poll(seconds)):
            self._stop()
            raise EnvironmentFailure(f"no answer within {seconds:g} s; its process was stopped")
        answer = self._use_connection(self._connection.recv)
        if isinstance(answer, EnvironmentFailure):
            self._stop()
            raise answer
        return answer

    def _use_connection(self, transfer: Callable[[], Any]) -> Any:
        """Sends or receives, and says how the process ended if it is gone."""
        try:
            return transfer()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            self._stop()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise EnvironmentFailure(f"its process {how}") from error


def _stop(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def serve(connection: Connection) -> None:
    """Answers commands until the other side is gone.

    Only plain values and spaces are sent, never an exception of the environment, which might not survive pickling.
    """
    env = None
    try:
        make, pictures, seconds = pickle.loads(connection.recv_bytes())
        env = make()
        connection.send("ready")
        while True:
            command, *arguments = connection.recv()
            faulthandler.dump_traceback_later(seconds + _ORPHANED_SECONDS, exit=True)
            answer: Any
            if command == "spaces":
                answer = player.read_spaces(env)
            elif command == "reset":
                answer = player.reset(env, arguments[0], pictures)
            else:
                answer = player.step(env, arguments[0], pictures)
            faulthandler.cancel_dump_traceback_later()
            connection.send(answer)
    except (EOFError, BrokenPipeError):
        return
    except (Exception, SystemExit) as error:  # an environment may raise anything
        connection.send(player.as_failure(error))


def main() -> None:
    """Serves the connection whose file descriptor is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes the connection
    serve(Connection(int(sys.argv[1])))
