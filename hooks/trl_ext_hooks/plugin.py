"""Declaration of a plugin: the base class, its options, what it claims and needs, and pluggy's two markers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import pluggy

from .basics import TrainerKind

hookspec = pluggy.HookspecMarker("trl_ext")
"""Marks the specification of a hook. Plugins do not need it."""

hookimpl = pluggy.HookimplMarker("trl_ext")
"""Marks a method of a plugin as the implementation of the hook of its name."""

CLAIMS: dict[str, str] = {
    "estimator": "computes the advantages from the rewards, in place of TRL. Other plugins may only adjust them. "
    "Several plugins may claim it beside one with the hook `mix_advantages`. "
    "Settings of TRL's advantages, such as `scale_rewards`, are refused unless `honours` or a `Require` names them",
    "mix_advantages": "combines the advantages of estimators (implied by the hook `mix_advantages`)",
    "policy_loss": "replaces the policy loss (implied by the hook `policy_loss`)",
    "logps": "owns the log-probability forward (implied by the hook `logps`)",
    "no_advantages": "replaces the policy loss by one that uses no advantages, so no plugin of the run may compute or "
    "adjust them",
    "row_advantages": "replaces the policy loss by one that uses one advantage per row, so no plugin of the run may "
    "make one per token",
    "reward_labels": "reads rewards as labels, such as right or wrong, and not as amounts, so no other plugin of the "
    "run may rewrite them",
    "groups": "forms groups of its own: `SelectedRows` of `select_rows`, or rows that `rollout` adds",
    "run": "controls the whole run (implied by the hook `run`)",
}
"""Exclusive resources: at most one plugin of a run may claim each."""

NEEDS: dict[str, str] = {
    "whole_groups": "every micro-batch holds whole groups. A batch size that would split one is refused",
    "grouped_steps": "every optimizer step holds whole groups, spread in any way over its micro-batches and "
    "processes. Batch sizes with which a step would take a part of one are refused",
    "whole_parameters": "every process holds all parameters, so that it may call the policy alone, as it likes. "
    "FSDP, DeepSpeed stage 3 and tensor parallelism are refused",
    "grouped_order": "rows of a group stay next to each other in the micro-batches, as far as the sizes allow",
    "old_logps": "`old_per_token_logps` in every micro-batch, computed once per round where TRL leaves it out",
    "old_entropies": "`old_entropies` in every round and micro-batch: entropies of the policy that sampled, from the "
    "forward of the old log-probabilities",
    "ref_logps": "`ref_per_token_logps` in every micro-batch. With beta = 0 they come from the policy without its new "
    "adapter, or from a frozen copy of the policy or of its trained adapter. A reference that differs from the policy "
    "before the first update stops the run",
    "tools": "rollouts that can call tools: `tools`, `environment_factory` or `rollout_func` of the trainer",
    "token_advantages": "a loss of TRL that takes one advantage per token. Settings that need one per row are refused",
    "turns": "`Rollout.turns`: rewards and ends of episodes that environments report turn by turn",
    "prompts:COUNT": "COUNT prompts are drawn for a round of training, each of them N / COUNT times, instead of N / G. "
    "Belongs to the claim `groups`. COUNT divides N, which is `generation_batch_size`",
    "column:NAME": "the column NAME in the training data, which is kept also with `remove_unused_columns`",
    "reward:NAME": "a reward column of that name: a reward function, or what a plugin makes of some",
}
"""What the core can provide or check for a plugin."""


class UsageError(ValueError):
    """Tells the user what to change. Raise it in a hook. Commands print its text without a traceback."""


RewardName = Annotated[str, "reward:NAME"]
"""Type of an option that names a reward function. The core checks it, and `round.reward` reads its rewards."""

ColumnName = Annotated[str, "column:NAME"]
"""Type of an option that names a column of the training data. The core checks the name and keeps the column."""


PluginName = Annotated[str, "plugin:NAME"]
"""Type of an option that names another plugin. Where the user did not ask for that plugin, the core adds it to the run
with default options. `trl` stands for TRL itself."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    source: str = "",
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    min_length: int | None = None,
) -> Any:
    """Returns a field of a plugin's options.

    The core checks type and bounds when it builds the options from the user's values. Bounds do not apply to None.

    Args:
        default: The paper's or the authors' setting. Without a default the user must supply a value.
        help: One sentence for `trl_ext show`: what the value does, its unit and its useful range.
        source: Where the default comes from, such as `paper, table 2` or `ours`.
        gt, ge, lt, le: Bounds of a number: greater than, at least, less than, at most.
        min_length: Minimum number of characters of a text, or of entries of a list.
    """
    limits = {"gt": gt, "ge": ge, "lt": lt, "le": le, "min_length": min_length}
    bounds = {name: limit for name, limit in limits.items() if limit is not None}
    metadata = {"help": help, "source": source, "bounds": bounds}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Stands for the options of a plugin that has none."""


class Plugin:
    """Declares a method in class attributes and implements hooks: the base class of every plugin.

    Every trainer has its own instance of each plugin, so attributes of `self` belong to one run. `start` sets their
    first values, and `state` names those that must survive a restart.

    Attributes:
        name: The name that users ask for: lower-case words, digits and hyphens.
        paper: The publication, for example `arXiv 2601.05242`.
        bibtex: BibTeX entries of what a run with the plugin should cite. Model cards and `trl_ext show NAME --bibtex`
            hold them. The text may be indented like the code around it.
        summary: One line on what the plugin changes.
        trainers: The trainers that it serves, of `"grpo"`, `"rloo"` and `"dpo"`. Every other trainer is refused.
        Options: A frozen dataclass, best nested in the class, whose fields are made with `option`. Checks of one value
            are bounds of its `option`. Checks of several values belong in `__post_init__`.
        needs: What the core must provide, of `NEEDS`.
        claims: Exclusive resources that it takes, of `CLAIMS`.
        fields: Names that its `annotate`, `batch_fields` and `pair_batch` may return. No other plugin of the run may
            declare them.
        honours: Settings of the trainer that the plugin applies itself. With the hook `policy_loss` these are settings
            of the loss, such as `beta`, or `loss_type` with the normalisation `"trainer"`. With the claim `estimator`
            they are settings of the advantages, such as `scale_rewards`, or `beta` of RLOO. Every other setting is
            refused when it asks for something. `keep_rows` declares a scalar loss that leaves out the rows whose mask
            is 0, as the hooks `keep_rows` and `token_mask` need it.
        state: Names of attributes that the core saves in checkpoints and restores on resume: tensors, numbers, texts,
            and lists and dicts of them, equal on every process. For anything else implement the hooks `state_dict` and
            `load_state_dict`.
        options: The options of this run, an instance of `Options`.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    trainers: ClassVar[tuple[TrainerKind, ...]]
    Options: ClassVar[type] = NoOptions
    needs: ClassVar[tuple[str, ...]] = ()
    claims: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()
    honours: ClassVar[tuple[str, ...]] = ()
    state: ClassVar[tuple[str, ...]] = ()

    options: Any

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options
        self.start()

    def start(self) -> None:
        """Sets the first values of the plugin's state. Runs once per instance, when `self.options` is already set."""
