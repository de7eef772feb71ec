"""Contract between trl_ext and its plugins: everything that a plugin author imports.

    from trl_ext_hooks import Plugin, hookimpl, option, Round

`specs` lists every hook. Each stage has a module with its types and its hooks: `setup`, `rollout`, `scoring`, `loss`,
`pairs`, `views`, `campaign`. `toolkit` holds the functions that methods share, and `ops` collects its tensor functions
under one short name. Both import torch, so this package does not import them. Every name is in `hooks/REFERENCE.md`.
"""

from .basics import Logps, TrainerKind
from .campaign import Job
from .loss import LogpsCall, Loss, PolicyLoss, StepBatch
from .pairs import PairLogps, Pairs, ScoredPairs
from .plugin import (
    CLAIMS,
    NEEDS,
    ColumnName,
    NoOptions,
    Plugin,
    PluginName,
    RewardName,
    UsageError,
    hookimpl,
    hookspec,
    option,
)
from .rollout import Generate, Generation, Rollout, RolloutContext, SelectedRows, Turns
from .scoring import Rewards, Round, Scored
from .setup import Config, Need, Recommend, Refuse, Require, Requirement, Warn
from .side_rows import SideBatch, SideRows
from .trainer import TrainerView
from .views import Curve, Span, Views

# Modules that were renamed stay importable under their old names: `trl_ext_hooks.segments` and four others.
__path__.append(f"{__path__[0]}/old_names")

__all__ = [
    "CLAIMS",
    "NEEDS",
    "ColumnName",
    "Config",
    "Curve",
    "Generate",
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
    "PluginName",
    "PolicyLoss",
    "Recommend",
    "Refuse",
    "Require",
    "Requirement",
    "RewardName",
    "Rewards",
    "Rollout",
    "RolloutContext",
    "Round",
    "Scored",
    "ScoredPairs",
    "SelectedRows",
    "SideBatch",
    "SideRows",
    "Span",
    "StepBatch",
    "TrainerKind",
    "TrainerView",
    "Turns",
    "UsageError",
    "Views",
    "Warn",
    "hookimpl",
    "hookspec",
    "option",
]
