"""The checks of a recipe that need torch and TRL. A child process makes them before the first run."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import trl_ext_hooks
from trl_ext_hooks import TrainerKind

from .. import api, lab
from ..campaign import job
from ..catalog import declaration, find
from ..errors import ConfigError, near
from ..plan import compose, ownership
from ..support import reward_functions, versions
from ..train import on_task, preflight
from ..trl_internals import arguments, late_refusals, launch, seams
from ..trl_internals import rewards as trl_rewards
from . import store
from .child_process import Said, Tell
from .recipe import Arm, Recipe
from .runs import Prepared

_HOST = Path(api.__file__).parent
_NUMBERS = ("api.py", "campaign", "engine", "plan", "trl_internals")
"""Parts of the host that can change what a run computes."""
_DEFAULTS = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


def prepare(recipe: Recipe, tell: Tell) -> Prepared:
    """Checks a recipe and returns what was found out about it.

    Raises:
        TrlExtError: Something in it cannot work. The message says what to change.
    """
    seams.check_version()
    specs = {name: compose.compose(find.resolve(arm.plugins)) for name, arm in recipe.arms.items()}
    kind = _trainer(recipe, [spec for arm_specs in specs.values() for spec in arm_specs])
    accelerator = launch.accelerator_found()
    settings = {name: _settings(recipe, arm, accelerator) for name, arm in recipe.arms.items()}
    resolved: dict[str, Any] = {}
    rewards: tuple[str, ...] | None = None
    for index, (name, arm) in enumerate(recipe.arms.items(), start=1):
        tell(Said(f"checking arm {index} of {len(recipe.arms)}: {name}"))
        with tempfile.TemporaryDirectory(prefix="trl_ext-") as folder:
            given = settings[name] | {"output_dir": folder, "seed": recipe.seeds[0]}
            try:
                parsed, rewards = _try(recipe, arm, specs[name], kind, given, tell)
            except ConfigError as error:
                raise ConfigError(f"arm {name!r}: {error}") from error
            resolved[name] = [_options(specs[name], recipe), json.dumps(_values(parsed), default=repr, sort_keys=True)]
    for one, other in itertools.combinations(recipe.arms, 2):
        if resolved[one] == resolved[other]:
            raise ConfigError(
                f"arms {one!r} and {other!r} differ in nothing: they have the same plugins, options and settings. "
                f"Change one of them, or leave it out."
            )
    code = _digest(_sources(recipe, settings.values()))
    identities = {
        name: {
            "trainer": kind,
            "task": recipe.task,
            "sizes": recipe.sizes,
            "settings": settings[name],
            "plugins": _options(specs[name], recipe),
            "code": code,
            "plugin_code": _digest(file for spec in specs[name] for file in _module_files(spec.cls)),
            "versions": versions.versions(),
        }
        for name in recipe.arms
    }
    return Prepared(kind, settings, identities, rewards, accelerator)


def _trainer(recipe: Recipe, specs: Sequence[declaration.PluginSpec]) -> TrainerKind:
    """Returns the trainer of the recipe, or the first one that the task and all plugins serve."""
    offered = declaration.KINDS if recipe.task is None else tuple(lab.task(recipe.task).trainers)
    if recipe.trainer is None:
        kinds = [kind for kind in offered if all(kind in spec.cls.trainers for spec in specs)]
        if not kinds:
            listed = "; ".join(f"{spec.name}: {', '.join(spec.cls.trainers)}" for spec in specs)
            raise ConfigError(
                f"no trainer serves everything: task {recipe.task!r}: {', '.join(offered)}; {listed}. Choose another "
                f"task, or leave a plugin out."
            )
        return kinds[0]
    if recipe.trainer not in offered:
        raise ConfigError(
            f"experiment.trainer: task {recipe.task!r} is not for {recipe.trainer}. It is for {', '.join(offered)}."
        )
    compose.check_kind(specs, recipe.trainer)
    return recipe.trainer


def _settings(recipe: Recipe, arm: Arm, accelerator: bool) -> dict[str, Any]:
    """Returns TRL's settings for the runs of an arm, on the CPU where there is nothing else."""
    settings = _DEFAULTS | recipe.settings | arm.settings
    for name in ("seed", "output_dir"):
        settings.pop(name, None)  # the experiment has its own seeds, and keeps records instead of models
    if not accelerator:
        settings.setdefault("use_cpu", True)
        if not {"bf16", "fp16"} & set(settings):
            settings["bf16"] = False  # TRL's default
    return settings


def _try(
    recipe: Recipe,
    arm: Arm,
    specs: Sequence[declaration.PluginSpec],
    kind: TrainerKind,
    settings: Mapping[str, Any],
    tell: Tell,
) -> tuple[arguments.Parsed, tuple[str, ...] | None]:
    """Goes as far as a run can go without training. Returns TRL's arguments and the names of the rewards."""
    parser = arguments.trl_parser(kind)
    for name in parser.apply(settings):
        raise ConfigError(f"TRL's {kind.upper()} has no setting {name!r}.{near(name, parser.options())}")
    if recipe.task is None and settings.get("model_name_or_path") is None:
        raise ConfigError(
            f"the recipe says neither on what to train nor which model. Name a task (`experiment: {{task: NAME}}`; "
            f"there are {', '.join(lab.tasks())}), or model_name_or_path and dataset_name."
        )
    parsed = arguments.parse(kind, [], settings)
    late_refusals.check(kind, parsed)

    def say(text: str) -> None:
        tell(Said(text))

    owner = ownership.owner(specs)
    if recipe.task is None:
        preflight.check(kind, parsed, specs, say)
        return parsed, None
    if owner is not None:
        job.check(specs, parsed[1])
        on_task.build_job(recipe.task, parsed, recipe.sizes, say)
        return parsed, None
    with api.enable(arm.plugins) if arm.plugins else contextlib.nullcontext():
        trainer = on_task.build_trainer(recipe.task, kind, parsed, recipe.sizes, say)
    return parsed, trl_rewards.reward_names(trainer) or None


def _values(parsed: arguments.Parsed) -> list[dict[str, Any]]:
    """Returns TRL's arguments without those that name files."""
    script, training, model, mixture = parsed
    values = [vars(script), training.to_dict(), vars(model), vars(mixture)]
    return [{k: v for k, v in group.items() if k not in ("output_dir", "logging_dir", "run_name")} for group in values]


def _options(specs: Sequence[declaration.PluginSpec], recipe: Recipe) -> list[dict[str, Any]]:
    """Returns name, version, origin and options of plugins as JSON can hold them."""
    return [
        {
            "name": spec.name,
            "version": spec.version,
            "origin": _told(spec.origin, Path(recipe.path).absolute().parent),
            "options": store.plain(spec.option_values),
        }
        for spec in specs
    ]


def _told(origin: str, folder: Path) -> str:
    """Returns where a plugin is from, a file beside the recipe without the folders of this machine."""
    file = Path(origin)
    return str(file.relative_to(folder)) if file.is_absolute() and file.is_relative_to(folder) else origin


def _sources(recipe: Recipe, settings: Iterable[Mapping[str, Any]]) -> set[Path]:
    """Returns the files whose code can change the numbers of every arm: the host's stages, the task, the rewards."""
    files = {file for name in _NUMBERS for file in _python(_HOST / name)}
    files |= set(_python(Path(trl_ext_hooks.__file__).parent))
    if recipe.task is not None:
        files |= set(_python(Path(lab.__file__).parent))
        for value in vars(lab.task(recipe.task)).values():
            for function in value if isinstance(value, tuple) else (value,):
                files |= _module_files(function) if callable(function) else set()
    for arm_settings in settings:
        for function in reward_functions.reward_functions(arm_settings.get("reward_funcs") or ()).values():
            files |= _module_files(function)
    return files


def _module_files(thing: Any) -> set[Path]:
    """Returns the file in which something is defined, or all files of its package."""
    module = inspect.getmodule(thing)
    file = getattr(module, "__file__", None)
    if file is None:  # made at run time
        return set()
    place = Path(file)
    return set(_python(place.parent if place.name == "__init__.py" else place))


def _python(place: Path) -> list[Path]:
    """Returns the Python files of a folder, or a file itself."""
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def _digest(files: Iterable[Path]) -> str:
    """Returns a hash of the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
