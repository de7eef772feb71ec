"""Dry run: every check short of loading the model, and the whole plan, for a machine that may have no GPU.

It runs in the process of the user, as if it were one of the planned processes, and writes nothing to the output folder.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..catalog.declaration import PluginSpec, instances
from ..engine.construct import check_class, plan_of_arguments
from ..errors import ConfigError, TrlExtError, counted, near
from ..plan.check import provided_arguments
from ..plan.compose import Plan
from ..plan.ownership import owner
from ..support.reward_functions import parameters, reward_functions
from ..support.tables import print_table
from ..trl_internals import arguments as trl_arguments
from ..trl_internals import late_refusals, seams
from ..trl_internals import launch as trl_launch
from ..trl_internals import rewards as trl_rewards
from ..trl_internals.arguments import Parsed
from . import display, estimate, output_folder, preflight
from .command_line import Request, as_arguments, say

_DATA_COLUMNS = {"grpo": ("prompt",), "rloo": ("prompt",), "dpo": ("chosen", "rejected")}


@dataclasses.dataclass
class Findings:
    """What a dry run found.

    Attributes:
        checks: What was looked at, with the result in words.
        refusals: Why the run cannot work.
        notes: Warnings.
    """

    checks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def check(self, label: str, look: Callable[[], Any], tell: Callable[[Any], str] = lambda _: "ok") -> Any:
        """Makes a check and returns its result, None if it refuses."""
        try:
            result = look()
        except TrlExtError as error:
            self.checks.append((label, "refused, see below"))
            self.refusals.append(str(error))
            return None
        self.checks.append((label, tell(result)))
        return result


def run(
    request: Request,
    divided: trl_launch.Split,
    demo: Mapping[str, Any],
    folder: Path,
    launcher: Any,
    takes: str = "",
) -> int:
    """Prints the plan of a run and every reason why it cannot work, and returns the exit code.

    Args:
        request: What the user asked for.
        divided: Its command line, divided between TRL and accelerate.
        demo: The settings of the embedded default, if that is what is trained.
        folder: The output folder.
        launcher: The parsed arguments of accelerate.
        takes: How long such a run takes, if that is known.
    """
    if not sys.warnoptions:  # as in the workers
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    given = {**demo, **divided.given}
    found = Findings()
    if not sys.stderr.isatty():
        display.no_library_bars()
    _print_settings(request, given)
    found.check("output folder", lambda: output_folder.check(request, given, folder), lambda _: f"ok: {folder}")
    planned = found.check(
        "launcher", lambda: trl_launch.planned(launcher), lambda result: f"ok: {_processes(result[0])}"
    )
    processes, environment = planned or (None, {})
    with trl_arguments.as_planned(processes or 1, environment):
        argv = [*divided.trl, *as_arguments(demo)]
        parsed = found.check(
            "settings of TRL", lambda: trl_arguments.parse_elsewhere(request.kind, argv, request.settings)
        )
        if parsed is not None:
            found.check("values", lambda: late_refusals.check(request.kind, parsed, elsewhere=True))
            _look(request, parsed, found, takes)
    _print_list("checks", found.checks)
    for note in dict.fromkeys(found.notes):
        say(f"note: {note}")
    if found.refusals:
        print("This run cannot work:")
        for refusal in dict.fromkeys(found.refusals):
            print("  - " + refusal.removeprefix("this run cannot work:\n  - ").replace("\n", "\n    "))
        return 2
    print("Nothing was found that would stop this run. No model was loaded and nothing was written.")
    return 0


def _processes(count: int | None) -> str:
    if count is None:
        return "as if for 1 process; --num_processes or the machine of the run decides"
    return counted(count, "process")


def _look(request: Request, parsed: Parsed, found: Findings, takes: str) -> None:
    """Checks data, rewards and plugins, and prints the plan, the sizes and the estimates."""
    data: Any = None
    bound: dict[str, Any] | None = None
    if request.task is None:
        say("checking the data" + (" and the reward functions" if request.check_rewards else ""))
        found.check(
            "data and rewards",
            lambda: preflight.check(
                request.kind, parsed, request.specs, found.notes.append, rewards=request.check_rewards
            ),
        )
        bound = found.check("trainer", lambda: _arguments(request, parsed))
    else:
        bound = found.check(f"task {request.task}", lambda: _task_arguments(request, parsed))
    if bound is not None:
        data = bound.get("train_dataset")
        plan = found.check("plugins", lambda: _plan(request, parsed, bound))
        if plan is not None:
            found.notes += plan.notes
            _print_plan(plan)
            _print_list("what the data must have", _needed(request, plan, bound, parsed))
    rows = preflight.row_count(data) if data is not None else None
    sizes = estimate.round_sizes(request.kind, parsed[1], rows)
    if owner(request.specs) is not None:
        sizes = sizes[:-1]  # what a training of such a run trains on is made on the way
    _print_list("sizes", [("training rows", "a stream" if rows is None else str(rows)), *sizes])
    counts: Any = "the task makes its own model" if request.task else estimate.parameters(parsed)
    known = not isinstance(counts, str)
    _print_list(
        "estimates",
        [
            ("parameters", f"{counts.total:,}, {counts.trained:,} trained" if known else f"not known: {counts}"),
            ("memory", estimate.memory(request.kind, parsed, counts)),
            ("time", takes or "not known before the first steps, whose lines say what is left"),
        ],
    )


def _arguments(request: Request, parsed: Parsed) -> dict[str, Any]:
    """Returns what TRL's script would give its trainer, the model by name."""
    from trl import get_peft_config

    script, training, model, _ = parsed
    splits = trl_arguments.load_splits(parsed)
    bound = {
        "model": model.model_name_or_path,
        "args": training,
        "train_dataset": None if splits is None else splits.get(script.dataset_train_split),
        "peft_config": get_peft_config(model),
    }
    if request.kind != "dpo":
        names = list(script.reward_funcs or ())
        functions = trl_rewards.of_trl(names) | reward_functions(names)
        unknown = [name for name in names if name not in functions]
        if unknown:
            raise ConfigError(
                f"reward function {unknown[0]!r} is neither a path such as my_rewards.correct nor one of TRL's."
                f"{near(unknown[0], ('accuracy_reward', 'reasoning_accuracy_reward', 'think_format_reward'))}"
            )
        model_path = getattr(script, "reward_model_name_or_path", None)
        bound["reward_funcs"] = [*([model_path] if model_path else []), *(functions[name] for name in names)]
    return bound


def _task_arguments(request: Request, parsed: Parsed) -> dict[str, Any]:
    """Returns what a task gives the trainer, without its model."""
    from .. import lab
    from ..lab.tokenizer import Vocabulary
    from ..lab.trainer_arguments import arguments_without_model
    from .on_task import check_settings

    assert request.task is not None
    check_settings(request.task, parsed)
    task = lab.task(request.task)
    arguments = arguments_without_model(task, request.kind, seed=parsed[1].seed, **request.sizes)
    return {"args": parsed[1], "processing_class": Vocabulary.of(task).build(), **arguments}


def _plan(request: Request, parsed: Parsed, bound: dict[str, Any]) -> Plan:
    """Returns the checked plan of the plugins."""
    if owner(request.specs) is not None:
        from ..campaign import job

        return job.check(request.specs, parsed[1])
    cls = seams.trainer_class(request.kind)
    check_class(cls, request.specs)
    plugins = instances(request.specs)
    provided = provided_arguments(request.specs, plugins, bound)
    try:
        return plan_of_arguments(request.kind, cls, request.specs, plugins, {**bound, **provided})[1]
    except OSError as error:  # of the tokenizer, at which only runs with tools look before the model is loaded
        raise ConfigError(f"the tokenizer of {bound['model']} cannot be loaded: {error}") from error


def _needed(request: Request, plan: Plan, bound: Mapping[str, Any], parsed: Parsed) -> list[tuple[str, str]]:
    """Returns the columns that somebody asks of the data, with who does."""
    from ..trl_internals.steps import rows_of_a_round

    askers: dict[str, list[str]] = {}
    for column in ("prompt",) if owner(request.specs) is not None else _DATA_COLUMNS[request.kind]:
        askers.setdefault(column, []).append(f"the {request.kind.upper()} trainer")
    for need, names in plan.needs.items():
        if need.startswith("column:"):
            askers.setdefault(need.partition(":")[2], []).extend(names)
    passed = {*trl_rewards.ARGUMENTS, *(name for spec in request.specs for name in spec.cls.fields)}
    for function in bound.get("reward_funcs") or ():
        if callable(function):
            for column in sorted(parameters(function)[1] - passed):
                askers.setdefault(column, []).append(f"the reward {trl_rewards.reward_name(function)}")
    rows = rows_of_a_round(request.kind, parsed[1])
    least = [] if owner(request.specs) is not None else [("rows", f"at least {rows}, for the first step")]
    return [*((f"column {name}", ", ".join(dict.fromkeys(who))) for name, who in askers.items()), *least]


def _print_plan(plan: Plan) -> None:
    stages = [(hook, ", ".join(names)) for hook, names in plan.stages()]
    _print_list(f"stages of {plan.kind.upper()} in which plugins act, in order", stages or [("none", "plain TRL")])


def _print_settings(request: Request, given: Mapping[str, Any]) -> None:
    """Prints options of plugins and settings of TRL that differ from their defaults."""
    options = [
        (f"{spec.name}.{name}", f"{value!r} (default {default!r})" if known else repr(value))
        for spec in request.specs
        for name, value, known, default in _changed(spec)
    ]
    _print_list("options of plugins that differ from their defaults", options or [("none", "")])
    defaults = {action.dest: action.default for action in trl_arguments.trl_parser(request.kind)._actions}
    settings = [
        (name, f"{value!r} (default {defaults.get(name)!r})")
        for name, value in sorted(given.items())
        if value != defaults.get(name)
    ]
    _print_list("settings of TRL that differ from their defaults", settings or [("none", "")])


def _changed(spec: PluginSpec) -> list[tuple[str, Any, bool, Any]]:
    """Returns the options of a plugin that differ from their defaults: name, value, whether there is one, default."""
    changed = []
    for field in dataclasses.fields(spec.options):
        value = getattr(spec.options, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        known = default is not dataclasses.MISSING
        if not known or value != default:
            changed.append((field.name, value, known, default))
    return changed


def _print_list(title: str, rows: list[tuple[str, str]]) -> None:
    print_table(["", ""], [list(row) for row in rows], title=title)
