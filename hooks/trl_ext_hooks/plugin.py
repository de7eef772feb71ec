"""What a plugin declares: the base class, its options, what it claims and needs, and pluggy's two markers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import pluggy

from .basics import TrainerKind

hookspec = pluggy.HookspecMarker("trl_ext")
hookimpl = pluggy.HookimplMarker("trl_ext")

CLAIMS: dict[str, str] = {
    "estimator": "computes the advantages from the rewards, in place of TRL; other plugins may only adjust them",
    "policy_loss": "replaces the policy loss (implied by the hook `policy_loss`)",
    "logps": "owns the log-probability forward (implied by the hook `logps`)",
    "no_advantages": "replaces the policy loss by one that uses no advantages, so no plugin of the run may compute or "
    "adjust them",
    "run": "takes the whole run over (implied by the hook `run`)",
}
"""Exclusive resources: at most one plugin of a run may claim each."""

NEEDS: dict[str, str] = {
    "whole_groups": "every micro-batch holds whole groups; a batch size that would split one is refused",
    "grouped_order": "rows of a group stay next to each other in the micro-batches, as far as the sizes allow",
    "old_logps": "`old_per_token_logps` in every micro-batch, computed once per round where TRL leaves it out",
    "ref_logps": "`ref_per_token_logps` in every micro-batch; with beta = 0 they come from the policy without its "
    "adapters, or from a frozen copy loaded from where the policy was loaded",
    "tools": "rollouts that can call tools: `tools`, `environment_factory` or `rollout_func` of the trainer",
    "token_advantages": "a loss of TRL that takes one advantage per token; settings that need one per row are refused",
    "turns": "`Rollout.turns`: rewards and ends that environments tell, turn by turn",
    "column:NAME": "the column NAME in the training data",
    "reward:NAME": "a reward function of that name",
}
"""What the core can provide or check for a plugin."""


class UsageError(ValueError):
    """Raise it in a hook where the user has to change something; the text says what. It is told without a traceback."""


RewardName = Annotated[str, "reward:NAME"]
"""Type of an option that names a reward function. The core checks the name; read its rewards by `round.reward`."""

ColumnName = Annotated[str, "column:NAME"]
"""Type of an option that names a column of the training data. The core checks the name and keeps the column."""


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

    The core checks type and bounds when it builds the options from what a user gave. A bound says nothing about None.

    Args:
        default: The paper's or the authors' setting. Without one the user must give a value.
        help: One sentence for `trl_ext show`: what the value does, its unit and its useful range.
        source: Where the default comes from, such as `paper, table 2` or `ours`.
        gt, ge, lt, le: Bounds of a number: greater than, at least, less than, at most.
        min_length: Fewest characters of a text, or entries of a list.
    """
    limits = {"gt": gt, "ge": ge, "lt": lt, "le": le, "min_length": min_length}
    bounds = {name: limit for name, limit in limits.items() if limit is not None}
    metadata = {"help": help, "source": source, "bounds": bounds}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a plugin that has none."""


class Plugin:
    """Base class of every plugin. A subclass declares itself in class attributes and implements hooks.

    Every trainer gets an instance of its own, so what a plugin keeps on `self` belongs to one run. Give it its first
    value in `start`, and name in `state` what must survive a restart.

    Attributes:
        name: How users ask for it: lower case, digits and hyphens.
        paper: The publication, for example `arXiv 2601.05242`.
        summary: One line: what it changes.
        trainers: The trainers that it serves, of `"grpo"`, `"rloo"` and `"dpo"`.
        Options: A frozen dataclass, best written inside the class, whose fields are made with `option`. Checks of one
            value are bounds of its `option`; checks of several belong in `__post_init__`.
        needs: What the core must provide, of `NEEDS`.
        claims: Exclusive resources that it takes, of `CLAIMS`.
        fields: Names that its `annotate` and `batch_fields` may return; no other plugin of the run may own them.
        honours: Only with the hook `policy_loss`: the loss settings of the trainer that the new loss applies itself
            (`beta`, `loss_type` with the normalisation `"trainer"`, ...). Every other one is refused when it differs
            from the value that asks for nothing.
            And `keep_rows` for a loss that is a scalar and leaves out the rows whose mask is 0.
        state: Names of attributes that the core saves in checkpoints and sets again on resume: tensors, numbers, texts,
            and lists and dicts of them, equal on every process. For anything else implement the hooks `state_dict` and
            `load_state_dict` instead.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
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
        """Gives the instance its first state. Runs once, when it is made; `self.options` is there already."""
