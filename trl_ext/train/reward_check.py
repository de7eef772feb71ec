"""Trial of the reward functions in a process of their own, as training will call them.

User code in the training process would leave traces: judges bound to another event loop, counters, open connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..support.reward_functions import check_result, is_async, parameters, reward_functions

REQUEST, ANSWER = "request.pickle", "answer.json"
SKIP = "--no_reward_check leaves this trial out."
LIMIT, GRACE = 300.0, 5.0
"""Seconds that the trial may take, and that its process may take to end after it has answered."""
_DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables with which the process would join the training processes."""


def try_in_own_process(
    paths: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    warn: Callable[[str], None],
    unknown: Collection[str] = (),
) -> None:
    """Runs `check_rewards` in another process.

    Args:
        paths: The reward functions by dotted path.
        rows: Rows of the data as a call in training has them.
        state: What the trainer's state holds.
        warn: Called with a sentence about what may fail later.
        unknown: What training passes and the trial cannot; functions that name it are not called.

    Raises:
        ConfigError: As `check_rewards`.
    """
    with tempfile.TemporaryDirectory(prefix="trl_ext-") as name:
        folder = Path(name)
        request = {"paths": list(paths), "rows": list(rows), "state": dict(state), "unknown": sorted(unknown)}
        try:
            (folder / REQUEST).write_bytes(pickle.dumps(request))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            warn(f"the reward functions were not tried: rows of the data cannot go to another process ({error}).")
            return
        ending = _run(folder)
        if not (folder / ANSWER).exists():
            warn(f"the reward functions could not be tried: their process {ending}. {SKIP}")
            return
        answer = json.loads((folder / ANSWER).read_text())
    for note in answer["notes"]:
        warn(note)
    if answer["error"] is not None:
        raise ConfigError(answer["error"])


def _run(folder: Path) -> str:
    """Runs the process until it has answered and ended, and returns how it ended, in words."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _DISTRIBUTED and not name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_"))
    }
    # what this process can import, its child can import too
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "trl_ext.train.reward_check", str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)
    end = time.monotonic() + LIMIT
    try:
        while process.poll() is None and time.monotonic() < end:
            if (folder / ANSWER).exists():
                end = min(end, time.monotonic() + GRACE)
            time.sleep(0.02)
    finally:
        ended = process.poll()
        with contextlib.suppress(ProcessLookupError):  # what it started ends with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"did not end within {LIMIT:g} s" if ended is None else f"ended with exit code {ended}"


def main(argv: Sequence[str]) -> None:
    """Tries what the request in the folder `argv[0]` names, and writes the answer into it."""
    folder = Path(argv[0])
    request = pickle.loads((folder / REQUEST).read_bytes())
    notes: list[str] = []
    problem: str | None = None
    functions: dict[str, Callable[..., Any]] = {}
    try:
        functions = reward_functions(request["paths"])
    except ConfigError as error:  # the training process could import them
        notes.append(f"the reward functions could not be tried in a process of their own: {error} {SKIP}")
    try:
        check_rewards(functions, request["rows"], notes.append, request["unknown"], request["state"])
    except ConfigError as error:
        problem = str(error)
    unfinished = folder / f"{ANSWER}.part"
    unfinished.write_text(json.dumps({"notes": notes, "error": problem}))
    unfinished.rename(folder / ANSWER)


def check_rewards(
    functions: Mapping[str, Callable[..., Any]],
    rows: Sequence[Mapping[str, Any]],
    warn: Callable[[str], None],
    unknown: Collection[str] = (),
    state: Mapping[str, Any] | None = None,
) -> None:
    """Calls every reward function as the trainer will, on empty completions, and checks what it returns.

    Functions that need what only training has are not called: `environments`, fields of rollouts, the `unknown`.

    Args:
        functions: The functions by path.
        rows: Rows of the data, each prompt as often as in a call of training.
        warn: Called with a sentence about what may fail later.
        unknown: Names of what training passes and this call cannot.
        state: What the trainer's state holds at the first step.

    Raises:
        ConfigError: A function does not return one number (or None) per completion.
    """
    # what the trainer passes besides the columns of the data
    conversational = isinstance(rows[0]["prompt"], list)
    empty: Any = [{"role": "assistant", "content": ""}] if conversational else ""
    ignored = ("prompt", "completion", "completion_ids")
    given: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name not in ignored}
    given |= {"prompts": [row["prompt"] for row in rows], "completions": [empty for _ in rows]}
    # an empty completion still holds the token that ends it
    given["completion_ids"] = [[0] for _ in rows]
    given |= {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
    given["trainer_state"] = _state({"max_steps": 1, "num_train_epochs": 1} | dict(state or {}))
    with asyncio.Runner() as runner:  # one loop for all, as in training
        for path, function in functions.items():
            named, needed = parameters(function)
            if _is_model(function) or named & {*unknown, "environments"} or needed - given.keys():
                continue
            try:
                result = function(**given)
                if is_async(function):
                    result = runner.run(_awaited(result))
            except Exception as error:  # an empty completion is a hard case, so this is not an error yet
                warn(
                    f"reward function {path!r} raised {type(error).__name__}: {error} when it was tried on empty "
                    f"completions; training would stop with the same error if the model answers with nothing. {SKIP}"
                )
                continue
            try:
                check_result(path, result, len(rows))
            except ConfigError as error:
                raise ConfigError(f"{error} {SKIP}") from None


async def _awaited(result: Any) -> Any:
    return await result


def _state(values: Mapping[str, Any]) -> Any:
    """Returns the state of a trainer that has taken no step."""
    from transformers import TrainerState

    return TrainerState(epoch=0.0, **values)


def _is_model(function: Any) -> bool:
    """Tells whether a reward is a model, or the path or name of one, which the trainer loads."""
    from torch.nn import Module

    return isinstance(function, str | Module)


if __name__ == "__main__":
    main(sys.argv[1:])
