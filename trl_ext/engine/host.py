"""One trainer with its plugins: instances, calls in order, counters, metrics and state."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from trl_ext_hooks import Pairs, Plugin, Refuse, Rollout, Scored, TrainerKind, TrainerView, Turns
from trl_ext_hooks.types import Role

from ..catalog.declaration import build_manager
from ..errors import ConfigError, PluginError
from ..plan.compose import Plan
from ..plan.stages import ELSEWHERE, NO_STAGE, SERVED
from ..trl_internals import forwards as trl_forwards
from ..trl_internals import frozen_models, reference_policy, rewards, trainer_state
from ..trl_internals import losses as trl_losses
from ..trl_internals.seams import overrides
from .stages import pairs, precompute

if TYPE_CHECKING:
    from ..inspection.recorder import Recorder, RoundRecord
    from .stages.turns import Poll

STATE_FILE = "trl_ext_state.pt"


class View:
    """The `TrainerView` of a TRL trainer."""

    def __init__(self, trainer: Any, kind: TrainerKind) -> None:
        self._trainer = trainer
        self._kind: TrainerKind = kind
        self.callbacks: list[Any] = []

    @property
    def kind(self) -> TrainerKind:
        return self._kind

    @property
    def args(self) -> Any:
        return self._trainer.args

    @property
    def model(self) -> Any:
        return self._trainer.model_wrapped if self._trainer.model_wrapped is not None else self._trainer.model

    @property
    def unwrapped_model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def processing_class(self) -> Any:
        return self._trainer.processing_class

    def render(self, prompt: Any) -> str:
        return trainer_state.prompt_text(self._trainer, prompt)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self._trainer.accelerator.device)

    @property
    def num_processes(self) -> int:
        return int(self._trainer.accelerator.num_processes)

    @property
    def process_index(self) -> int:
        return int(self._trainer.accelerator.process_index)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._trainer.accelerator.gather(tensor))

    def gather_objects(self, values: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        return cast(list[Any], gather_object(values))

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._trainer.accelerator.reduce(tensor, reduction="sum"))

    def add_callback(self, callback: Any) -> None:
        self._trainer.add_callback(callback)
        self.callbacks.append(callback)

    def frozen_model(self, path: str) -> Any:
        return frozen_models.load(self._trainer, path)

    def score_pairs(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        return frozen_models.score(self._trainer, model, batch)

    def precompute_pairs(self, name: str, score: Callable[[Pairs], torch.Tensor], key: str) -> None:
        session = self._trainer._trl_ext
        precompute.add_columns(session, name, score, key)


@dataclasses.dataclass
class RoundState:
    """What the stages of one round hand on to each other."""

    columns: rewards.RewardColumns
    tool_mask: list[list[int]] | None = None
    polls: list[list[Poll]] | None = None  # of the environments, while a generation runs
    turns: Turns | None = None
    hidden: dict[str, torch.Tensor] | None = None
    logps: dict[Role, torch.Tensor] = dataclasses.field(default_factory=dict)
    rollout: Rollout | None = None
    scored: Scored | None = None
    record: RoundRecord | None = None


class Session:
    """The plugins of one trainer, made fresh for it."""

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self.trainer = trainer
        self.plan = plan
        self.kind = plan.kind
        self.view: TrainerView = View(trainer, plan.kind)
        self.plugins: dict[str, Plugin] = {spec.name: spec.cls(spec.options) for spec in plan.specs}
        manager = build_manager(list(self.plugins.values()))
        self._callers: dict[str, list[tuple[str, Any]]] = {}
        for hook in SERVED[self.kind]:
            self._callers[hook] = [
                (name, manager.subset_hook_caller(hook, [p for p in self.plugins.values() if p is not plugin]))
                for name, plugin in self.plugins.items()
                if name in plan.users(hook)
            ]
        self.undo: list[Callable[[], None]] = []
        self.calls: Counter[tuple[str, str]] = Counter()
        self.round: RoundState | None = None
        self.recorder: Recorder | None = None
        self.in_loss = False
        self.policy_logps: Any = None
        self.policy_mask: torch.Tensor | None = None
        self.policy_hidden: dict[str, torch.Tensor] = {}
        self.reference: Any = None  # a frozen copy of the policy, where a plugin needs one and TRL has none
        self.keeps_groups = bool({"whole_groups", "grouped_order"} & set(plan.needs))
        self.wants_loss = self.has("policy_loss", "loss_terms", "loss_metrics")
        self.columns: list[str] = plan.columns() if self.has(*pairs.HOOKS) else []
        wanted = {"old_logps", "ref_logps"} & set(plan.needs)
        self.watches_logps = self.wants_loss or self.has("logps", "hidden_positions") or bool(wanted)
        self._verified = False
        self._check_trainer()

    # --- calling plugins ---

    def has(self, *hooks: str) -> bool:
        return any(self._callers.get(hook) for hook in hooks)

    def call(self, name: str, hook: str, caller: Any, **arguments: Any) -> Any:
        """Runs one plugin's hook; what it raises gets a note with the names of both and keeps its type."""
        self.calls[name, hook] += 1
        try:
            results = caller(**arguments)
        except Exception as error:
            error.add_note(f"raised in the hook {hook!r} of the trl_ext plugin {name!r}")
            raise
        return results[0] if results else None

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of every plugin with the hook, in order, where the result is not None."""
        for name, caller in self._callers.get(hook, ()):
            result = self.call(name, hook, caller, **arguments)
            if result is not None:
                yield name, result

    def chain(self, hook: str) -> list[tuple[str, Any]]:
        """(plugin, caller) in order, for stages in which each plugin sees the result of the one before."""
        return self._callers.get(hook, [])

    def mapping(self, name: str, hook: str, result: Any) -> Mapping[str, Any]:
        if not isinstance(result, Mapping):
            raise PluginError(f"plugin {name!r} returned {type(result).__name__} from {hook!r}, expected a mapping.")
        return result

    def owned(self, name: str, hook: str, field: str) -> None:
        if field not in self.plugins[name].fields:
            declared = ", ".join(self.plugins[name].fields) or "none"
            raise PluginError(
                f"plugin {name!r} returned {field!r} from {hook!r} without declaring it; declared `fields`: {declared}."
            )

    # --- rounds and metrics ---

    def begin_round(self, columns: rewards.RewardColumns) -> None:
        self.round = RoundState(columns)
        if self.recorder is not None:
            self.round.record = self.recorder.begin()

    def current(self) -> RoundState:
        assert self.round is not None, "a stage ran outside a round"
        return self.round

    @property
    def recording(self) -> bool:
        """Whether the current round is recorded; the same on every process."""
        return self.round is not None and self.round.record is not None

    def seen(self, by: str, state: Scored) -> None:
        """Shows the recorder, if the round is recorded, the rewards or advantages as `by` left them."""
        if self.round is not None and self.round.record is not None:
            self.round.record.after(by, state)

    def report(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Adds (sum, count) pairs over processes and records each ratio. Collective; names may differ by process."""
        total: dict[str, list[float]] = {}
        for local in self.view.gather_objects([dict(values)]):
            for name, (amount, count) in local.items():
                entry = total.setdefault(name, [0.0, 0.0])
                entry[0] += float(amount)
                entry[1] += float(count)
        for name in sorted(total):
            amount, count = total[name]
            if count:
                trainer_state.add_metric(self.trainer, name, amount / count)

    def collect(self, hook: str, **arguments: Any) -> dict[str, tuple[float, float]]:
        """Metrics of all plugins under `<plugin>/<name>`."""
        found: dict[str, tuple[float, float]] = {}
        for name, result in self.each(hook, **arguments):
            for key, value in self.mapping(name, hook, result).items():
                if not (isinstance(value, tuple | list) and len(value) == 2):
                    raise PluginError(f"plugin {name!r} reported {key!r} as {value!r}, expected a pair (sum, count).")
                found[f"{name}/{key}"] = (float(value[0]), float(value[1]))
        return found

    # --- life ---

    def setup(self) -> None:
        """Provides what plugins need and prepares them.

        Raises:
            ConfigError: With what they refuse now that the trainer is there.
        """
        refusals: list[str] = []
        if self.has(*pairs.HOOKS):
            plain = self.trainer.data_collator
            trainer_state.set_collator(self.trainer, pairs.Collator(plain, self.columns))
            self.undo.append(lambda: trainer_state.set_collator(self.trainer, plain))
        with untouched_random_state():
            if "ref_logps" in self.plan.needs and not reference_policy.known(self.trainer):
                self.reference = reference_policy.load(self.trainer, self.plan.needs["ref_logps"][0])
            if self.has("optimizer_step"):
                self.view.add_callback(trainer_state.optimizer_callback(self._stepped))
            for name, found in self.each("setup", trainer=self.view):
                for refusal in found:
                    if not isinstance(refusal, Refuse):
                        raise PluginError(f"plugin {name!r}: `setup` returned {refusal!r}, expected `Refuse`s or None.")
                    refusals.append(f"  - {name}: {refusal.what} {refusal.fix}")
        if refusals:
            raise ConfigError("this run cannot work:\n" + "\n".join(refusals))

    def _stepped(self) -> None:
        for name, caller in self.chain("optimizer_step"):
            self.call(name, "optimizer_step", caller, trainer=self.view)

    def teardown(self) -> None:
        with contextlib.ExitStack() as stack:  # runs everything, whatever one of them raises
            if self.reference is not None:
                stack.callback(reference_policy.unload, self.trainer, self.reference)
                self.reference = None
            for undo in self.undo:
                stack.callback(undo)
            for callback in cast(View, self.view).callbacks:
                stack.callback(self.trainer.remove_callback, callback)
            for name, caller in reversed(self.chain("teardown")):
                stack.callback(self.call, name, "teardown", caller, trainer=self.view)

    def _check_trainer(self) -> None:
        """Checks that need the built trainer."""
        users = {*(hook for spec in self.plan.specs for hook in spec.hooks), *self.plan.needs}
        replaced = overrides(type(self.trainer), self.kind, users)
        if replaced:
            losses = [name for name in replaced if name.endswith("._compute_loss")]
            if self.has("policy_loss") and losses:
                owner = self.plan.users("policy_loss")[0]
                raise ConfigError(f"plugin {owner!r} replaces the policy loss, and so does {losses[0]}. Leave one out.")
            warnings.warn(
                f"{', '.join(replaced)} replaces TRL's method without calling it; plugins act on its results.",
                stacklevel=3,
            )
        forwards = self.plan.users("logps", "pair_logps", "pair_metrics") if self.kind == "dpo" else []
        if forwards and trl_forwards.uses_virtual_tokens(self.trainer):
            raise ConfigError(
                f"plugin {forwards[0]!r} needs the token ids in the forward, and this PEFT adapter replaces them by "
                f"learned prompt tokens. Use another kind of adapter, such as LoRA."
            )
        term = trl_losses.adds_to_loss(self.trainer)
        scaled = self.has("keep_rows") and trl_losses.loss_unit(self.trainer, self.kind) != "tokens"
        if term and scaled and not self.has("policy_loss"):
            raise ConfigError(
                f"plugin {self.plan.users('keep_rows')[0]!r} leaves rows out, for which this loss is scaled, and "
                f"{term} would be scaled with it. Switch that off, or set loss_type='dapo', which needs no scale."
            )

    def verify_fired(self) -> None:
        """After the first training step: every hook of every plugin must have run.

        Raises:
            PluginError: Naming those that did not.
        """
        if self._verified:
            return
        silent = [
            f"{name}.{hook}"
            for hook, callers in self._callers.items()
            if hook not in (*NO_STAGE, *ELSEWHERE)
            for name, _ in callers
            if not self.calls[name, hook]
        ]
        if silent:
            raise PluginError(
                f"the first training step ended and these hooks never ran: {', '.join(silent)}. "
                f"{type(self.trainer).__name__} does not pass through the methods that call them, so training would go "
                f"on without the method. A subclass that overrides TRL's private methods must call super()."
            )
        self._verified = True

    # --- state ---

    def save_state(self, trial: Any) -> None:
        if not self.trainer.args.should_save:
            return
        plugins = {
            spec.name: {"version": spec.version, "options": spec.option_values, "state": None}
            for spec in self.plan.specs
        }
        for name, state in self.each("state_dict"):
            plugins[name]["state"] = dict(self.mapping(name, "state_dict", state))
        torch.save({"plugins": plugins}, os.path.join(trainer_state.checkpoint_folder(self.trainer, trial), STATE_FILE))

    def load_state(self, checkpoint: str | None) -> None:
        """Gives every plugin its state back; says so where a checkpoint lacks it or was made with other settings."""
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        saved = torch.load(path, weights_only=True, map_location="cpu")["plugins"] if os.path.isfile(path) else {}
        for spec in self.plan.specs:
            entry = saved.get(spec.name)
            if entry is None:
                warnings.warn(
                    f"{checkpoint} was saved without plugin {spec.name!r}, which now starts fresh.", stacklevel=2
                )
            elif entry["options"] != spec.option_values:
                warnings.warn(
                    f"plugin {spec.name!r} continues {checkpoint} with other options: {spec.option_values} instead of "
                    f"{entry['options']}.",
                    stacklevel=2,
                )
        for name in saved.keys() - self.plugins.keys():
            warnings.warn(f"{checkpoint} was saved with plugin {name!r}, which is not enabled now.", stacklevel=2)
        for name, caller in self.chain("load_state_dict"):
            if saved.get(name, {}).get("state") is not None:
                self.call(name, "load_state_dict", caller, state=saved[name]["state"])


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores every random generator that training uses after the block."""
    import numpy

    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
