# mypy: disable-error-code="empty-body"
"""A run of several trainings, and the hook that takes it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .plugin import hookspec


class Job(Protocol):
    """A whole run, for the plugin that owns it (hook `run`).

    Every method is collective unless it says otherwise. What is finished lies in folders under `folder`, so that a run
    that was killed can go on: see `produce`.
    """

    @property
    def args(self) -> Any:
        """The training arguments of every training; read them, never write them."""

    @property
    def model(self) -> str:
        """The model that the run begins with: a folder or a name on the hub."""

    @property
    def data(self) -> Any:
        """The training data (`datasets.Dataset`)."""

    @property
    def folder(self) -> Path:
        """`output_dir`, absolute."""

    @property
    def resume(self) -> bool:
        """Whether the user asked to go on with what lies in `folder`."""

    @property
    def peft_config(self) -> Any:
        """The adapter that every training adds, or None."""

    @property
    def quantized(self) -> bool: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    def wait(self) -> None:
        """Until every process is here."""

    def tell(self, message: str) -> None:
        """Prints a line, on the main process. Not collective."""

    def log(self, metrics: Mapping[str, float], *, step: int, steps: int) -> None:
        """Records numbers of the run as a whole, such as those of a round. Not collective.

        They go into `folder/trl_ext_rounds.json`, and `trl_ext compare` measures them as `PLUGIN/NAME`. A run that goes
        on logs what is finished again, in the same order.

        Args:
            metrics: Name -> number, the same on all processes.
            step: Number of the round, from 1.
            steps: How many there will be.
        """

    def produce(self, name: str, make: Callable[[Path], None], *, everywhere: bool = False) -> Path:
        """`folder/name`, made only if it is not there: `make` fills an empty folder, which then gets the name.

        `make` runs on the main process, or on all of them with `everywhere`. Killed inside it, the next run makes the
        folder anew; killed after it, never again.
        """

    def write(self, file: Path, text: str) -> None:
        """Writes a file that is there as a whole or not at all, also after a kill. Not collective."""

    def sampler(
        self, model: str, *, num: int, temperature: float, top_p: float, max_tokens: int
    ) -> Callable[[list[Any], int], list[list[Any]]]:
        """A function of prompts and a seed that gives `num` completions of each prompt, as text or messages.

        The same prompts and seed give the same completions on every process. Not collective, neither itself nor the
        function.
        """

    def rewards(
        self, functions: Sequence[str], weights: Sequence[float] | None = None
    ) -> Callable[[list[dict[str, Any]], list[Any]], list[float]]:
        """A function of dataset rows and one completion of each that gives the weighted sum of their rewards.

        `functions` are TRL's reward functions by name, or `module.function` paths. A row to which none of them applies
        gets NaN. Not collective.
        """

    def train(self, model: str, data: Any, name: str, **settings: Any) -> Path:
        """Trains from `model` with `model` as the reference, and saves the result into `folder/name` (by `produce`).

        The trainer has all plugins of the run. A training that was killed goes on from its last checkpoint.

        Args:
            model: A folder or a name on the hub.
            data: Preference pairs.
            name: Where the result goes. With `peft_config` that is an adapter on `model`.
            settings: Training arguments that differ from `args`.
        """

    def open(self, model: str | Path) -> Any:
        """The model of a folder on the CPU; an adapter is merged into its base, in float32. Not collective."""

    def save(self, model: Any, folder: Path, *, like: str | Path) -> None:
        """Saves a model from `open` with the tokenizer; a merged one in the precision of `like`. Not collective."""

    def finish(self, model: str | Path) -> None:
        """Puts a model into `output_dir` as the result of the run: a copy, or an adapter merged into its base."""


@hookspec
def run(job: Job) -> None:
    """Takes the whole run over: several trainings in place of one. One owner. Collective. DPO.

    `trl_ext train` calls it in place of TRL's script, `trl_ext.run` in a Python script. The trainers that `job.train`
    builds have all plugins of the run, this one included. Keep what is finished in folders (`job.produce`), so that a
    killed run can go on.

    ```python
    class TwoHalves(Plugin):
        name = "two-halves"
        trainers = ("dpo",)

        @hookimpl
        def run(self, job):
            half = len(job.data) // 2
            first = job.train(job.model, job.data.select(range(half)), "first-half")
            second = job.train(str(first), job.data.select(range(half, 2 * half)), "second-half")
            job.finish(second)
    ```
    """
