"""Runs that a plugin owns: several trainings with what it does between them (the hook `run`)."""

from __future__ import annotations

import asyncio
import filecmp
import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext_hooks import Config

from ..catalog.declaration import PluginSpec, build_manager
from ..errors import ConfigError
from ..plan.check import make_plan
from ..plan.compose import Plan
from ..plan.ownership import owner, run_under_way
from ..support.console import tell
from ..support.files import write_atomically
from ..trl_internals import distribution

if TYPE_CHECKING:
    from ..trl_internals.arguments import Parsed

ROUNDS = "trl_ext_rounds.json"
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def run(
    *plugins: str | Mapping[str, Any],
    model: str,
    args: Any,
    train_dataset: Any,
    peft_config: Any = None,
    quantization_config: Any = None,
    **options: Mapping[str, Any],
) -> None:
    """Runs a plugin that owns its run, such as `apo`, with the others beside it. The result is in `args.output_dir`.

    Args:
        plugins, options: As in `enable`.
        model: A folder or a model of the hub; every training loads it anew.
        args: A `DPOConfig`; `resume_from_checkpoint=True` goes on with a run that was killed.
        train_dataset: What the plugin trains on, such as prompts.
        peft_config: The adapter that every training adds.
        quantization_config: As in DPOTrainer.

    Raises:
        ConfigError: No plugin owns the run, or something else cannot work.
    """
    from .. import api

    with api.enable(*plugins, **options) as handle:
        start(handle.specs, LocalJob(model, args, train_dataset, peft_config, quantization_config))


def start(specs: Sequence[PluginSpec], job: LocalJob) -> None:
    """Calls the owner's hook. Trainers that are built meanwhile may have its plugin.

    Raises:
        ConfigError: No plugin owns a run, or a plugin refuses the settings.
    """
    spec = owner(specs)
    if spec is None:
        raise ConfigError(
            f"none of the plugins {', '.join(s.name for s in specs)} owns a run; use trl_ext.enable and a trainer of "
            f"TRL's."
        )
    plugin = check(specs, job.args).plugins[spec.name]
    job.owner = spec.name
    try:
        with run_under_way():
            build_manager([plugin]).hook.run(job=job)
    except Exception as error:
        error.add_note(f"raised in the hook 'run' of the trl_ext plugin {spec.name!r}")
        raise


def check(specs: Sequence[PluginSpec], args: Any) -> Plan:
    """Asks the plugins about the settings before anything is loaded. The columns of the pairs are not known yet.

    Raises:
        ConfigError: A plugin refuses them, or they cannot hold for several trainings.
    """
    plan = make_plan(specs, Config("dpo", args, (), None, ()))
    spec = owner(specs)
    if spec is not None and distribution.uses_deepspeed(args):
        raise ConfigError(
            f"plugin {spec.name!r} trains several times in one process, and accelerate gives DeepSpeed to the first "
            f"training only; use DDP or FSDP"
        )
    return plan


def from_script(parsed: Parsed) -> LocalJob:
    """Makes the job that a command line asks for."""
    from ..trl_internals import arguments, dpo_runs

    found = dpo_runs.script_arguments(parsed)
    return LocalJob(found["model"], found["args"], arguments.load_data(parsed), *list(found.values())[2:])


class LocalJob:
    """The `Job` of one process."""

    def __init__(self, model: str, args: Any, data: Any, peft_config: Any, quantization_config: Any) -> None:
        from accelerate import PartialState

        self.model = model
        self.args = args
        self.data = data
        self.peft_config = peft_config
        self.folder = Path(args.output_dir).resolve()
        self.resume = bool(args.resume_from_checkpoint)
        self.owner = ""
        self.history: list[dict[str, float]] = []
        self.listeners: list[Callable[[int, int], None]] = []
        self._objects = {"peft_config": peft_config, "quantization_config": quantization_config}
        self._device = args.device  # the first look at it starts the process group
        self._state = PartialState()

    @property
    def quantized(self) -> bool:
        return self._objects["quantization_config"] is not None

    @property
    def is_main(self) -> bool:
        return bool(self._state.is_main_process)

    @property
    def num_processes(self) -> int:
        return int(self._state.num_processes)

    @property
    def process_index(self) -> int:
        return int(self._state.process_index)

    def wait(self) -> None:
        self._state.wait_for_everyone()

    def tell(self, message: str) -> None:
        if self.is_main:
            tell(f"trl_ext: {message}")

    def log(self, metrics: Mapping[str, float], *, step: int, steps: int) -> None:
        self.history.append({f"{self.owner}/{name}": float(value) for name, value in metrics.items()} | {"step": step})
        if self.is_main:
            self.write(self.folder / ROUNDS, json.dumps(self.history, indent=1) + "\n")
        for listener in self.listeners:
            listener(step, steps)

    def produce(self, name: str, make: Callable[[Path], None], *, everywhere: bool = False) -> Path:
        target = self.folder / name
        if self._decided(target.exists()):
            return target
        unfinished = target.with_name(f"{target.name}.part")
        if self.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.wait()
        if self.is_main or everywhere:
            make(unfinished)
        self.wait()
        if self.is_main:
            unfinished.rename(target)
        self.wait()
        return target

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)

    def sampler(
        self, model: str, *, num: int, temperature: float, top_p: float, max_tokens: int
    ) -> Callable[[list[Any], int], list[list[Any]]]:
        from ..trl_internals import dpo_runs
        from .sampling import sampler

        adapter = dpo_runs.is_adapter(model)
        return sampler(
            dpo_runs.open_model(model, self.args)
            if adapter
            else dpo_runs.load(model, self.args, **self._quantization()),
            self._tokenizer(),
            self._device,
            num=num,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
        )

    def rewards(
        self, functions: Sequence[str], weights: Sequence[float] | None = None
    ) -> Callable[[list[dict[str, Any]], list[Any]], list[float]]:
        import trl.rewards

        from ..support.reward_functions import check_result, infinite_rewards, reward_functions

        unknown = [name for name in functions if "." not in name and name not in _TRL_REWARDS]
        if unknown:
            raise ConfigError(
                f"reward function {unknown[0]!r} is neither a path such as my_rewards.correct nor one of TRL's: "
                f"{', '.join(_TRL_REWARDS)}."
            )
        found = {name: getattr(trl.rewards, name) for name in functions if "." not in name}
        found |= reward_functions(functions)
        scales = [1.0] * len(functions) if weights is None else list(weights)
        tokenizer = self._tokenizer()
        loop = asyncio.Runner()  # one for all calls, since judges are bound to the loop of the first

        def score(rows: list[dict[str, Any]], completions: list[Any]) -> list[float]:
            totals = [math.nan] * len(rows)
            texts = [c if isinstance(c, str) else "".join(str(m["content"]) for m in c) for c in completions]
            given: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
            given |= {"prompts": [row["prompt"] for row in rows], "completions": completions}
            given["completion_ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            for name, scale in zip(functions, scales, strict=True):
                result = found[name](**given)
                if asyncio.iscoroutine(result):
                    result = loop.run(result)
                values = check_result(name, result, len(rows))
                complaint = infinite_rewards(f"reward function {name!r}", values)
                if complaint:
                    raise ConfigError(complaint)
                for i, value in enumerate(values):
                    if value is not None and not math.isnan(value):
                        totals[i] = scale * value + (0.0 if math.isnan(totals[i]) else totals[i])
            return totals

        return score

    def train(self, model: str, data: Any, name: str, **settings: Any) -> Path:
        from ..engine.checkpoint import STATE_FILE
        from ..trl_internals import dpo_runs

        def make(folder: Path) -> None:
            output = self.folder / f"{name}-checkpoints"
            trainer = dpo_runs.trainer(str(model), self.args, data, output, settings, **self._objects)
            checkpoint = [dpo_runs.last_checkpoint(output, STATE_FILE) if self.is_main else None]
            checkpoint = self._shared(checkpoint)
            dpo_runs.train(trainer, checkpoint[0])
            trainer.save_model(str(folder))
            trainer.accelerator.free_memory()
            del trainer
            gc.collect()

        return self.produce(name, make, everywhere=True)

    def open(self, model: str | Path) -> Any:
        from ..trl_internals import dpo_runs

        return dpo_runs.open_model(model, self.args)

    def save(self, model: Any, folder: Path, *, like: str | Path) -> None:
        from transformers import AutoConfig

        from ..trl_internals import dpo_runs

        if dpo_runs.is_adapter(like):
            from peft import PeftConfig

            base = PeftConfig.from_pretrained(str(like)).base_model_name_or_path
            dtype = AutoConfig.from_pretrained(base, trust_remote_code=self.args.trust_remote_code).dtype
            model = model.to(dtype) if dtype is not None else model
        model.save_pretrained(folder)
        self._tokenizer().save_pretrained(folder)

    def finish(self, model: str | Path) -> None:
        from ..trl_internals import dpo_runs

        source = Path(model)
        if dpo_runs.is_adapter(model):
            source = self.produce("merged", lambda folder: self.save(self.open(model), folder, like=model))
        if self.is_main:
            for file in sorted(source.iterdir()):
                if (self.folder / file.name).exists() and filecmp.cmp(file, self.folder / file.name, shallow=False):
                    continue
                unfinished = self.folder / f"{file.name}.part"
                shutil.copy2(file, unfinished)
                unfinished.rename(self.folder / file.name)
        self.wait()

    def _decided(self, value: bool) -> bool:
        return bool(self._shared([value])[0])

    def _shared(self, values: list[Any]) -> list[Any]:
        """Returns the main process's values on every process. Collective."""
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(values, from_process=0)
        return values

    def _quantization(self) -> dict[str, Any]:
        found = self._objects["quantization_config"]
        return {} if found is None else {"quantization_config": found}

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self.model,
            revision=(self.args.model_init_kwargs or {}).get("revision"),
            trust_remote_code=self.args.trust_remote_code,
        )
