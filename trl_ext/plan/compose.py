"""Composition of plugins: their order, and the claims that keep two of them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from trl_ext_hooks import Plugin, TrainerKind

from ..catalog.declaration import PluginSpec
from ..errors import ConfigError, PluginError
from .stages import LIFECYCLE, NO_STAGE, SERVED, TOOL_SOURCES


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked composition of one trainer.

    Attributes:
        kind: The trainer.
        specs: The plugins in the order in which the user named them.
        plugins: Their instances by name, in the same order: one each, from `configure` to `teardown`.
        needs: What the core has to provide, with the plugins that ask for it.
        notes: Warnings and recommendations, ready to print.
        required: By plugin, the settings that its `configure` requires.
        reward_columns: By plugin with the hook `reward_columns`, the names that its hook `rewards` must return.
    """

    kind: TrainerKind
    specs: tuple[PluginSpec, ...]
    plugins: Mapping[str, Plugin]
    needs: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]
    required: Mapping[str, Collection[str]] = dataclasses.field(default_factory=dict)
    reward_columns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def users(self, *hooks: str) -> list[str]:
        """Returns the plugins that implement one of these hooks, if the trainer calls it.

        They come in the order in which they act: that of the user, and in the hook `advantages` the estimator first.
        """
        called = [hook for hook in hooks if hook in SERVED[self.kind]]
        specs = self.specs
        if called == ["advantages"]:
            specs = tuple(sorted(specs, key=lambda spec: "estimator" not in spec.claims))
        return [spec.name for spec in specs if any(hook in spec.hooks for hook in called)]

    @property
    def forms_groups(self) -> str | None:
        """The plugin that forms groups of its own, or None."""
        return next((spec.name for spec in self.specs if "groups" in spec.claims), None)

    @property
    def prompts(self) -> int | None:
        """How many prompts a round of training has, where a plugin says so."""
        counts = [int(need.partition(":")[2]) for need in self.needs if need.startswith("prompts:")]
        return counts[0] if counts else None

    @property
    def drops_rows(self) -> list[str]:
        """The plugins by which a round may hold rows or tokens that the loss leaves out."""
        adding = [spec.name for spec in self.specs if "groups" in spec.claims and "rollout" in spec.hooks]
        return [*self.users("keep_rows", "token_mask"), *adding]

    def columns(self) -> list[str]:
        """Returns the columns of the data that plugins need."""
        return [need.partition(":")[2] for need in self.needs if need.startswith("column:")]

    def stages(self) -> list[tuple[str, list[str]]]:
        """Returns every stage of training that a plugin implements, with these plugins in order."""
        users = [(hook, self.users(hook)) for hook in SERVED[self.kind] if hook not in NO_STAGE]
        return [(hook, names) for hook, names in users if names]


def compose(specs: Sequence[PluginSpec]) -> tuple[PluginSpec, ...]:
    """Checks the exclusive claims of plugins, and returns the plugins in the order in which they were asked for.

    Beside a plugin that mixes advantages, several estimators may share a run.

    Raises:
        ConfigError: Two plugins claim the same thing, or one makes what another does not use.
    """
    owners: dict[str, str] = {}
    mixed = any("mix_advantages" in spec.hooks for spec in specs)
    for spec in specs:
        for claim in (*sorted(spec.claims), *(f"field {name!r}" for name in spec.cls.fields)):
            if claim in owners and not (claim == "estimator" and mixed):
                ways = "Leave one out."
                if claim == "estimator":
                    ways = f"Leave one out, or weigh them: --plugin mix --set {_weights(owners[claim], spec.name)}"
                raise ConfigError(
                    f"plugins {owners[claim]!r} and {spec.name!r} cannot be combined: both claim {claim}. {ways}"
                )
            owners[claim] = spec.name
    for claim, clashes, why in (
        (
            "no_advantages",
            lambda spec: {"advantages", "token_weights", "estimator", "mix_advantages"} & {*spec.hooks, *spec.claims},
            "{other!r} makes advantages, and the loss of {owner!r} uses none",
        ),
        (
            "row_advantages",
            lambda spec: "token_advantages" in spec.cls.needs,
            "{other!r} makes an advantage per token, and the loss of {owner!r} uses one per row",
        ),
        (
            "reward_labels",
            lambda spec: "rewards" in spec.hooks,
            "{other!r} rewrites rewards, and {owner!r} reads them as labels, not as amounts",
        ),
        (
            "policy_loss",
            lambda spec: "token_weights" in spec.hooks,
            "{other!r} weighs tokens for the averages of TRL's loss, and {owner!r} replaces that loss",
        ),
        (
            "groups",
            lambda spec: "whole_groups" in spec.cls.needs,
            "{owner!r} forms groups of any size, and {other!r} needs whole groups in every micro-batch",
        ),
        (
            "logps",
            lambda spec: "hidden_positions" in spec.hooks,
            "{other!r} reads hidden states of the policy's forward, and {owner!r} runs a forward of its own",
        ),
    ):
        owner = owners.get(claim)
        for spec in specs:
            if owner not in (None, spec.name) and clashes(spec):
                raise ConfigError(
                    f"plugins {owner!r} and {spec.name!r} cannot be combined: "
                    f"{why.format(other=spec.name, owner=owner)}. Leave one out."
                )
    return tuple(specs)


def _weights(*names: str) -> str:
    """Returns an option of `mix` with equal weights, as it is typed."""
    return f"mix.weights='{{{', '.join(f'{name}: 0.5' for name in names)}}}'"


def common_trainers(specs: Sequence[PluginSpec]) -> list[TrainerKind]:
    """Returns the trainers that every plugin serves.

    Raises:
        ConfigError: There is none.
    """
    kinds = [kind for kind in SERVED if all(kind in spec.cls.trainers for spec in specs)]
    if not kinds:
        listed = "; ".join(f"{spec.name}: {', '.join(spec.cls.trainers)}" for spec in specs)
        raise ConfigError(f"no trainer is served by all plugins ({listed}). Leave one out.")
    return kinds


def why_apart(left: PluginSpec, right: PluginSpec) -> str | None:
    """Returns why two plugins cannot share a run, by their declarations, or None if they can."""
    try:
        common_trainers(compose([left, right]))
    except ConfigError as error:
        return str(error)
    return None


def check_kind(specs: Sequence[PluginSpec], kind: TrainerKind) -> None:
    """Refuses a trainer that a plugin cannot serve.

    Raises:
        ConfigError: A plugin does not declare the trainer.
        PluginError: A plugin declares a trainer that calls none of its hooks, or that takes no tools from it.
    """
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
        if "side_batch" in spec.hooks and not {"policy_loss", "loss_terms"} & set(spec.hooks):
            raise PluginError(
                f"plugin {spec.name!r} supplies rows in its hook 'side_batch' and has neither 'loss_terms' nor "
                f"'policy_loss', so nothing would be learned from them. Return their loss from one of these hooks."
            )
        working = [hook for hook in spec.hooks if hook not in LIFECYCLE]
        if working and not any(hook in SERVED[kind] for hook in working):
            raise PluginError(
                f"plugin {spec.name!r} declares the {kind.upper()} trainer, which calls none of its hooks "
                f"({', '.join(working)}). That trainer calls: {', '.join(SERVED[kind])}."
            )
