# mypy: disable-error-code="empty-body"
"""Whole runs: several trainings in place of one, and the hook that controls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .plugin import hookspec


class Job(Protocol):
    """Offers what a plugin needs that owns a whole run (hook `run`).

    Every method is collective unless it says otherwise. Finished work lies in folders under `folder`, so that a killed
    run can go on. See `produce`.
    """

    @property
    def args(self) -> Any:
        """Returns the training arguments of every training. Read them, never write them."""

    @property
    def model(self) -> str:
        """Returns the model that the run begins with: a folder or a name on the hub."""

    @property
    def data(self) -> Any:
        """Returns the training data (`datasets.Dataset`)."""

    @property
    def folder(self) -> Path:
        """Returns `output_dir` as an absolute path."""

    @property
    def resume(self) -> bool:
        """Tells whether the user asked to go on with what lies in `folder`."""

    @property
    def peft_config(self) -> Any:
        """Returns the adapter that every training adds, or None."""

    @property
    def quantized(self) -> bool:
        """Tells whether every training loads its model quantized."""

    @property
    def is_main(self) -> bool:
        """Tells whether this is the main process."""

    @property
    def num_processes(self) -> int:
        """Counts the processes of the run."""

    @property
    def process_index(self) -> int:
        """Returns the number of this process, from 0."""

    def wait(self) -> None:
        """Waits until every process is here."""

    def tell(self, message: str) -> None:
        """Prints a line on the main process. Not collective."""

    def log(self, metrics: Mapping[str, float], *, step: int, steps: int) -> None:
        """Records numbers of the run as a whole, such as those of a round. Not collective.

        They are written to `folder/trl_ext_rounds.json`. `trl_ext compare` measures them as `PLUGIN/NAME`. A resumed
        run logs finished rounds again, in the same order.

        Args:
            metrics: Name -> number, the same on every process.
            step: Number of the round, from 1.
            steps: How many there will be.
        """

    def produce(self, name: str, make: Callable[[Path], None], *, everywhere: bool = False) -> Path:
        """Returns `folder/name`, and makes it if it is not there.

        A run that was killed inside `make` makes the folder anew. A run that was killed later finds it.

        Args:
            name: Name of the folder.
            make: Fills an empty folder, which then receives the name.
            everywhere: Whether `make` runs on every process. By default it runs on the main process.
        """

    def write(self, file: Path, text: str) -> None:
        """Writes a file that is there as a whole or not at all, also after a kill. Not collective."""

    def sampler(
        self, model: str, *, num: int, temperature: float, top_p: float, max_tokens: int
    ) -> Callable[[list[Any], int], list[list[Any]]]:
        """Returns a function of prompts and a seed that samples `num` completions of each prompt, as text or messages.

        The same prompts and seed give the same completions on every process. Neither this method nor the function is
        collective.
        """

    def rewards(
        self, functions: Sequence[str], weights: Sequence[float] | None = None
    ) -> Callable[[list[dict[str, Any]], list[Any]], list[float]]:
        """Returns a function of dataset rows and one completion of each that sums their weighted rewards.

        A row to which no reward applies has NaN. Not collective.

        Args:
            functions: Reward functions: names of TRL's, or `module.function` paths.
            weights: One weight per function. None weighs each with 1.
        """

    def train(self, model: str, data: Any, name: str, **settings: Any) -> Path:
        """Trains from `model`, with `model` as the reference, and saves the result in `folder/name`, as `produce` does.

        The trainer has all plugins of the run. A killed training goes on from its last checkpoint.

        Args:
            model: A folder or a name on the hub.
            data: Preference pairs.
            name: Name of the result's folder. With `peft_config` the result is an adapter on `model`.
            settings: Training arguments that differ from `args`.

        Returns:
            `folder/name`.
        """

    def open(self, model: str | Path) -> Any:
        """Loads the model of a folder onto the CPU. An adapter is merged into its base, in float32. Not collective."""

    def save(self, model: Any, folder: Path, *, like: str | Path) -> None:
        """Saves a model from `open` with the tokenizer. A merged model has the precision of `like`. Not collective."""

    def finish(self, model: str | Path) -> None:
        """Copies a model to `output_dir` as the result of the run. An adapter is merged into its base."""


@hookspec
def run(job: Job) -> None:
    """Controls the whole run: several trainings in place of one. One owner.

    Runs on every process. `trl_ext train` calls it in place of TRL's script, and `trl_ext.run` calls it in a Python
    script. The trainers that `job.train` builds have all plugins of the run, this one included. Keep finished work in
    folders (`job.produce`), so that a killed run can go on. DPO. Collective.

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
