"""A recipe: TRL settings, the block `plugins:`, and the block `experiment:` that says what is compared with what.

`recipes/README.md` documents every key. Reading needs neither torch nor TRL; what only they can judge is checked in
`preparing`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from trl_ext_hooks import TrainerKind

from ..catalog import declaration, find
from ..errors import ConfigError, OptionError
from ..train import command_line
from .blocks import choice, count, mapping, number, typed
from .measures import KINDS, Measure
from .stats import Direction

Claim = Literal["better", "not worse", "identical"]

EXPERIMENT = (
    "claim",
    "paper",
    "task",
    "trainer",
    "train_size",
    "test_size",
    "arms",
    "seeds",
    "metrics",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_FIXED = {
    "push_to_hub": "runs of a comparison are not published",
    "resume_from_checkpoint": "a comparison repeats unfinished runs from their beginning",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of the comparison: a plugin set and settings that differ from the recipe's."""

    name: str
    plugins: dict[str, dict[str, Any]]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What a metric should show: `arm` is `claim` against another arm.

    Attributes:
        by: For `better`: the least relative change of the mean; its whole interval must reach it.
        apart: For `better`: the intervals of the two arms must not overlap either.
        within: For `not worse`: the largest loss that counts as none. For `identical`: the largest difference.
    """

    arm: str
    against: str
    claim: Claim
    by: float | None = None
    apart: bool = False
    within: float | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A logged metric, how its curve becomes a number, and what is expected of the arms."""

    name: str
    measure: Measure
    better: Direction
    expect: tuple[Expectation, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}: {self.measure}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. The first arm is the one that the others are compared with."""

    name: str
    path: str
    settings: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    task: str | None = None
    trainer: TrainerKind | None = None
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    claim: str = ""
    paper: str = ""

    def with_seeds(self, wanted: int | None) -> Recipe:
        """The same with the first `wanted` seeds; numbered seeds go on beyond those of the recipe."""
        seeds = self.seeds[:wanted]
        if wanted is not None and wanted > len(seeds):
            if seeds != tuple(range(1, len(seeds) + 1)):
                raise ConfigError(f"--seeds {wanted}: the recipe lists {len(seeds)} seeds.")
            seeds = tuple(range(1, wanted + 1))
        return dataclasses.replace(self, seeds=seeds)


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


def read(path: str) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        ConfigError, OptionError: Naming the file, the key, what it holds and what is expected.
    """
    try:
        settings = command_line.read_config(path)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("--config ")) from error
    plugins, block = (settings.pop(name, None) for name in command_line.BLOCKS)
    for name, why in _FIXED.items():
        if settings.get(name):
            raise ConfigError(f"{path}: leave out `{name}`: {why}.")
    try:
        found = mapping({} if block is None else block, "experiment", EXPERIMENT)
        arms = _arms(found.get("arms"), find.merge([], plugins, {}))
        return Recipe(
            name=Path(path).stem,
            path=path,
            settings=settings,
            arms=arms,
            seeds=_seeds(found.get("seeds", 5)),
            metrics=_metrics(found.get("metrics"), [arm.name for arm in arms]),
            task=typed(found.get("task"), str, "experiment.task"),
            trainer=choice(found.get("trainer"), declaration.KINDS, "experiment.trainer"),
            sizes={key: count(found[key], f"experiment.{key}") for key in ("train_size", "test_size") if key in found},
            claim=typed(found.get("claim"), str, "experiment.claim") or "",
            paper=typed(found.get("paper"), str, "experiment.paper") or "",
        )
    except (ConfigError, OptionError) as error:
        raise type(error)(f"{path}: {error}") from error


def _arms(block: Any, plugins: dict[str, dict[str, Any]]) -> tuple[Arm, ...]:
    if block is None:
        if not plugins:
            raise ConfigError(
                "there is nothing to compare: the file has neither plugins (`plugins: {gdpo: {}}`) nor arms "
                "(`experiment: {arms: {...}}`)."
            )
        block = {"plain": None, "+".join(map(_short, plugins)): {"plugins": list(plugins)}}
    arms = []
    for name, content in mapping(block, "experiment.arms").items():
        where = f"experiment.arms.{name}"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: a name of letters, digits and _ . + - is needed, as files are called by it.")
        found = mapping({} if content is None else content, where, ("plugins", "settings"))
        settings = mapping(found.get("settings") or {}, f"{where}.settings")
        arms.append(Arm(name, _plugins_of_arm(found.get("plugins"), plugins, where), settings))
    if len(arms) < 2:
        raise ConfigError(f"experiment.arms: a comparison needs two arms, got {', '.join(a.name for a in arms) or 0}.")
    return tuple(arms)


def _plugins_of_arm(value: Any, shared: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The plugins that an arm names, with the options of the block `plugins:` unless it gives others."""
    if isinstance(value, str):
        raise ConfigError(f"{where}.plugins: expected a list or a mapping of plugins, got {value!r}; write [{value}].")
    if isinstance(value, Sequence):
        value = dict.fromkeys(map(str, value))
    own = find.merge([], mapping(value or {}, f"{where}.plugins"), {})
    return {reference: {**shared.get(reference, {}), **options} for reference, options in own.items()}


def _short(reference: str) -> str:
    """`path/my_method.py` -> `my_method`, `package.module:MyMethod` -> `MyMethod`."""
    return reference.rpartition(":")[2].removesuffix(".py").rpartition("/")[2]


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ConfigError(f"experiment.seeds: expected a number of seeds or a list of them, got {value}.")
        return tuple(range(1, value + 1))
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ConfigError(f"experiment.seeds: expected a number of seeds or a list of them, got {value!r}.")
    if len(set(value)) < len(value):
        raise ConfigError(f"experiment.seeds: a seed is listed twice, which would count one run as two: {value}.")
    return tuple(value)


def _metrics(block: Any, arms: list[str]) -> tuple[Metric, ...]:
    if block is None:
        return ()
    if isinstance(block, Mapping):
        block = [block]
    if not isinstance(block, list) or not block:
        raise ConfigError(f"experiment.metrics: expected a list such as [{{name: reward}}], got {block!r}.")
    found = tuple(_metric(entry, f"experiment.metrics[{index}]", arms) for index, entry in enumerate(block))
    labels = [metric.label for metric in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"experiment.metrics: {label!r} is listed twice; put its expectations into one entry.")
    return found


def _metric(block: Any, where: str, arms: list[str]) -> Metric:
    found = mapping(block, where, ("name", "reduce", "better", "expect"))
    if "name" not in found:
        raise ConfigError(f"{where}: `name` is missing, the logged metric such as rewards/format/mean.")
    measure = _measure(found.get("reduce", "final"), f"{where}.reduce", arms)
    better = choice(found.get("better"), get_args(Direction), f"{where}.better")
    expect = found.get("expect") or []
    expect = [expect] if isinstance(expect, Mapping) else typed(expect, list, f"{where}.expect")
    return Metric(
        name=typed(found["name"], str, f"{where}.name"),
        measure=measure,
        better=better or ("lower" if measure.counts_steps else "higher"),
        expect=tuple(_expectation(entry, f"{where}.expect", arms) for entry in expect),
    )


def _measure(block: Any, where: str, arms: Sequence[str]) -> Measure:
    if isinstance(block, str):
        kind = choice(block, KINDS, where)
        if kind in ("steps_to", "steps_down_to"):
            raise ConfigError(f"{where}: {kind} needs a level, as in {{{kind}: 0.9}}.")
        return Measure(kind)
    found = mapping(block, where, (*KINDS, "window"))
    kinds = [key for key in found if key != "window"]
    if len(kinds) != 1:
        raise ConfigError(f"{where}: expected one of {', '.join(KINDS)}, got {block!r}.")
    kind, value = choice(kinds[0], KINDS, where), found[kinds[0]]
    window = count(found["window"], f"{where}.window") if "window" in found else None
    if kind in ("steps_to", "steps_down_to"):
        if value in arms:
            return Measure(kind, None, window, value)
        return Measure(kind, number(value, f"{where}.{kind}", "a number or the name of an arm"), window)
    if kind == "final" and value is not None and window is None:
        return Measure(kind, None, count(value, f"{where}.final"))
    raise ConfigError(f"{where}: {kind} takes no value and no window; write `reduce: {kind}`.")


def _expectation(block: Any, where: str, arms: list[str]) -> Expectation:
    found = mapping(block, where, ("arm", "is", "against", "by", "apart", "within"))
    for key in ("arm", "is", "against"):
        if key not in found:
            raise ConfigError(f"{where}: `{key}` is missing, as in {{arm: gdpo, is: better, against: plain}}.")
    claim = choice(found["is"], get_args(Claim), f"{where}.is")
    fits = {"better": ("by", "apart"), "not worse": ("within",), "identical": ("within",)}[claim]
    for key in ("by", "apart", "within"):
        if key in found and key not in fits:
            raise ConfigError(f"{where}.{key} does not go with `is: {claim}`, which takes {' and '.join(fits)}.")
    if claim == "not worse" and "within" not in found:
        raise ConfigError(f"{where}: `is: not worse` needs a margin, as in `within: 0.02`.")
    by = number(found["by"], f"{where}.by") if "by" in found else None
    if by is not None and by <= 0:
        raise ConfigError(f"{where}.by: expected a share of change such as 0.5 for half, got {by:g}.")
    arm, against = (choice(found[key], arms, f"{where}.{key}") for key in ("arm", "against"))
    if arm == against:
        raise ConfigError(f"{where}: {arm!r} is compared with itself.")
    within = number(found["within"], f"{where}.within") if "within" in found else None
    if within is not None and within < 0:
        raise ConfigError(f"{where}.within: expected a number of at least 0, got {within:g}.")
    return Expectation(arm, against, claim, by, bool(typed(found.get("apart", False), bool, f"{where}.apart")), within)
