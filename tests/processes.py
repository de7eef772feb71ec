"""Programs that tests start: a limit of time for each, which also ends the programs that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT = 300.0
"""Seconds for a program. The slowest takes a minute on an idle machine."""
_LAST_WORDS = 5.0
"""Seconds in which programs that hang write where they are."""


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    check: bool = False,
    timeout: float = LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end and returns its output, like `subprocess.run` with captured text.

    That function waits without limit for the output of programs which the killed one has started. This one makes all of
    them a group and ends the group. Python's programs write first where each of their threads is.

    Raises:
        AssertionError: The program took longer than `timeout`, or failed and `check` asks that it does not.
    """
    process = subprocess.Popen(
        command,
        env={**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        try:
            output, errors = process.communicate(timeout=_LAST_WORDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
        raise AssertionError(f"{command} took longer than {timeout:g} s\n{output[-3000:]}\n{errors[-10000:]}") from None
    finally:
        _end_group(process.pid)
    assert not check or process.returncode == 0, f"{command}\n{output[-3000:]}\n{errors[-5000:]}"
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_python(code: str, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new interpreter."""
    return run([sys.executable, "-c", code, *arguments], check=check)


def launch(number: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script on several processes under accelerate's launcher, on the CPU with gloo, and requires success."""
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(number),
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return run([sys.executable, *launcher, str(script), *arguments], env=environment, check=True)


def _end_group(group: int) -> None:
    """Ends what a program has left running."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing is left
