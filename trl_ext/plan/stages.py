"""Stages of training among the hooks, and the hooks that each trainer calls."""

from __future__ import annotations

from trl_ext_hooks import TrainerKind

from ..catalog.declaration import HOOKS

BUILDING = ("trainer_arguments", "reward_columns", "configure")
"""Hooks that run before there is a trainer."""
LIFECYCLE = (*BUILDING, "setup", "teardown", "state_dict", "load_state_dict")
NO_STAGE = (*LIFECYCLE, "inspect")
"""Hooks that are not stages of training. A printed plan leaves them out, and whether they ran proves nothing."""
ELSEWHERE = ("run", "optimizer_step")
"""Hooks outside the first training step, by whose end every other hook must have run."""
_COMMON = tuple(hook for hook in LIFECYCLE if hook not in ("trainer_arguments", "reward_columns"))
_PAIRS = ("pair_batch", "pair_logps", "pair_metrics")
_ROUNDS = tuple(hook for hook in HOOKS if hook not in (*_PAIRS, "run"))
SERVED: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": _ROUNDS,
    "rloo": tuple(hook for hook in _ROUNDS if hook not in ("trainer_arguments", "token_mask", "token_weights")),
    "dpo": (*_COMMON, "run", "loss_inputs", "logps", "optimizer_step", *_PAIRS),
}
"""The hooks that each trainer calls."""
TOOL_SOURCES = ("tools", "environment_factory", "rollout_func")
"""Constructor arguments that let rollouts call tools. `trainer_arguments` may give these and no others."""
ROUNDS: tuple[TrainerKind, ...] = ("grpo", "rloo")
"""Trainers that train on rounds of generated completions, which can be recorded."""
