"""Passes of a round: every generation that a `rollout` hook asks for, and what the trainer records of the result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_ext_hooks import Generation, RolloutContext

from ...errors import PluginError
from ...support.random_state import untouched_random_state
from ...trl_internals import generation, trainer_state
from ..agreement import agree, together
from ..context import Context
from . import groups, turns

Stock = Callable[[list[Any]], Generation]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be generated on this process.

    Attributes:
        prompts: The prompts.
        greedy: Whether the most likely tokens are asked for.
        counts: How many prompts each process has.
        numbers: For each prompt the number of its row in the round, where the caller told it.
        whole: Whether the prompts stand in for all rows of the round in their order, on every process.
    """

    prompts: list[Any]
    greedy: bool
    counts: list[int]
    numbers: list[int] | None
    whole: bool


class Passes:
    """The generations of one round. Plugins are nested around TRL's own, the first one outermost."""

    def __init__(self, context: Context, prompts: list[Any], stock: Stock) -> None:
        self._context = context
        self._prompts = prompts
        self._stock = stock
        self._plugins = context.calls.chain("rollout")
        self._made: list[tuple[Generation, generation.Recorded]] = []
        self._open = True
        self._all: list[int] = []

    def run(self) -> Generation:
        """Returns the generation of the round, of which the trainer then holds the metrics."""
        first = self._context.view.process_index * len(self._prompts)
        self._all = list(range(first, first + len(self._prompts)))
        counts = [len(self._prompts)] * self._context.view.num_processes
        result = self._inside(0, Request(self._prompts, False, counts, self._all, True))
        self._open = False
        sources = agree(self._context.view, "the end of 'rollout'", self._source(result))
        trainer = self._context.trainer
        whole = sources[0] is not None and len(set(sources)) == 1
        if whole:
            recorded = self._made[sources[0]][1]
        else:
            recorded = generation.recorded_of(trainer, result, self._context.view.gather_objects)
        generation.record(trainer, recorded)
        if self._context.plan.forms_groups:
            result = groups.spread(self._context, self._prompts, result)
        return result

    def _source(self, result: Generation) -> int | None:
        """Returns the pass that a generation is, or None."""
        for number in reversed(range(len(self._made))):
            made = self._made[number][0]
            if (made.prompt_ids, made.completion_ids) == (result.prompt_ids, result.completion_ids):
                return number
        return None

    # --- the plugins ---

    def _inside(self, level: int, request: Request) -> Generation:
        """Runs the plugin of a level, or TRL behind the last one."""
        if level == len(self._plugins):
            return self._pass(request)
        name, caller = self._plugins[level]
        context = self._described(level, request)

        def generate(prompts: list[Any], greedy: bool = False, rows: Sequence[int] | None = None) -> Generation:
            return self._asked(level, request, prompts, greedy, rows)

        given = {"prompts": request.prompts, "generate": generate, "trainer": self._context.view, "context": context}
        result: Generation = self._context.calls.call(name, "rollout", caller, **given)
        check = functools.partial(self._check_result, name, result, len(request.prompts))
        together(self._context, check, f"the end of 'rollout' of plugin {name!r}")
        return result

    def _check_result(self, name: str, result: Any, prompts: int) -> tuple[None, None]:
        """Refuses what a hook returned unless it is a generation for the prompts that the hook got."""
        context = self._context
        may_add = context.plan.forms_groups is not None
        problem = groups.wrong_generation(result, prompts, context.current_round().rows, may_add)
        if problem is not None:
            raise PluginError(f"plugin {name!r} {problem}")
        for field in result.fields:
            # a plugin passes on the fields of those further inside
            if not any(field in plugin.fields for plugin in context.plan.plugins.values()):
                context.calls.check_declared(name, "rollout", field)
        return None, None

    def _asked(
        self, level: int, request: Request, prompts: Any, greedy: bool, rows: Sequence[int] | None
    ) -> Generation:
        """Generates what the plugin of a level asks for."""
        name = self._plugins[level][0]
        call = f"generate in 'rollout' of plugin {name!r}"
        if not self._open:
            raise PluginError(f"plugin {name!r} called generate when its hook 'rollout' had returned. Call it inside.")
        problem = _problem(prompts, rows, len(request.prompts))
        if problem is not None:
            prompts, rows = [], None
        numbers = _numbers(request, len(prompts), rows)
        place = "nowhere" if numbers is None else "in place" if numbers == self._all else "elsewhere"
        known = agree(self._context.view, call, (len(prompts), bool(greedy), place), problem)
        if len({wanted for _, wanted, _ in known}) > 1:
            raise PluginError(f"{call} got greedy=True on some processes and greedy=False on others.")
        counts = [count for count, _, _ in known]
        places = {where for _, _, where in known}
        if "nowhere" in places:
            numbers = None
        if not any(counts):
            return Generation([], [], [])
        inner = Request(list(prompts), bool(greedy) or request.greedy, counts, numbers, places == {"in place"})
        readers = [other for other, hook in self._plugins[level + 1 :] if _reads_context(hook)]
        if numbers is None and readers:
            raise PluginError(
                f"{call} got {counts} prompts per process without `rows`, and plugin {readers[0]!r} further inside "
                f"has to know which rows they belong to. Pass rows=[...], for each prompt the index of the prompt that "
                f"it stands in for."
            )
        return self._inside(level + 1, inner)

    def _described(self, level: int, request: Request) -> RolloutContext | None:
        """Returns the context of the plugin of a level. Collective where it belongs to a part of the round."""
        if not _reads_context(self._plugins[level][1]) or request.numbers is None:
            return None
        context, state = self._context, self._context.current_round()
        view, trainer, b = context.view, context.trainer, len(self._prompts)
        first = view.process_index * b
        group_ids = groups.ids_of(context, b)
        if level:
            places = torch.tensor(view.gather_objects(request.numbers), dtype=torch.long, device=view.device)
            group_ids = group_ids[places]
        assert state.data_rows is not None, "the round has kept its rows"
        return RolloutContext(
            mode=trainer_state.mode(trainer),
            step=trainer.state.global_step,
            num_generations=state.num_generations,
            rows=[state.data_rows[number - first] for number in request.numbers],
            group_ids=group_ids,
            offset=sum(request.counts[: view.process_index]),
            row_numbers=request.numbers,
            greedy=request.greedy,
            metric_log=state.log,
        )

    # --- TRL ---

    def _pass(self, request: Request) -> Generation:
        """Runs TRL's generation for as many prompts as the process with the most of them has."""
        context, trainer, rows = self._context, self._context.trainer, max(request.counts)
        self._check(request)
        prompts = [*request.prompts, *[(request.prompts or self._prompts)[0]] * (rows - len(request.prompts))]
        with contextlib.ExitStack() as stack:
            if request.greedy:
                stack.enter_context(untouched_random_state())
                stack.enter_context(generation.greedy(trainer))
            if generation.samples_groups(trainer) and not self._in_groups(prompts):
                stack.enter_context(generation.one_each(trainer))
            if rows != len(self._prompts):
                stack.enter_context(generation.tools_for(trainer, rows))
            stack.enter_context(turns.reading(context))
            recorded = stack.enter_context(generation.unrecorded(trainer))
            result = self._stock(prompts)
        self._made.append((result, recorded))
        return result if rows == len(request.prompts) else result.select(range(len(request.prompts)))

    def _check(self, request: Request) -> None:
        """Refuses what TRL's generation cannot do. Equal on every process.

        Raises:
            PluginError: With the reason.
        """
        b, trainer = len(self._prompts), self._context.trainer
        users = ", ".join(repr(name) for name, _ in self._plugins)
        if request.greedy and "rollout_func" in trainer_state.tool_sources(trainer):
            raise PluginError(
                f"{users}: generate(..., greedy=True) cannot make the `rollout_func` of this trainer greedy, which "
                f"samples as it likes. Leave the plugin or the rollout_func out."
            )
        if not trainer_state.environments(trainer):
            return
        if self._made or not request.whole:
            raise PluginError(
                f"{users}: generate in 'rollout' ran for {request.counts} prompts per process, as pass "
                f"{len(self._made) + 1} of the round. With an environment it runs once, for the {b} prompts that the "
                f"hook got, in their order, because an episode that was played goes on in the next pass. Use tools "
                f"without state, or leave the plugin out."
            )

    def _in_groups(self, prompts: list[Any]) -> bool:
        """Tells whether the prompts of all processes are G equal ones after each other. Collective."""
        everything = self._context.view.gather_objects(prompts)
        group = trainer_state.num_generations(self._context.trainer)
        blocks = [everything[start : start + group] for start in range(0, len(everything), group)]
        return all(len(block) == group and all(prompt == block[0] for prompt in block) for block in blocks)


def _reads_context(caller: Any) -> bool:
    """Tells whether a plugin's hook takes the argument `context`."""
    return any("context" in implementation.argnames for implementation in caller.get_hookimpls())


def _problem(prompts: Any, rows: Any, known: int) -> str | None:
    """Returns what is wrong with the arguments of `generate`, or None."""
    if not isinstance(prompts, list):
        return f"`prompts` is a {type(prompts).__name__}, expected a list of prompts"
    for prompt in prompts:
        if not isinstance(prompt, str | list) or prompt == []:
            return f"a prompt is {prompt!r}, expected a text or a list of messages"
    if len({type(prompt) for prompt in prompts}) > 1:
        return "some prompts are text and some are messages, expected one of both"
    if rows is None:
        return None
    if not isinstance(rows, Sequence):
        return f"`rows` is a {type(rows).__name__}, expected a list of indices"
    if len(rows) != len(prompts):
        return f"`rows` has {len(rows)} entries for {len(prompts)} prompts, expected one for each"
    if not all(isinstance(row, int) and 0 <= row < known for row in rows):
        return f"`rows` is {list(rows)}, expected indices of the {known} prompts that the hook got"
    return None


def _numbers(request: Request, count: int, rows: Sequence[int] | None) -> list[int] | None:
    """Returns the numbers of the rows that prompts stand in for, where they are known."""
    if request.numbers is None:
        return None
    if rows is not None:
        return [request.numbers[row] for row in rows]
    return request.numbers if count == len(request.prompts) else [] if not count else None
