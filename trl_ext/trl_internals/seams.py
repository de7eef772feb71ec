"""Every private TRL name that trl_ext relies on, as data, and the checks that it is still there."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from packaging.version import Version

from trl_ext_hooks import TrainerKind

from ..errors import CompatError

OLDEST, BEYOND = Version("1.10"), Version("1.17")
TESTED = ("1.10.0", "1.12.0", "1.14.0", "1.16.0")
OVERRIDE = "TRL_EXT_ALLOW_UNTESTED_TRL"

_MODULES: dict[TrainerKind, tuple[str, str]] = {
    "grpo": ("trl.trainer.grpo_trainer", "GRPOTrainer"),
    "rloo": ("trl.trainer.rloo_trainer", "RLOOTrainer"),
    "dpo": ("trl.trainer.dpo_trainer", "DPOTrainer"),
}
_ROUND: tuple[TrainerKind, ...] = ("grpo", "rloo")
_ALL: tuple[TrainerKind, ...] = ("grpo", "rloo", "dpo")


@dataclass(frozen=True)
class Seam:
    """One method (or module-level function) that trl_ext wraps.

    Attributes:
        name: Its name in TRL.
        kinds: Trainers that have it.
        parameters: Parameters that the wrapper relies on, in order.
        users: Hooks and needs that break without it. Empty stands for every run.
        module_level: A function that the trainer's module imported, instead of a method.
        since: The first supported TRL that has it. Empty stands for all of them.
    """

    name: str
    kinds: tuple[TrainerKind, ...]
    parameters: tuple[str, ...]
    users: frozenset[str] = frozenset()
    module_level: bool = False
    since: str = ""


_SCORING = frozenset(
    {
        *("annotate", "rewards", "advantages", "mix_advantages", "keep_rows", "token_mask", "token_weights"),
        *("batch_fields", "round_metrics", "inspect"),
    }
)
_LOSS = frozenset({"policy_loss", "loss_terms", "loss_metrics", "side_batch", "step_statistics"})
_GROUPED = frozenset({"grouped_order", "whole_groups", "grouped_steps"})
_PAIR_FORWARDS = frozenset({"logps", "pair_logps", "pair_metrics"})

SEAMS: tuple[Seam, ...] = (
    Seam("_generate", _ROUND, ("prompts",), frozenset({"rollout", "turns", "hidden_positions"}) | _SCORING),
    Seam("_generate_single_turn", ("grpo",), ("prompt_ids",), frozenset({"turns"})),
    Seam("_calculate_rewards", _ROUND, ("inputs", "prompts", "completions", "completion_ids_list"), _SCORING),
    Seam(
        "_generate_and_score_completions",
        _ROUND,
        ("inputs",),
        _SCORING | {"select_rows", "rollout", "old_logps", "old_entropies", "ref_logps", "hidden_positions"},
    ),
    Seam(
        "_prepare_inputs",
        _ROUND,
        ("generation_batch",),
        _GROUPED | {"step_statistics"},
    ),
    Seam("shuffle_sequence_dict", _ROUND, ("seq_dict",), _GROUPED, module_level=True),
    Seam(
        "_get_per_token_logps_and_entropies",
        _ROUND,
        ("model", "input_ids", "attention_mask", "logits_to_keep"),
        _LOSS | {"logps", "old_logps", "old_entropies", "ref_logps", "hidden_positions"},
    ),
    Seam("create_model_from_path", _ROUND, ("model_id",), frozenset({"ref_logps"}), module_level=True),
    Seam("prepare_deepspeed", _ROUND, ("model", "accelerator"), frozenset({"ref_logps"}), module_level=True),
    Seam("prepare_fsdp", _ROUND, ("model", "accelerator"), frozenset({"ref_logps"}), module_level=True),
    Seam("add_fused_lm_head", ("dpo",), ("model",), _PAIR_FORWARDS, module_level=True, since="1.15"),
    Seam("compute_ref_log_probs", ("dpo",), ("model", "inputs"), _PAIR_FORWARDS | {"pair_batch"}),
    Seam("_set_signature_columns_if_needed", ("dpo",), (), _PAIR_FORWARDS | {"pair_batch"}),
    Seam("_set_signature_columns_if_needed", _ROUND, (), frozenset({"column:NAME"})),
    Seam(
        "_compute_loss",
        _ALL,
        ("model", "inputs"),
        _LOSS | _PAIR_FORWARDS | {"loss_inputs", "keep_rows", "token_mask", "token_weights", "pair_batch"},
    ),
    Seam("training_step", _ALL, ("model", "inputs")),
    Seam("_save_checkpoint", _ALL, ("model", "trial"), frozenset({"state_dict"})),
    Seam("_load_optimizer_and_scheduler", _ALL, ("checkpoint",), frozenset({"load_state_dict"})),
)


def trl_version() -> Version:
    import trl

    return Version(trl.__version__)


def check_version() -> None:
    """Refuses a TRL outside the range that was tested.

    Raises:
        CompatError: With the range and the override.
    """
    found = trl_version()
    if OLDEST <= found < BEYOND:
        return
    message = f"trl {found} is outside the supported range >={OLDEST},<{BEYOND} (tested: {', '.join(TESTED)})."
    if os.environ.get(OVERRIDE) == "1":
        warnings.warn(f"{message} Continuing because {OVERRIDE}=1.", stacklevel=2)
        return
    raise CompatError(
        f"{message} Install a supported one (pip install 'trl>={OLDEST},<{BEYOND}'), or set {OVERRIDE}=1 to try: every "
        f"seam is then still checked, but nobody has compared the results."
    )


def trainer_class(kind: TrainerKind) -> type[Any]:
    module, name = _MODULES[kind]
    return getattr(importlib.import_module(module), name)


def kind_of(cls: type[Any]) -> TrainerKind | None:
    """Returns the kind of a trainer class or of its subclass, and None for every other class."""
    return next((kind for kind in _ALL if issubclass(cls, trainer_class(kind))), None)


def stands_for(cls: type[Any]) -> TrainerKind | None:
    """Returns the kind whose name in TRL leads, or once led, to a class or to a base of it; None for other classes."""
    import trl

    for kind, (module, name) in _MODULES.items():
        named = (trainer_class(kind), getattr(trl, name))
        if any(base in named or (base.__module__, base.__qualname__) == (module, name) for base in cls.__mro__):
            return kind
    return None


def needed(kind: TrainerKind, users: Iterable[str]) -> list[Seam]:
    """Returns the seams that a set of hooks and needs rests on."""
    wanted = {f"{use.partition(':')[0]}:NAME" if ":" in use else use for use in users}
    return [seam for seam in SEAMS if kind in seam.kinds and (not seam.users or seam.users & wanted)]


def check_seams(kind: TrainerKind, users: Iterable[str]) -> None:
    """Checks without a model that TRL still has what the plugins need.

    Raises:
        CompatError: Listing each missing seam, what is wrong with it, and who needs it.
    """
    wanted, problems = set(users), []
    owner = trainer_class(kind)
    for seam in needed(kind, wanted):
        home: Any = importlib.import_module(owner.__module__) if seam.module_level else owner
        target = getattr(home, seam.name, None)
        if not callable(target):
            problem = f"is missing, TRL has it from {seam.since}" if seam.since else "is missing"
        else:
            parameters = inspect.signature(target).parameters
            absent = [name for name in seam.parameters if name not in parameters]
            if not absent or any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
                continue
            problem = f"lacks the parameter {absent[0]!r}"
        by = ", ".join(sorted(seam.users & wanted)) or "every plugin"
        problems.append(f"  - {home.__name__}.{seam.name} {problem} (needed by: {by})")
    if problems:
        raise CompatError(
            f"trl {trl_version()} cannot be extended:\n" + "\n".join(problems) + f"\nTested: trl {', '.join(TESTED)}."
        )


def overrides(cls: type[Any], kind: TrainerKind, users: Iterable[str]) -> list[str]:
    """Methods of a user's subclass that replace a needed seam without calling TRL's, as `Class.method`."""
    base, found = trainer_class(kind), []
    for owner in cls.__mro__[: cls.__mro__.index(base)]:
        for seam in needed(kind, users):
            method = vars(owner).get(seam.name)
            function = inspect.unwrap(method) if method is not None else None
            if isinstance(function, FunctionType) and not {"super", seam.name} & set(function.__code__.co_names):
                found.append(f"{owner.__name__}.{seam.name}")
    return found


def fingerprints() -> dict[str, str]:
    """Returns a digest of each seam's body as a syntax tree, so that an upstream edit is noticed."""
    result = {}
    for kind in _ALL:
        owner = trainer_class(kind)
        for seam in SEAMS:
            home: Any = importlib.import_module(owner.__module__) if seam.module_level else owner
            if kind in seam.kinds and seam.name in vars(home):
                source = inspect.getsource(inspect.unwrap(getattr(home, seam.name)))
                result[f"{kind}.{seam.name}"] = digest(source)
    return result


def digest(source: str) -> str:
    """Returns a digest of a function's code, equal under every Python. Comments, layout and docstring do not count."""
    node = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(node, ast.FunctionDef)
    node.body = node.body[1:] if ast.get_docstring(node) else node.body

    def shape(value: Any) -> Any:  # unlike `ast.dump`, which differs between versions of Python in its empty fields
        if isinstance(value, ast.AST):
            fields = [(name, shape(part)) for name, part in ast.iter_fields(value) if part is not None and part != []]
            return type(value).__name__, fields
        return [shape(part) for part in value] if isinstance(value, list) else repr(value)

    return hashlib.sha256(repr(shape(node)).encode()).hexdigest()[:16]
