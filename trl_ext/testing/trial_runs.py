"""Runs of one plugin that the conformance checks compare."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import api
from ..catalog.declaration import PluginSpec
from ..inspection.file_format import find, read
from ..plan.stages import ROUNDS
from ..support.quiet import quiet
from ..trl_internals import trainer_state
from . import distributed
from .hook_costs import HookCosts
from .tiny import metrics_of, tiny_args, tiny_trainer

WITHOUT_INFLUENCE = {
    "configure", "trainer_arguments", "setup", "teardown", "annotate", "batch_fields", "hidden_positions", "logps",
    "pair_batch", "round_metrics", "loss_metrics", "pair_metrics", "inspect", "optimizer_step", "state_dict",
    "load_state_dict",
}  # fmt: skip
"""Hooks with which a plugin need not change the numbers of a run. With any other it must, or it did nothing."""
NOT_TRAINING_ARGUMENTS = ("cls", "data", "rewards", "trainer")
"""Arguments of `tiny_trainer` that are not handed on to the training arguments."""


@dataclasses.dataclass
class TrialRuns:
    """Runs of one plugin with one trainer. Every check returns its detail, or raises AssertionError."""

    kind: Any
    model: str
    folder: Path
    reference: str
    options: Mapping[str, Any] | None
    settings: dict[str, Any]
    spec: PluginSpec
    first: Any = None
    first_round: list[Any] | None = None
    hook_costs: HookCosts = dataclasses.field(default_factory=HookCosts)
    _stock: Any = None
    _stock_first_round: list[Any] | None = None

    @functools.cached_property
    def round_steps(self) -> int:
        """Steps of a round. A checkpoint inside a round is resumed with another round, by plain TRL too."""
        given = {name: value for name, value in self.settings.items() if name not in NOT_TRAINING_ARGUMENTS}
        args = tiny_args(self.kind, self.folder, **given)
        if self.kind not in ROUNDS:
            return 1
        return max(args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps, 1)

    def build(self, name: str, **settings: Any) -> Any:
        output = self.folder / f"{self.kind}-{name}"
        sizes = {"max_steps": 2 * self.round_steps, "save_steps": self.round_steps}
        return tiny_trainer(self.kind, self.model, output, **self.settings | sizes | settings)

    def train(self, name: str, resume: str | None = None, **settings: Any) -> Any:
        with quiet(), api.enable({self.reference: self.options}):
            trainer = self.build(name, **settings)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    def stock(self) -> tuple[Any, list[Any]]:
        """Returns a run without plugins, and what its first round generated."""
        if self._stock is None:
            with quiet():
                trainer = self.build("stock")
                self._stock_first_round = _keep_first_round(trainer)
                trainer.train()
            self._stock = trainer
        return self._stock, self._stock_first_round or []

    def trains(self) -> str:
        with quiet(), self.hook_costs.time(), api.enable({self.reference: self.options}):
            trainer = self.build("first", save_strategy="steps")
            self.first_round = _keep_first_round(trainer)
            trainer.train()
        self.first = trainer
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        expected = 2 * self.round_steps
        assert len(losses) == expected, f"expected {expected} logged steps, got {len(losses)}"
        assert all(loss == loss for loss in losses), f"the loss is not a number: {losses}"
        return f"losses {', '.join(f'{loss:.4g}' for loss in losses)}"

    def learns(self) -> str:
        norms = [entry["grad_norm"] for entry in self.first.state.log_history if "grad_norm" in entry]
        if not any(norms):
            spread = [entry["reward_std"] for entry in self.first.state.log_history if "reward_std" in entry]
            reason = "" if any(spread) else " The rewards of every group are equal, so every advantage is 0."
            raise AssertionError(
                f"no gradient reached the model in {len(norms)} steps, so nothing was shown.{reason} Give rewards and "
                f"rows with which the method acts (--rewards, --rows), or options with which it begins at once (--set)."
            )
        environments = {"environment_factory", "rollout_func"} & set(self.settings.get("trainer", {}))
        if "turns" in self.spec.cls.needs and not environments:
            raise AssertionError(
                "it needs `turns`, and without an environment there are none, so nothing was shown. Pass one: "
                "conformance(..., trainer={'environment_factory': MyEnvironment})."
            )
        return f"gradient norms {', '.join(f'{norm:.3g}' for norm in norms)}"

    def differs(self) -> str:
        stock, first_round = self.stock()
        changed = []
        difference = _largest_difference(stock, self.first)
        if difference:
            changed.append(f"weights by up to {difference:.2g}")
        if first_round != self.first_round:
            changed.append("completions")
        before, after = metrics_of(stock), metrics_of(self.first)
        new = sorted({name for entry in after for name in entry} - {name for entry in before for name in entry})
        changed.extend([f"{len(new)} metrics that TRL has not"] if new else [])
        acting = sorted(set(self.spec.hooks) - WITHOUT_INFLUENCE)
        assert changed and (difference or not acting), (
            f"after {2 * self.round_steps} steps the weights are those of plain TRL, to the last bit, although it has "
            f"{', '.join(map(repr, acting or self.spec.hooks))}. Give rewards and rows with which the method acts "
            f"(--rewards, --rows), or options with which it does (--set)."
        )
        return ", ".join(changed)

    def repeats(self) -> str:
        with self.hook_costs.memory():
            again = self.train("second")
        _same_metrics(self.first, again)
        _same_weights(self.first, again)
        return "metrics and weights are equal"

    def samples_like_stock(self) -> str:
        _, stock = self.stock()
        assert stock == self.first_round, (
            "the first round has other completions than plain TRL, so something drew random numbers before it. Draw "
            "them from a generator of your own."
        )
        return "the first round has the completions of plain TRL"

    def resumes(self) -> str:
        checkpoint = os.path.join(self.first.args.output_dir, f"checkpoint-{self.round_steps}")
        resumed = self.train("resumed", resume=checkpoint, save_strategy="steps")
        _same_weights(self.first, resumed)
        return "weights are equal"

    def records(self) -> str:
        with quiet(), api.enable({self.reference: self.options}) as handle:
            handle.record()
            trainer = self.build("recorded")
            trainer.train()
        _same_weights(self.first, trainer)
        rows = read(find(trainer.args.output_dir)[0]).rows
        return f"{sum(len(row.spans) for row in rows)} spans, {sum(len(row.curves) for row in rows)} curves"

    def restores(self) -> str:
        assert type(self.first).__mro__[0].__module__.startswith("trl."), f"the class is {type(self.first)}"
        assert "_trl_ext" not in vars(self.first), "the trainer still holds its plugins"
        return type(self.first).__name__

    def distributes(self, processes: int) -> str:
        with quiet():
            return distributed.compare(
                processes, self.kind, self.model, self.folder, {self.reference: self.options}, self.settings
            )

    def costs(self) -> str:
        return self.hook_costs.summary()


def _keep_first_round(trainer: Any) -> list[Any]:
    """Returns a list that will hold what the first round of a trainer generated."""
    from transformers import TrainerCallback

    kept: list[Any] = []

    class KeepFirstRound(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kept.extend(row["completion"] for row in trainer_state.logged_round(trainer))

    trainer.add_callback(KeepFirstRound())
    return kept


def _same_metrics(left: Any, right: Any) -> None:
    for first, second in zip(metrics_of(left), metrics_of(right), strict=True):
        for name, value in first.items():
            same = value == second.get(name) or (value != value and second.get(name) != second.get(name))
            assert same, f"{name} is {value} and then {second.get(name)} in the same run"


def _largest_difference(left: Any, right: Any) -> float:
    """Returns the largest difference between two models' weights. Other parameters count as infinitely different."""
    ours, theirs = dict(left.model.named_parameters()), dict(right.model.named_parameters())
    if ours.keys() != theirs.keys():
        return float("inf")
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def _same_weights(left: Any, right: Any) -> None:
    import torch

    for (name, ours), theirs in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        difference = (ours - theirs).abs().max().item()
        assert torch.equal(ours, theirs), f"{name} differs by up to {difference:.2g}; is state missing?"
