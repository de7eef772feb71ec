"""The runs of a comparison: what each is trained with, and the key that stands for everything that determines it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext_hooks import TrainerKind

from .recipe import Recipe

Records = Mapping[tuple[str, int], Mapping[str, Any]]
"""(arm, seed) -> record."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known about a recipe after the checks.

    Attributes:
        kind: The trainer.
        settings: Arm -> all TRL settings of its runs but `seed` and `output_dir`.
        identities: Arm -> what determines its numbers besides the seed.
        rewards: Names of the rewards, where they are known.
        accelerator: Whether runs share a device other than the CPU.
    """

    kind: TrainerKind
    settings: dict[str, dict[str, Any]]
    identities: dict[str, dict[str, Any]]
    rewards: tuple[str, ...] | None
    accelerator: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run of a comparison: an arm with a seed.

    Attributes:
        arm: Name of the arm.
        seed: Of the run and of its data.
        kind: The trainer.
        plugins: Plugin reference -> options, as the user gave them.
        settings: TRL settings of the recipe and of the arm.
        task: Reference of a task, or None where the settings name model and data.
        sizes: Sizes of the task's data.
        identity: What determines the numbers besides the seed, as `prepare` found it.
        folder: Where records and logs go.
    """

    arm: str
    seed: int
    kind: TrainerKind
    plugins: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    task: str | None
    sizes: dict[str, int]
    identity: dict[str, Any]
    folder: str

    @property
    def key(self) -> str:
        """A hash of everything that determines the numbers of the run."""
        text = json.dumps([self.identity, self.seed], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()

    def file(self, ending: str) -> Path:
        """Returns the file of this run with an ending such as `.json`."""
        return Path(self.folder) / f"{self.arm}-{self.seed}-{self.key[:10]}{ending}"

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def list_runs(recipe: Recipe, prepared: Prepared, folder: Path) -> list[Run]:
    """Returns all runs, seed by seed, so that a comparison that is stopped early has pairs."""
    return [
        Run(
            arm=name,
            seed=seed,
            kind=prepared.kind,
            plugins=arm.plugins,
            settings=prepared.settings[name],
            task=recipe.task,
            sizes=recipe.sizes,
            identity=prepared.identities[name],
            folder=str(folder),
        )
        for seed in recipe.seeds
        for name, arm in recipe.arms.items()
    ]
