"""Which hooks are stages of training, and which trainer calls which."""

from __future__ import annotations

from trl_ext_hooks import TrainerKind

from ..catalog.declaration import HOOKS

BUILDING = ("trainer_arguments", "configure")
"""Hooks that run before there is a trainer, on instances of their own."""
LIFECYCLE = (*BUILDING, "setup", "teardown", "state_dict", "load_state_dict")
NO_STAGE = (*LIFECYCLE, "inspect")
"""Hooks that are no stage of training: a printed plan leaves them out, and they prove nothing."""
ELSEWHERE = ("run", "optimizer_step")
"""Hooks that run before there is a trainer, or after the training step by which every other one must have run."""
_COMMON = tuple(hook for hook in LIFECYCLE if hook != "trainer_arguments")
_PAIRS = ("pair_batch", "pair_logps", "pair_metrics")
_ROUNDS = tuple(hook for hook in HOOKS if hook not in (*_PAIRS, "run"))
SERVED: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": _ROUNDS,
    "rloo": tuple(hook for hook in _ROUNDS if hook != "trainer_arguments"),
    "dpo": (*_COMMON, "run", "loss_inputs", "logps", "optimizer_step", *_PAIRS),
}
"""The hooks that each trainer calls."""
TOOL_SOURCES = ("tools", "environment_factory", "rollout_func")
"""Constructor arguments of a trainer that let its rollouts call tools; what `trainer_arguments` may give."""
ROUNDS: tuple[TrainerKind, ...] = ("grpo", "rloo")
"""The trainers that train on rounds of generated completions, which can be recorded."""
