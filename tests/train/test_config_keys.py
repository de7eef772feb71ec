"""Keys and values of the YAML file, told as those of the file."""

from __future__ import annotations

import pytest
import yaml

from trl_ext import ConfigError
from trl_ext.catalog import find
from trl_ext.train import config_keys

from ..refusals import refused


def check(text: str, kind: str = "grpo", plugins: tuple[str, ...] = ("gdpo",)) -> None:
    specs = find.resolve(dict.fromkeys(plugins))
    config_keys.check("run.yaml", kind, yaml.safe_load(text), ["plugins", "experiment", "env", "inspect"], specs)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plugin: {gdpo: {}}", "there is no key 'plugin'. Did you mean 'plugins'?"),
        ("learning_rat: 1", "there is no key 'learning_rat'. Did you mean 'learning_rate'?"),
        ("learning-rate: 1", "Did you mean 'learning_rate'?"),
        ("num_procesess: 2", "Did you mean 'num_processes' or"),
        ("gdpo: {}", "there is no key 'gdpo'. It is a plugin: put it under `plugins:`, as in `plugins: {gdpo: {}}`."),
        ("group_eps: 1", "It is an option of the plugin gdpo: `plugins: {gdpo: {group_eps: VALUE}}`."),
        ("module: x", "there is no key 'module'"),
        ("learning_rate: [1]", "learning_rate: expected float, got [1]."),
        ("learning_rate: fast", "learning_rate: expected float, got 'fast'."),
        ("learning_rate:", "learning_rate: expected float, got None."),
        ("learning_rate: true", "learning_rate: expected float, got True."),
        ("num_generations: 4.5", "num_generations: expected int or null, got 4.5."),
        ("use_peft: yes please", "use_peft: expected bool, got 'yes please'."),
        (
            "reward_funcs: accuracy_reward",
            "reward_funcs: expected a list, got 'accuracy_reward'. Write [accuracy_reward].",
        ),
        (
            "save_strategy: no",
            'save_strategy: YAML reads a bare no as false. Put quotes around it: save_strategy: "no"',
        ),
        ("save_strategy: setps", "'setps' is none of the choices. Did you mean 'steps'?"),
        ("dtype: bf16", "dtype: 'bf16' is none of the choices. Did you mean 'bfloat16'?"),
        ("datasets: [{pat: a}]", "datasets: entry 1: there is no key 'pat'. Did you mean 'path'?"),
        ("datasets: a", "datasets: expected a list of mappings, got 'a'."),
        ("reward_weights: 1.0", "reward_weights: expected a list of float or null, got 1.0."),
    ],
)
def test_refused(text: str, words: str) -> None:
    with refused(ConfigError, "run.yaml: ", words):
        check(text)


def test_accepted() -> None:
    check(
        "learning_rate: 1e-6\nnum_generations: 4.0\nuse_peft: 'yes'\nlora_target_modules: all-linear\nreport_to: none\n"
        "model_init_kwargs: {dtype: bfloat16}\ndatasets: [{path: a, split: train}]\naccelerate_config: zero2\n"
        "num_processes: 2\ncpu: true\nfsdp: true\nbf16:\nscale_rewards: false\nsave_strategy: 'no'\noptim: sgd\n"
        "reward_weights: [1, 0.5]\nlr_scheduler_kwargs: {num_cycles: 1}\nreward_funcs: [a.b]\n"
    )
    check("loss_type: sigmoid\nbeta: 1", "dpo", ("tgdpo",))
