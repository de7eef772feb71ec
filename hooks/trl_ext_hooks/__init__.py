"""The contract between trl_ext and its plugins: everything that a plugin author imports.

    from trl_ext_hooks import Plugin, hookimpl, option, Round

`trl_ext_hooks.specs` documents every hook; `trl_ext_hooks.ops` holds the tensor functions that plugins share
(it imports torch, so it is not imported from here), `trl_ext_hooks.segments` cuts completions into chunks and steps,
and `trl_ext_hooks.judges` asks whether a piece of text states the right answer.
"""

from .plugin import CLAIMS, NEEDS, NoOptions, Plugin, UsageError, hookimpl, hookspec, option
from .types import (
    Config,
    Curve,
    Generation,
    Job,
    Logps,
    LogpsCall,
    Loss,
    Need,
    PairLogps,
    Pairs,
    PolicyLoss,
    Recommend,
    Refuse,
    Require,
    Requirement,
    Rewards,
    Rollout,
    Round,
    Scored,
    ScoredPairs,
    Span,
    TrainerKind,
    TrainerView,
    Views,
    Warn,
)

__all__ = [
    "CLAIMS",
    "NEEDS",
    "Config",
    "Curve",
    "Generation",
    "Job",
    "Logps",
    "LogpsCall",
    "Loss",
    "Need",
    "NoOptions",
    "PairLogps",
    "Pairs",
    "Plugin",
    "PolicyLoss",
    "Recommend",
    "Refuse",
    "Require",
    "Requirement",
    "Rewards",
    "Rollout",
    "Round",
    "Scored",
    "ScoredPairs",
    "Span",
    "TrainerKind",
    "TrainerView",
    "UsageError",
    "Views",
    "Warn",
    "hookimpl",
    "hookspec",
    "option",
]
