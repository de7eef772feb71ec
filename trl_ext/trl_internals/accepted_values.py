"""Values that the code of a trainer tells apart, read from that code: TRL has no table of its loss types."""

from __future__ import annotations

import ast
import functools
import inspect
import sys

from trl_ext_hooks import TrainerKind

from .seams import trainer_class


def accepted(kind: TrainerKind) -> dict[str, frozenset[str]]:
    """Returns the texts that a trainer tells apart, by the name of the setting, where it refuses all others."""
    module = sys.modules[trainer_class(kind).__module__]
    values = dict(accepted_values(inspect.getsource(module)))
    generation = getattr(module, "VLLMGeneration", None)
    if generation is not None:
        source = inspect.getsource(sys.modules[generation.__module__])
        values |= {f"vllm_{name}": texts for name, texts in accepted_values(source).items()}
    return values


@functools.cache
def accepted_values(source: str) -> dict[str, frozenset[str]]:
    """Returns the texts that code tells apart, by the name of the variable or attribute, where it refuses all others.

    Looked for are chains such as `if self.loss_type == "a": ... elif self.loss_type in ["b", "c"]: ... else: raise`.
    """
    accepted: dict[str, frozenset[str]] = {}
    ifs = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    inner = {id(entry) for node in ifs for entry in node.orelse}  # an `elif` is no chain of its own
    for node in ifs:
        if id(node) not in inner and (chain := _chain(node)) is not None:
            name, values = chain
            accepted[name] = accepted.get(name, frozenset()) | values
    return accepted


def _chain(node: ast.If) -> tuple[str, frozenset[str]] | None:
    """Returns name and values of a chain of comparisons that ends by raising, None for every other `if`."""
    names, values = set(), set()
    while True:
        compared = _comparison(node.test)
        if compared is None:
            return None
        names.add(compared[0])
        values |= compared[1]
        match node.orelse:
            case [ast.If() as node]:
                continue
            case [ast.Raise()] if len(names) == 1:
                return names.pop(), frozenset(values)
            case _:
                return None


def _comparison(test: ast.expr) -> tuple[str, set[str]] | None:
    """Returns name and texts of `name == "a"` and of `name in ("a", "b")`."""
    match test:
        case ast.Compare(left=ast.Attribute(attr=name) | ast.Name(id=name), ops=[ast.Eq()], comparators=[right]):
            texts = [right]
        case ast.Compare(
            left=ast.Attribute(attr=name) | ast.Name(id=name),
            ops=[ast.In()],
            comparators=[ast.List(elts=texts) | ast.Tuple(elts=texts) | ast.Set(elts=texts)],
        ):
            pass
        case _:
            return None
    values = {text.value for text in texts if isinstance(text, ast.Constant) and isinstance(text.value, str)}
    return (name, values) if len(values) == len(texts) else None
