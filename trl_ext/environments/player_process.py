"""An environment in a process of its own: the side that asks it, and `main`, which that process runs.

A process can be stopped whatever its code is doing, and may die without taking the training run along; a thread can do
neither. It is a fresh interpreter, not a fork: a trainer's process has threads, and its script may have no main guard.
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
from .player import Failed, Seen, Spaces, installed

START_SECONDS = 60.0
"""How long a process may take to start and to import and make its environment."""
_ORPHANED = 10.0
"""Seconds after the limit at which a process ends by itself, because nobody is left who would end it."""


class Worker:
    """Plays in a process of its own, with a limit for every reset and step.

    The process starts with the object, so that those of a batch start side by side. After a failure the next reset has
    a new one.

    Args:
        make: Makes the environment; cloudpickle takes it to the other process.
        pictures: Whether to render after every reset and step.
        seconds: The limit.
    """

    def __init__(self, make: Callable[[], Any], pictures: bool, seconds: float) -> None:
        self._job = installed("cloudpickle").dumps((make, pictures, seconds))
        self._seconds = seconds
        self._start()

    def spaces(self) -> Spaces:
        return self._ask("spaces")

    def reset(self, seed: int) -> Seen:
        return self._ask("reset", seed)

    def step(self, action: Any) -> Seen:
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
        if not self._stop.alive:
            self._start()
        if not self._ready:
            self._connection_does(lambda: self._connection.send_bytes(self._job))
            self._answer(START_SECONDS)
            self._ready = True
        self._connection_does(lambda: self._connection.send((command, *arguments)))
        return self._answer(self._seconds)

    def _answer(self, seconds: float) -> Any:
        if not self._connection_does(lambda: self._connection.poll(seconds)):
            self._stop()
            raise Failed(f"no answer within {seconds:g} s; its process was stopped")
        answer = self._connection_does(self._connection.recv)
        if isinstance(answer, Failed):
            self._stop()
            raise answer
        return answer

    def _connection_does(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            self._stop()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise Failed(f"its process {how}") from error


def _stop(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def serve(connection: Connection) -> None:
    """Answers until the other side is gone. Only plain values and spaces cross, so that no exception fails to."""
    env = None
    try:
        make, pictures, seconds = pickle.loads(connection.recv_bytes())
        env = make()
        connection.send("ready")
        while True:
            command, *arguments = connection.recv()
            faulthandler.dump_traceback_later(seconds + _ORPHANED, exit=True)
            answer: Any
            if command == "spaces":
                answer = player.spaces_of(env)
            elif command == "reset":
                answer = player.reset(env, arguments[0], pictures)
            else:
                answer = player.step(env, arguments[0], pictures)
            faulthandler.cancel_dump_traceback_later()
            connection.send(answer)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # an environment may raise anything
        connection.send(player.failed(error))


def main() -> None:
    """Serves the connection whose descriptor is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes the connection
    serve(Connection(int(sys.argv[1])))
