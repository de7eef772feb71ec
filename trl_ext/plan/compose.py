"""Order and claims: which plugins can share a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from trl_ext_hooks import TrainerKind

from ..catalog.declaration import PluginSpec
from ..errors import ConfigError, PluginError
from .stages import LIFECYCLE, NO_STAGE, SERVED, TOOL_SOURCES


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked composition of one trainer.

    Attributes:
        kind: The trainer.
        specs: The plugins in the order in which they act.
        needs: What the core has to provide, with the plugins that ask for it.
        notes: Warnings and recommendations, ready to print.
    """

    kind: TrainerKind
    specs: tuple[PluginSpec, ...]
    needs: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def users(self, *hooks: str) -> list[str]:
        """Plugins that implement one of the hooks and are served by this trainer."""
        return [s.name for s in self.specs if any(hook in s.hooks and hook in SERVED[self.kind] for hook in hooks)]

    def columns(self) -> list[str]:
        """The columns of the data that plugins need."""
        return [need.partition(":")[2] for need in self.needs if need.startswith("column:")]

    def stages(self) -> list[tuple[str, list[str]]]:
        """(hook, plugins in order) for every hook that somebody implements and that is a stage of training."""
        found = [(h, self.users(h)) for h in SERVED[self.kind] if h not in NO_STAGE]
        return [(hook, names) for hook, names in found if names]


def compose(specs: Sequence[PluginSpec]) -> tuple[PluginSpec, ...]:
    """Orders plugins (the estimator first, then as asked for) and checks their exclusive claims.

    Raises:
        ConfigError: Two plugins claim one resource or one field name, or one makes what another does not use.
    """
    owners: dict[str, str] = {}
    for spec in specs:
        for claim in (*sorted(spec.claims), *(f"field {name!r}" for name in spec.cls.fields)):
            if claim in owners:
                raise ConfigError(
                    f"plugins {owners[claim]!r} and {spec.name!r} cannot be combined: both claim {claim}. Leave "
                    f"one out."
                )
            owners[claim] = spec.name
    without = owners.get("no_advantages")
    for spec in specs:
        if without not in (None, spec.name) and ("advantages" in spec.hooks or "estimator" in spec.claims):
            raise ConfigError(
                f"plugins {without!r} and {spec.name!r} cannot be combined: {spec.name!r} makes advantages, and the "
                f"loss of {without!r} uses none. Leave one out."
            )
    forward = owners.get("logps")
    for spec in specs:
        if forward not in (None, spec.name) and "hidden_positions" in spec.hooks:
            raise ConfigError(
                f"plugins {forward!r} and {spec.name!r} cannot be combined: {spec.name!r} reads hidden states of the "
                f"policy's forward, and {forward!r} runs a forward of its own. Leave one out."
            )
    return tuple(sorted(specs, key=lambda spec: "estimator" not in spec.claims))


def common_trainers(specs: Sequence[PluginSpec]) -> list[TrainerKind]:
    """The trainers that every plugin serves.

    Raises:
        ConfigError: There is none.
    """
    kinds = [kind for kind in SERVED if all(kind in spec.cls.trainers for spec in specs)]
    if not kinds:
        listed = "; ".join(f"{spec.name}: {', '.join(spec.cls.trainers)}" for spec in specs)
        raise ConfigError(f"no trainer is served by all plugins ({listed}). Leave one out.")
    return kinds


def why_apart(left: PluginSpec, right: PluginSpec) -> str | None:
    """Why two plugins cannot be in one run, by their declarations; None if they can."""
    try:
        common_trainers(compose([left, right]))
    except ConfigError as error:
        return str(error)
    return None


def check_kind(specs: Sequence[PluginSpec], kind: TrainerKind) -> None:
    """Refuses a trainer that a plugin cannot serve."""
    for spec in specs:
        if kind not in spec.cls.trainers:
            raise ConfigError(
                f"plugin {spec.name!r} cannot serve the {kind.upper()} trainer; it serves "
                f"{', '.join(spec.cls.trainers)}. "
                f"Use one of these trainers, or leave the plugin out."
            )
        if "trainer_arguments" in spec.hooks and "trainer_arguments" not in SERVED[kind]:
            raise PluginError(
                f"plugin {spec.name!r} declares the {kind.upper()} trainer and gives it tools in its hook "
                f"'trainer_arguments'; only GRPO takes {', '.join(TOOL_SOURCES)}."
            )
        working = [hook for hook in spec.hooks if hook not in LIFECYCLE]
        if working and not any(hook in SERVED[kind] for hook in working):
            raise PluginError(
                f"plugin {spec.name!r} declares the {kind.upper()} trainer, which calls none of its hooks "
                f"({', '.join(working)}). That trainer calls: {', '.join(SERVED[kind])}."
            )
