# mypy: disable-error-code="empty-body"
"""Before and around training: what `configure` receives and returns, and the hooks of a plugin's life."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .basics import TrainerKind
from .plugin import hookspec

if TYPE_CHECKING:
    from .trainer import TrainerView


@dataclass(frozen=True)
class Config:
    """A trainer about to be built. `args` is a copy: editing it changes nothing.

    Attributes:
        kind: Which trainer.
        args: The training arguments (`GRPOConfig`, `RLOOConfig` or `DPOConfig`).
        reward_names: Names of the reward functions, none for DPO; None where an environment owns some of them, which
            is known once the trainer is built (`configure` then runs again).
        columns: Columns of the training data, or None where they cannot be known before it is read.
        plugins: Names of all plugins of the run, in the order in which they act.
        tool_sources: What lets rollouts call tools: those of `tools`, `environment_factory` and `rollout_func` that
            the trainer is given.
    """

    kind: TrainerKind
    args: Any
    reward_names: tuple[str, ...] | None
    columns: tuple[str, ...] | None
    plugins: tuple[str, ...]
    tool_sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Require:
    """The setting must have one of the `allowed` values; anything else is refused with `why`."""

    setting: str
    allowed: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Recommend:
    """The setting works best with `value`; another one is reported once, with the `source` of the advice."""

    setting: str
    value: Any
    source: str


@dataclass(frozen=True)
class Need:
    """A need that depends on the options, in addition to the plugin's declared `needs`."""

    name: str


@dataclass(frozen=True)
class Refuse:
    """The run cannot work: `what` is wrong, and how to `fix` it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Warn:
    """The run works, but not as the user may expect."""

    message: str


Requirement = Require | Recommend | Need | Refuse | Warn


@hookspec
def configure(config: Config) -> Iterable[Requirement] | None:
    """Checks the run before the trainer is built and the model is loaded.

    Runs on every process. All plugins' answers are collected; refusals are reported together in one error. Nothing can
    be changed here: a plugin requires a value, and the user sets it.

    ```python
    class NoGroupScaling(Plugin):
        name = "no-group-scaling"
        trainers = ("grpo",)

        @hookimpl
        def configure(self, config):
            yield Require("scale_rewards", ("none",), why="the method divides by nothing")
            if config.args.num_generations < 4:
                yield Warn("fewer than 4 completions per prompt make the group mean noisy")
    ```
    """


@hookspec
def trainer_arguments() -> Mapping[str, Any] | None:
    """Gives the trainer what its caller left out: `tools`, `environment_factory` or `rollout_func`. GRPO.

    Runs on every process before `configure`, for trainers that are built with the plugin (`enable`, `extend`, the
    command line). Two givers of one argument are refused, the caller being one of them. What a trainer was built with
    stays when the plugin is switched off.

    ```python
    class Multiplication(Plugin):
        name = "multiplication"
        trainers = ("grpo",)

        @hookimpl
        def trainer_arguments(self):
            def multiply(a: int, b: int) -> int:
                \"\"\"Multiplies two numbers.

                Args:
                    a: The first number.
                    b: The second number.
                \"\"\"
                return a * b

            return {"tools": [multiply]}
    ```
    """


@hookspec
def setup(trainer: TrainerView) -> Iterable[Refuse] | None:
    """Prepares what needs the built trainer. The random state is restored afterwards.

    Runs once on every process, after construction and before the first step. What can be checked only now, such as the
    tokenizer, is refused by returning `Refuse`s as in `configure`.

    ```python
    class CountParameters(Plugin):
        name = "count-parameters"
        trainers = ("grpo", "rloo", "dpo")

        @hookimpl
        def setup(self, trainer):
            self.size = sum(p.numel() for p in trainer.unwrapped_model.parameters() if p.requires_grad)
    ```
    """


@hookspec
def teardown(trainer: TrainerView) -> None:
    """Releases what `setup` took. Runs when the plugin is switched off.

    ```python
    class Trace(Plugin):
        name = "trace"
        trainers = ("grpo",)

        @hookimpl
        def setup(self, trainer):
            self.handle = trainer.unwrapped_model.register_forward_hook(lambda module, inputs, output: None)

        @hookimpl
        def teardown(self):
            self.handle.remove()
    ```
    """


@hookspec
def state_dict() -> Mapping[str, Any] | None:
    """Returns what must survive a restart: tensors, numbers, strings, lists and dicts of them.

    Called for every checkpoint on the main process, so the state must be the same on every process. Attributes that are
    plain values need neither this hook nor `load_state_dict`: name them in `Plugin.state`.

    ```python
    class Counter(Plugin):
        name = "counter"
        trainers = ("grpo",)
        rounds = 0

        @hookimpl
        def round_metrics(self, round):
            self.rounds += round.mode == "train"
            return {"rounds": (self.rounds, 1)}

        @hookimpl
        def state_dict(self):
            return {"rounds": self.rounds}

        @hookimpl
        def load_state_dict(self, state):
            self.rounds = state["rounds"]
    ```
    """


@hookspec
def load_state_dict(state: Mapping[str, Any]) -> None:
    """Takes back what `state_dict` returned. Runs on every process when training resumes, before the first step.

    See `state_dict` for an example; a plugin implements both or neither.
    """
