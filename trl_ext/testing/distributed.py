"""One run on several processes against the same run on one, with completions that do not depend on their number.

`accelerate launch` starts this module on every process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_ext_hooks import Generation, Plugin, TrainerKind, TrainerView, hookimpl

from .. import api
from ..errors import ConfigError
from ..plan.stages import ROUNDS
from .tiny import metrics_of, tiny_trainer

ROWS = 12
"""Rows of a round. With groups of four, a group lies on two processes where there are two or three."""
SECONDS = 600.0
"""After how long processes that wait for each other are ended."""


class FixedCompletions(Plugin):
    """Replaces completions by known ones, which depend on the number of the row among those of all processes."""

    name = "fixed-completions"
    trainers = ROUNDS
    state = ("round",)

    def start(self) -> None:
        self.round = 0

    @hookimpl
    def rollout(
        self, prompts: list[Any], generate: Callable[[list[Any]], Generation], trainer: TrainerView
    ) -> Generation:
        result = generate(prompts)
        first = trainer.process_index * len(prompts)
        ids = [
            [10 + (7 * row + 5 * self.round + i * i) % 80 for i in range(1 + (3 * row + self.round) % 7)]
            for row in range(first, first + len(prompts))
        ]
        texts = [trainer.tokenizer.decode(row) for row in ids]
        messages = [[{"role": "assistant", "content": text}] for text in texts]
        self.round += 1
        conversational = bool(prompts) and not isinstance(prompts[0], str)
        return dataclasses.replace(
            result, completion_ids=ids, completions=messages if conversational else texts, tool_mask=None, logprobs=None
        )


def compare(
    processes: int,
    kind: TrainerKind,
    model: str,
    folder: Path,
    plugins: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """Trains on one process and on several, and compares weights and the metrics of plugins.

    Returns:
        How far the weights are apart.

    Raises:
        AssertionError: They differ, or the processes failed or waited for each other.
        ConfigError: The settings cannot be handed to another process, or the rows not be divided.
    """
    rows = settings.get("per_device_train_batch_size", ROWS)
    if rows % processes:
        raise ConfigError(
            f"{rows} rows cannot be divided among {processes} processes: set per_device_train_batch_size."
        )
    request = {"kind": kind, "model": model, "plugins": dict(plugins), "settings": dict(settings), "rows": rows}
    try:
        content = pickle.dumps(request)
        pickle.loads(content)
    except Exception as error:  # pickle raises what the objects raise
        raise ConfigError(
            f"the settings cannot be handed to other processes: {error}. Use functions and classes of modules."
        ) from error
    target = folder / f"{kind}-on-{processes}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "request.pickle").write_bytes(content)
    one = _train(request, target / "one", 1)
    _launch(processes, target)
    several = [pickle.loads((target / f"rank-{rank}.pickle").read_bytes()) for rank in range(processes)]
    return _compared(one, several)


def _compared(one: Mapping[str, Any], several: list[Mapping[str, Any]]) -> str:
    for rank, other in enumerate(several):
        for name, value in other["weights"].items():
            assert (value == several[0]["weights"][name]).all(), f"{name} differs between process 0 and process {rank}"
    difference = max(abs(value - one["weights"][name]).max() for name, value in several[0]["weights"].items())
    assert difference < 1e-4, (
        f"the weights differ by up to {difference:.2g} from those of one process. Compute statistics of a round from "
        f"gathered values, and what a process computes from its own rows only from these."
    )
    for step, (expected, found) in enumerate(zip(one["metrics"], several[0]["metrics"], strict=True), 1):
        for name in expected:
            close = math.isclose(expected[name], found.get(name, math.nan), rel_tol=1e-3, abs_tol=1e-4)
            assert close, f"step {step}: {name} is {found.get(name)} and on one process {expected[name]}"
    return f"weights within {difference:.1g}"


def _train(request: Mapping[str, Any], output: Path, processes: int) -> dict[str, Any]:
    """Trains with the plugins and returns weights, and metrics that plugins report."""
    plugins, kind = dict(request["plugins"]), request["kind"]
    if kind in ROUNDS:  # last, which is innermost
        plugins[f"{__package__}.distributed:FixedCompletions"] = None
    # Adam would make a whole step of a difference in the last bits
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1} | dict(request["settings"])
    settings["per_device_train_batch_size"] = request["rows"] // processes
    with api.enable(plugins) as handle:
        trainer = tiny_trainer(kind, request["model"], output, **settings)
        trainer.train()
        names = tuple(f"{spec.name}/" for spec in handle.specs)
    weights = {name: value.detach().float().numpy() for name, value in _unwrapped(trainer).named_parameters()}
    metrics = [
        {name: value for name, value in entry.items() if name.startswith(names)} for entry in metrics_of(trainer)[:-1]
    ]
    return {"weights": weights, "metrics": metrics}


def _unwrapped(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _launch(processes: int, folder: Path) -> None:
    """Runs this module on several processes of the CPU.

    Raises:
        AssertionError: They failed, or were not done in time.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", f"{__package__}.distributed", str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with (folder / "log.txt").open("w") as log:
        launched = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = launched.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(launched)
    if code:
        lines = (folder / "log.txt").read_text().splitlines()
        raised = [line for line in lines if "Error" in line or "raised in the hook" in line][:3]
        raise AssertionError(f"{processes} processes ended with exit code {code}: {' | '.join(raised) or lines[-1:]}")
    assert code is not None, (
        f"{processes} processes were not done in {SECONDS:.0f} s. A process may wait for another: call collectives on "
        f"every process or on none."
    )


def _end(launched: subprocess.Popen[bytes]) -> None:
    """Ends the launcher and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(launched.pid, signal.SIGKILL)
    launched.wait()


def main(folder: str) -> None:
    """Trains on this process, as one of several."""
    import torch
    from accelerate import PartialState

    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    request = pickle.loads((Path(folder) / "request.pickle").read_bytes())
    result = _train(request, Path(folder) / "several", state.num_processes)
    (Path(folder) / f"rank-{state.process_index}.pickle").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
