"""A recipe: TRL settings, the block `plugins:`, and the block `experiment:` that says what is compared with what.

`recipes/README.md` documents every key. Reading needs neither torch nor TRL. What only they can judge is checked in
`prepare`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from trl_ext_hooks import TrainerKind

from ..catalog import find
from ..catalog import recipes as shipped
from ..errors import ConfigError, OptionError, counted, near
from ..train import command_line
from .blocks import Block, Count, Margin, Number, Seconds, explain
from .measures import KINDS, Direction, Measure

Claim = Literal["better", "not worse", "identical"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_REFUSED = {
    "push_to_hub": "runs of a comparison are not published",
    "resume_from_checkpoint": "a comparison repeats unfinished runs from their beginning",
}
"""Settings that a comparison cannot have, and why."""
_MARGINS = {"better": ("by", "apart"), "not worse": ("within",), "identical": ("within",)}
"""Claim -> the keys that go with it."""
_EXAMPLE = "as in {arm: gdpo, is: better, against: plain}"


# Validators. `info.context` holds the `file`, the shared `plugins` with their options and, once they are read, the
# names of `arms`.


def _known_arm(name: str, info: ValidationInfo) -> str:
    arms = (info.context or {}).get("arms")
    if arms is not None and name not in arms:
        raise ConfigError(f"{name!r} is none of the choices.{near(name, arms)}")
    return name


def _share(value: float) -> float:
    if value <= 0:
        raise ConfigError(f"expected a share of change such as 0.5 for half, got {value:g}.")
    return value


def _list_of_one(value: Any) -> Any:
    """Takes a single mapping for a list that holds it, and null for an empty list."""
    return [] if value is None else [value] if isinstance(value, Mapping) else value


def _mapping_or_null(value: Any) -> Any:
    return {} if value is None else value


def _some(value: Any) -> Any:
    if value == [] or not isinstance(value, list | Mapping | None):
        raise ConfigError(f"expected a list such as [{{name: reward}}], got {value!r}.")
    return value


def _read_seeds(value: Any) -> tuple[int, ...]:
    if type(value) is int and value >= 1:
        return tuple(range(1, value + 1))
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ConfigError(f"expected a number of seeds or a list of them, got {value!r}.")
    if len(set(value)) < len(value):
        raise ConfigError(f"a seed is listed twice, which would count one run as two: {value}.")
    return tuple(value)


def _read_plugins(value: Any, info: ValidationInfo) -> dict[str, dict[str, Any]]:
    """Adds the options of the block `plugins:` to those that an arm gives."""
    if isinstance(value, str):
        raise ConfigError(f"expected a list or a mapping of plugins, got {value!r}. Write [{value}].")
    if isinstance(value, Sequence):
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"expected a list or a mapping of plugins, got {value!r}.")
    shared = (info.context or {}).get("plugins", {})
    return {name: {**shared.get(name, {}), **options} for name, options in _merge(value, info.context or {}).items()}


def _merge(block: Any, context: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of plugins by reference. Python files are looked for beside the YAML file first."""
    if isinstance(block, Mapping) and "file" in context:
        block = {shipped.beside(str(name), context["file"]): options for name, options in block.items()}
    return find.merge([], block, {})


def _read_arms(value: Any, info: ValidationInfo) -> dict[str, Any]:
    """Checks the names of the arms. Without a block, plain TRL is compared with the plugins of the file."""
    if value is None:
        plugins = (info.context or {}).get("plugins", {})
        if not plugins:
            raise ConfigError(
                "there is nothing to compare: the file has neither plugins (`plugins: {gdpo: {}}`) nor arms "
                "(`experiment: {arms: {...}}`)."
            )
        value = {"plain": None, "+".join(map(_short, plugins)): {"plugins": list(plugins)}}
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a mapping, got {value!r}.")
    arms = {str(name): content for name, content in value.items()}
    for name in arms:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot name an arm: a name of letters, digits and _ . + - is needed, as files are called by "
                f"it."
            )
    if len(arms) < 2:
        raise ConfigError(f"a comparison needs two arms, got {', '.join(arms) or 0}.")
    if info.context is not None:
        info.context["arms"] = list(arms)
    return arms


def _short(reference: str) -> str:
    """Returns `my_method` for `path/my_method.py` and `MyMethod` for `package.module:MyMethod`."""
    return reference.rpartition(":")[2].removesuffix(".py").rpartition("/")[2]


def _read_level(value: Any, info: ValidationInfo) -> float | str | None:
    """Returns a number, or the name of the arm whose end is to be reached."""
    arms = (info.context or {}).get("arms", [])
    if value is None or value in arms:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"expected a number or the name of an arm, got {value!r}.{near(str(value), arms)}") from None


def _spell_out(value: Any) -> Any:
    """Turns `final` into `{final: null}`."""
    if not isinstance(value, str):
        return value
    if value not in KINDS:
        raise ConfigError(f"{value!r} is none of the choices.{near(value, KINDS)}")
    return {value: None}


ArmName = Annotated[str, AfterValidator(_known_arm)]
Level = Annotated[float | str | None, BeforeValidator(_read_level)]


class Arm(Block):
    """One side of the comparison: a plugin set with its options, and settings that differ from the recipe's."""

    plugins: Annotated[
        dict[str, dict[str, Any]],
        BeforeValidator(_read_plugins, json_schema_input_type=dict[str, dict[str, Any] | None] | list[str] | None),
    ] = Field(default_factory=dict)
    settings: Annotated[
        dict[str, Any], BeforeValidator(_mapping_or_null, json_schema_input_type=dict[str, Any] | None)
    ] = Field(default_factory=dict)


class Expectation(Block):
    """What a metric should show: `arm` is `claim` against another arm.

    Attributes:
        by: For `better`: the least relative change of the mean. Its whole interval must reach it.
        apart: For `better`: the intervals of the two arms must not overlap either.
        within: For `not worse`: the largest loss that counts as none. For `identical`: the largest difference.
        met: False where the recorded runs did not show it. The comparison then does not fail for it.
        reason: Why it was not met.
    """

    arm: ArmName = Field(description=_EXAMPLE)
    claim: Claim = Field(validation_alias="is", description=_EXAMPLE)
    against: ArmName = Field(description=_EXAMPLE)
    by: Annotated[Number, AfterValidator(_share)] | None = None
    apart: bool = False
    within: Margin | None = None
    met: bool = True
    reason: str | None = None

    @model_validator(mode="after")
    def _check_reason(self) -> Expectation:
        if not self.met and not (self.reason or "").strip():
            raise ConfigError("`met: false` needs a `reason`, as in `reason: both arms learn it before step 20`.")
        if self.met and self.reason is not None:
            raise ConfigError("`reason` goes with `met: false`. Add it, or leave out the reason.")
        return self

    @model_validator(mode="after")
    def _check_margins(self) -> Expectation:
        fitting = _MARGINS[self.claim]
        for key in ("by", "apart", "within"):
            if key in self.model_fields_set and key not in fitting:
                raise ConfigError(f"`{key}` does not go with `is: {self.claim}`, which takes {' and '.join(fitting)}.")
        if self.claim == "not worse" and self.within is None:
            raise ConfigError("`is: not worse` needs a margin, as in `within: 0.02`.")
        if self.arm == self.against:
            raise ConfigError(f"{self.arm!r} is compared with itself.")
        return self


class Reduction(Block):
    """How the curve of a run becomes a number: one kind of measure, for some with a value or a window."""

    final: Count | None = None
    mean: None = None
    max: None = None
    min: None = None
    steps_to: Level = None
    steps_down_to: Level = None
    window: Count | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> Reduction:
        kinds = [kind for kind in KINDS if kind in self.model_fields_set]
        if len(kinds) != 1:
            raise ConfigError(f"expected one of {', '.join(KINDS)}, got {' and '.join(kinds) or 'none'}.")
        (kind,) = kinds
        if not kind.startswith("steps") and self.window is not None:
            raise ConfigError(f"{kind} takes no window. It goes with steps_to and steps_down_to.")
        if kind.startswith("steps") and getattr(self, kind) is None:
            raise ConfigError(f"{kind} needs a level, as in {{{kind}: 0.9}}.")
        return self

    def measure(self) -> Measure:
        """Returns the measure that the block describes."""
        (kind,) = [kind for kind in KINDS if kind in self.model_fields_set]
        if not kind.startswith("steps"):
            return Measure(kind, window=self.final)
        goal = getattr(self, kind)
        level, arm = (None, goal) if isinstance(goal, str) else (goal, None)
        return Measure(kind, level, self.window, arm)


class Metric(Block):
    """A logged metric, how its curve becomes a number, and what is expected of the arms."""

    name: str = Field(description="the logged metric such as rewards/format/mean")
    reduce: Annotated[Reduction, BeforeValidator(_spell_out, json_schema_input_type=Reduction | str)] = Reduction(
        final=None
    )
    better: Direction = Field(default_factory=lambda values: values["reduce"].measure().good_direction)
    expect: Annotated[
        list[Expectation],
        BeforeValidator(_list_of_one, json_schema_input_type=list[Expectation] | Expectation | None),
    ] = Field(default_factory=list)

    @property
    def measure(self) -> Measure:
        """How a curve becomes a number."""
        return self.reduce.measure()

    @property
    def label(self) -> str:
        """The name under which reports show the metric."""
        return f"{self.name}: {self.measure}"


class Experiment(Block):
    """The block `experiment:`."""

    about: str | None = None
    claim: str | None = None
    paper: str | None = None
    task: str | None = None
    trainer: TrainerKind | None = None
    train_size: Count | None = None
    test_size: Count | None = None
    arms: Annotated[
        dict[str, Arm], BeforeValidator(_read_arms, json_schema_input_type=dict[str, Arm | None] | None)
    ] = Field(default=None, validate_default=True)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_read_seeds, json_schema_input_type=Count | list[int])] = Field(
        default=(1, 2, 3, 4, 5)
    )
    seconds_per_run: Seconds | None = None
    metrics: Annotated[
        list[Metric],
        BeforeValidator(_list_of_one),
        BeforeValidator(_some, json_schema_input_type=list[Metric] | Metric | None),
    ] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_labels(self) -> Experiment:
        labels = [metric.label for metric in self.metrics]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"{label!r} is listed twice in `metrics`. Put its expectations into one entry.")
        return self


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: The name of the file without its ending.
        path: The file.
        settings: What the file holds for TRL.
        arms: Name -> arm. The first arm is the one that the others are compared with.
        seeds: Of the runs and of their data.
        metrics: What is compared. Empty where the file names none.
        task: A task of the lab, or None where the settings name model and data.
        trainer: The trainer, or None for the first one that the task and all plugins serve.
        sizes: Sizes of the task's data, where the file gives them.
        about: What the runs are, in a sentence.
        claim: What should be seen, in a sentence. It titles the report only where the runs bear it out.
        paper: The headline of the paper.
        seconds_per_run: How long a run took where it was measured, the mean over arms and seeds.
    """

    name: str
    path: str
    settings: dict[str, Any]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    task: str | None = None
    trainer: TrainerKind | None = None
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    about: str = ""
    claim: str = ""
    paper: str = ""
    seconds_per_run: float | None = None

    def with_seeds(self, count: int | None) -> Recipe:
        """Returns the recipe with its first `count` seeds. Numbered seeds go on beyond those of the file."""
        seeds = self.seeds[:count]
        if count is not None and count > len(seeds):
            if seeds != tuple(range(1, len(seeds) + 1)):
                raise ConfigError(f"--seeds {count}: the recipe lists {counted(len(seeds), 'seed')}.")
            seeds = tuple(range(1, count + 1))
        return dataclasses.replace(self, seeds=seeds)


def read(reference: str) -> Recipe:
    """Reads and checks a recipe.

    Args:
        reference: A path, or the name of a recipe that comes with trl_ext.

    Raises:
        ConfigError, OptionError: Naming the file, the key, what it holds and what is expected.
    """
    path = shipped.locate(reference)
    try:
        settings = command_line.read_config(path)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("--config ")) from error
    plugins, block = (settings.pop(name, None) for name in command_line.BLOCKS)
    for name, reason in _REFUSED.items():
        if settings.get(name):
            raise ConfigError(f"{path}: leave out `{name}`: {reason}.")
    try:
        context: dict[str, Any] = {"file": path}
        context["plugins"] = _merge(plugins, context)
        experiment = Experiment.model_validate(block, context=context)
    except ValidationError as error:
        raise ConfigError(explain(error, path, "experiment")) from error
    except (ConfigError, OptionError) as error:
        raise type(error)(f"{path}: {error}") from error
    sizes = {name: size for name in command_line.SIZES if (size := getattr(experiment, name)) is not None}
    return Recipe(
        name=Path(path).stem,
        path=path,
        settings=settings,
        arms=experiment.arms,
        seeds=experiment.seeds,
        metrics=tuple(experiment.metrics),
        task=shipped.beside(experiment.task, path) if experiment.task else None,
        trainer=experiment.trainer,
        sizes=sizes,
        about=experiment.about or "",
        claim=experiment.claim or "",
        paper=experiment.paper or "",
        seconds_per_run=experiment.seconds_per_run,
    )
