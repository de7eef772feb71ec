# mypy: disable-error-code="empty-body"
"""Life of a plugin: what `configure` receives and returns, and the hooks before, around and after training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .basics import TrainerKind
from .plugin import hookspec

if TYPE_CHECKING:
    from .trainer import TrainerView


@dataclass(frozen=True)
class Config:
    """Describes a trainer that is about to be built. `args` is a copy, so editing it changes nothing.

    Attributes:
        kind: Which trainer.
        args: The training arguments (`GRPOConfig`, `RLOOConfig` or `DPOConfig`).
        reward_names: Names of the reward columns of a round, as the hooks `reward_columns` of all plugins leave those
            of the reward functions. DPO has none. None where an environment adds some that are known only once the
            trainer is built. `configure` then runs again.
        columns: Columns of the training data. None where they are unknown before the data is read.
        plugins: Names of all plugins of the run, in the order in which the user named them.
        tool_sources: What lets rollouts call tools: those of `tools`, `environment_factory` and `rollout_func` that
            the trainer receives.
        estimators: Names of the plugins that claim `estimator`, in the same order.
        fields: Names of the values per row that plugins of the run may add (`Plugin.fields`), in the same order.
        data: The training data. None where their rows cannot be read before training, as in a stream.
        rewriters: Names of the plugins that rewrite rewards (hook `rewards`), in the same order.
    """

    kind: TrainerKind
    args: Any
    reward_names: tuple[str, ...] | None
    columns: tuple[str, ...] | None
    plugins: tuple[str, ...]
    tool_sources: tuple[str, ...] = ()
    rewriters: tuple[str, ...] = ()
    estimators: tuple[str, ...] = field(default=(), kw_only=True)
    fields: tuple[str, ...] = field(default=(), kw_only=True)
    data: Any = field(default=None, kw_only=True, repr=False, compare=False)

    def first_rows(self, *columns: str, count: int = 1000) -> list[dict[str, Any]]:
        """Returns the first rows of the training data, for checks of what they hold.

        They are read as they are stored, so that no image is decoded. Where rows cannot be read before training, there
        are none.

        Args:
            columns: The columns to read. Those that the data lack are left out.
            count: Rows at most.
        """
        known = [name for name in columns if name in (self.columns or ())]
        if self.data is None or not known:
            return []
        rows: list[dict[str, Any]] = self.data.select_columns(known).with_format("arrow")[:count].to_pylist()
        return rows


@dataclass(frozen=True)
class Require:
    """Requires that a setting has one of the `allowed` values. Any other value is refused, and `why` is the reason."""

    setting: str
    allowed: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Recommend:
    """Recommends a `value` for a setting. Another value is reported once, with the `source` of the advice."""

    setting: str
    value: Any
    source: str


@dataclass(frozen=True)
class Need:
    """Adds a need that depends on the options to those that the plugin declares in `needs`."""

    name: str


@dataclass(frozen=True)
class Refuse:
    """Refuses the run: says `what` is wrong and how to `fix` it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Warn:
    """Warns that the run works, but not as the user may expect."""

    message: str


Requirement = Require | Recommend | Need | Refuse | Warn
"""An answer of `configure`."""


@hookspec
def configure(config: Config) -> Iterable[Requirement] | None:
    """Checks the run before the trainer is built and the model is loaded.

    Runs on every process. The core collects the answers of all plugins and reports all refusals in one error. Nothing
    can be changed here: a plugin requires a value, and the user sets it. None asks for nothing.

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
    """Supplies constructor arguments that the caller left out: `tools`, `environment_factory` or `rollout_func`.

    Runs on every process, before `configure`. GRPO only, and only for trainers that are built with the plugin
    (`enable`, `extend` or the command line). Two sources of one argument are refused, whether plugins or the caller.
    The trainer keeps the arguments when the plugin is switched off. None supplies nothing.

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
    """Prepares what needs the built trainer.

    Runs once on every process, after construction and before the first step. The random state is restored afterwards.
    Returns `Refuse`s for what can be checked only now, such as the tokenizer. None refuses nothing. All trainers.

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
    """Releases what `setup` took.

    Runs on every process when the plugin is switched off, in reverse order of the plugins. All trainers.

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

    Runs for every checkpoint, on the main process, so the state must be the same on every process. None saves nothing.
    A run that saves checkpoints also calls it after `setup` and after its first step, to see that the state can be
    read back, so the hook must change nothing. Plain attributes need neither this hook nor `load_state_dict`: name
    them in `Plugin.state`. All trainers.

    ```python
    from trl_ext_hooks.toolkit.prompt_memory import PromptMemory


    class ShortestAnswers(Plugin):
        name = "shortest-answers"
        trainers = ("grpo",)

        def start(self):
            self.shortest = PromptMemory(merge=min)  # no plain value, so `state` cannot name it

        @hookimpl
        def advantages(self, round):
            keys = self.shortest.keys(round)
            self.shortest.update(round, keys, round.lengths)
            round.log("shortest", self.shortest.recall(keys[round.local]))

        @hookimpl
        def state_dict(self):
            return self.shortest.state_dict()

        @hookimpl
        def load_state_dict(self, state):
            self.shortest.load_state_dict(state)
    ```
    """


@hookspec
def load_state_dict(state: Mapping[str, Any]) -> None:
    """Restores what `state_dict` returned.

    Runs on every process when training resumes, before the first step. `state_dict` has an example. A plugin
    implements both hooks or neither. All trainers.
    """
