"""What the host costs: step time with idle plugins and with GDPO, as a ratio to plain TRL, from one run.

Three trainers take turns, one training step each, so that a machine that gets slower or faster meets all of them. The
model is a random four-layer Qwen2; a larger one makes the overhead smaller.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from trl_ext_hooks import Loss, Plugin, Round, hookimpl

from .. import api
from ..conformance import quiet
from ..testing import tiny_model, tiny_trainer


class Observer(Plugin):
    """Looks at every stage and changes nothing."""

    name = "observer"
    trainers = ("grpo",)

    @hookimpl
    def rewards(self, scored: Any) -> None:
        return None

    @hookimpl
    def advantages(self, round: Round) -> None:
        return None

    @hookimpl
    def loss_inputs(self, batch: Any) -> None:
        return None

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, tuple[float, float]]:
        return {"seen": (1.0, 1.0)}


ARMS: dict[str, str | None] = {
    "plain TRL": None,
    "idle plugin, every stage observed": "trl_ext.bench.overhead:Observer",
    "gdpo": "gdpo",
}


def measure(steps: int = 40, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """Median step time of every arm and its ratio to plain TRL.

    Returns:
        Per arm `name`, `seconds` (median step), `ratio` (median over rounds of the ratio to plain TRL in the same
        round) and `ratio_low`, `ratio_high` (its quartiles).
    """
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    turns = _Turns(list(ARMS), steps, lambda done: progress(done, steps))
    with tempfile.TemporaryDirectory() as folder, quiet():
        model = tiny_model(f"{folder}/model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
        # every completion has the same length, so that all arms do the same work
        settings: dict[str, Any] = {"logging_steps": 1000, "generation_kwargs": {"min_new_tokens": 8}}
        threads: list[threading.Thread] = []
        for name, plugin in ARMS.items():
            trainer = tiny_trainer("grpo", model, f"{folder}/{len(threads)}", max_steps=steps + 2, **settings)
            if plugin is not None:
                trainer = api.attach(trainer, plugin)
            trainer.add_callback(_callback(turns, name, times[name]))
            threads.append(threading.Thread(target=turns.guard, args=(trainer.train,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.error is not None:
        raise turns.error
    plain = times["plain TRL"][2:]  # the first steps warm caches up
    rows = []
    for name in ARMS:
        ratios = [own / other for own, other in zip(times[name][2:], plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(times[name][2:]),
                "ratio": middle,
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    return rows


class _Turns:
    """Lets threads run one step each, in rotating order."""

    def __init__(self, names: list[str], steps: int, progress: Callable[[int], None]) -> None:
        self.names, self.steps, self.progress = names, steps, progress
        self.condition = threading.Condition()
        self.taken = 0
        self.error: BaseException | None = None

    def order(self, turn: int) -> str:
        shift, place = divmod(turn, len(self.names))
        return self.names[(place + shift) % len(self.names)]

    def wait(self, name: str) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.order(self.taken) == name or self.error is not None)
            if self.error is not None:
                raise RuntimeError("another arm failed")

    def done(self) -> None:
        with self.condition:
            self.taken += 1
            self.progress(self.taken // len(self.names))
            self.condition.notify_all()

    def guard(self, train: Callable[[], Any]) -> None:
        try:
            train()
        except BaseException as error:
            with self.condition:
                self.error = self.error or error
                self.condition.notify_all()


def _callback(turns: _Turns, name: str, times: list[float]) -> Any:
    from transformers import TrainerCallback

    class Turn(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.wait(name)
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.start)
            turns.done()

    return Turn()
