"""Loss types that the installed TRL accepts, read from the source of its trainers without importing them."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

from trl_ext_hooks import TrainerKind


@functools.cache
def loss_types(kind: TrainerKind) -> tuple[str, ...]:
    """Returns the values of `loss_type` that a trainer of TRL tells apart, in alphabetical order.

    The settings describe them in prose only, so this looks at what the trainer compares its loss type with. A trainer
    without loss types, such as RLOO, has none. There is none either if TRL is not installed.
    """
    spec = importlib.util.find_spec("trl")  # which imports nothing
    if spec is None or spec.origin is None:
        return ()
    file = Path(spec.origin).parent / "trainer" / f"{kind}_trainer.py"
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Compare) and _is_loss_type(node.left):
            values = [inner for right in node.comparators for inner in ast.walk(right)]
            names |= {
                value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
            }
    return tuple(sorted(names))


def _is_loss_type(node: ast.expr) -> bool:
    """Returns whether an expression is `loss_type`, `self.loss_type` or `args.loss_type`."""
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")) == "loss_type"
