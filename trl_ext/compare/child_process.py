"""Child processes that run one function each, so that one that crashes, hangs or is killed takes nothing else with it.

Importing torch and TRL takes ten seconds, so every child is forked from a process that has done it. A child sends
messages to the parent through a pipe. When the parent is gone, the next message fails, which ends the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver
from typing import Any

from ..errors import TrlExtError
from ..support import child_errors
from ..support.tables import duration

PRELOAD = "trl_ext.compare.preload"
PATIENCE = 5.0
"""Seconds that a process may take to end when it is told to."""
REMIND = 15.0
"""Seconds after which `call` says that a process is still at work."""


@dataclasses.dataclass(frozen=True)
class Said:
    """A sentence for the user."""

    text: str


@dataclasses.dataclass(frozen=True)
class Step:
    """Progress of a run, with the names of what it has logged so far where there are new ones."""

    done: int
    total: int
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """What the function returned. It is the last message of a child."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why the function returned nothing. It is the last message of a child.

    Attributes:
        message: What the user should know.
        error: The error, if it is one of trl_ext, whose message says what to do.
        trace: The traceback, where there is one.
    """

    message: str
    error: TrlExtError | None = None
    trace: str = ""


Message = Said | Step | Result | Failure
Tell = Callable[[Said | Step], None]


class ChildProcess:
    """A function that runs in a process of its own: `function(*args, tell)`."""

    def __init__(self, process: Any, pipe: connection.Connection) -> None:
        self.process = process
        self.pipe = pipe

    def receive(self) -> Message:
        """Waits for the next message and returns it. A child that dies without one counts as a `Failure`."""
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError):  # an OSError where it died in the middle of a message
            self.process.join()
            message = Failure(child_errors.how_it_ended(self.process.exitcode))
        if isinstance(message, Result | Failure):
            self.process.join(timeout=PATIENCE)  # threads of libraries may keep it from ending
            self.stop()
        return message

    def stop(self) -> None:
        """Ends the process, which cleans up if it still can."""
        self.process.terminate()
        self.process.join(timeout=PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def start(function: Callable[..., Any], *args: Any, log: str) -> ChildProcess:
    """Runs `function(*args, tell)` in a new process and sends what it prints to the file `log`."""
    context = _context()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, args, send, log, dict(os.environ), os.getcwd()))
    with _environment():
        process.start()
    send.close()
    return ChildProcess(process, receive)


def call(function: Callable[..., Any], *args: Any, log: str, say: Callable[[str], None]) -> Any:
    """Runs a function in a process of its own and returns what it returns.

    Args:
        function: Called as `function(*args, tell)`.
        args: Its arguments.
        log: The file for what it prints.
        say: Gets what the function tells, and now and then how long it has been at it.

    Raises:
        TrlExtError: The function raised one, or the process died.
    """
    doing, began = "starting a process that loads TRL", time.monotonic()
    say(doing)
    child = start(function, *args, log=log)
    try:
        while True:
            if not ready([child], REMIND):
                say(f"{doing}, {duration(time.monotonic() - began)} so far")
                continue
            match child.receive():
                case Said(text):
                    doing, began = text, time.monotonic()
                    say(text)
                case Result(value):
                    return value
                case Failure(message, error, trace):
                    raise error or TrlExtError(f"{message}\n{trace}".rstrip())
    except BaseException:
        child.stop()
        raise


def ready(children: Sequence[ChildProcess], timeout: float) -> list[ChildProcess]:
    """Waits up to `timeout` seconds for a message and returns the children that have sent one."""
    pipes = connection.wait([child.pipe for child in children], timeout)
    return [child for child in children if child.pipe in pipes]


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets the environment that the process to fork from starts with: its search path, and one thread."""
    wanted = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        if "forkserver" in multiprocessing.get_all_start_methods():
            forkserver.ensure_running()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(
    function: Callable[..., Any],
    args: Sequence[Any],
    pipe: connection.Connection,
    log: str,
    environment: dict[str, str],
    folder: str,
) -> None:
    """Calls the function and sends its result or its error. The main function of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent decides what it means
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        _send_output(log)
        import torch

        torch.set_num_threads(1)  # as many runs at once as there are cores, and the same numbers on any number of them
        pipe.send(Result(function(*args, pipe.send)))
    except BrokenPipeError:
        sys.exit(1)  # nobody listens any more
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        ours = error if isinstance(error, TrlExtError) else None
        with contextlib.suppress(BrokenPipeError):
            pipe.send(Failure(str(ours) if ours else f"{type(error).__name__}: {error}", ours, trace))
        with contextlib.suppress(OSError):  # a full disk
            print(trace, file=sys.stderr, flush=True)
        sys.exit(1)


def _send_output(log: str) -> None:
    """Sends everything that is printed from here on, by C code too, to the file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
