"""Rows and generation: the hooks `select_rows` and `rollout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trl_ext_hooks import Generation

from ...errors import PluginError
from ...trl_internals import trainer_state

if TYPE_CHECKING:
    from ..host import Session


def select_rows(session: Session, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lets plugins replace the rows of a training round; they see those of all processes."""
    if not session.has("select_rows") or trainer_state.mode(session.trainer) != "train":
        return rows
    everything = session.view.gather_objects(list(rows))
    for name, caller in session.chain("select_rows"):
        selected = session.call(name, "select_rows", caller, rows=list(everything), trainer=session.view)
        if selected is None:
            continue
        if len(selected) != len(everything):
            raise PluginError(
                f"plugin {name!r} returned {len(selected)} rows from 'select_rows', expected {len(everything)}: as "
                f"many as it got, every prompt num_generations times in a row."
            )
        everything = list(selected)
    start = session.view.process_index * len(rows)
    return everything[start : start + len(rows)]


def generate(session: Session, prompts: list[Any], stock: Callable[[list[Any]], Generation]) -> Generation:
    """Nests the plugins around TRL's generation, the first one outermost."""
    run = stock
    for name, caller in reversed(session.chain("rollout")):
        run = _around(session, name, caller, run, len(prompts))
    result = run(prompts)
    session.current().tool_mask = result.tool_mask
    return result


def _around(
    session: Session, name: str, caller: Any, inner: Callable[[list[Any]], Generation], rows: int
) -> Callable[[list[Any]], Generation]:
    def run(prompts: list[Any]) -> Generation:
        result = session.call(name, "rollout", caller, prompts=prompts, generate=inner, trainer=session.view)
        if not isinstance(result, Generation) or len(result.completion_ids) != rows:
            got = f"{len(result.completion_ids)} completions" if isinstance(result, Generation) else repr(type(result))
            raise PluginError(f"plugin {name!r} returned {got} from 'rollout', expected a Generation with {rows} rows.")
        return result

    return run
