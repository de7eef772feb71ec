"""What a recipe may say, and that every mistake in it is told with the way out, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext.compare import recipe as recipes
from trl_ext.compare.measures import Measure
from trl_ext.compare.recipe import Arm, Expectation
from trl_ext.errors import ConfigError, OptionError

FULL = """
learning_rate: 1.0e-3
plugins:
  gdpo: {group_eps: 0.5}
experiment:
  about: what it is
  claim: a claim
  paper: a figure
  task: loud-quiet
  trainer: grpo
  train_size: 100
  test_size: 10
  seeds: [3, 5, 8]
  seconds_per_run: 12.5
  arms:
    plain:
    gdpo: {plugins: [gdpo]}
    raw: {plugins: {gdpo: {batch_norm: false}}, settings: {learning_rate: 2.0e-3}}
    trl: {settings: {multi_objective_aggregation: normalize_then_sum}}
  metrics:
    - name: rewards/quiet/mean
      reduce: {steps_to: 0.9, window: 10}
      expect:
        - {arm: gdpo, is: better, against: plain, by: 0.5, apart: true}
        - {arm: gdpo, is: identical, against: trl, within: 1.0e-3}
    - name: completions/mean_length
      better: lower
      expect: {arm: raw, is: not worse, against: gdpo, within: 0.2}
"""


def test_a_full_recipe(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    file.write_text(FULL)
    found = recipes.read(str(file))
    assert (found.name, found.claim, found.paper, found.task) == ("full", "a claim", "a figure", "loud-quiet")
    assert (found.trainer, found.sizes, found.seeds) == ("grpo", {"train_size": 100, "test_size": 10}, (3, 5, 8))
    assert found.settings == {"learning_rate": 1e-3} and (found.about, found.seconds_per_run) == ("what it is", 12.5)
    assert found.arms == {
        "plain": Arm(),
        "gdpo": Arm(plugins={"gdpo": {"group_eps": 0.5}}),
        "raw": Arm(plugins={"gdpo": {"group_eps": 0.5, "batch_norm": False}}, settings={"learning_rate": 2e-3}),
        "trl": Arm(settings={"multi_objective_aggregation": "normalize_then_sum"}),
    }
    quiet, length = found.metrics
    assert (quiet.name, quiet.measure, quiet.better) == ("rewards/quiet/mean", Measure("steps_to", 0.9, 10), "lower")
    assert quiet.expect == [
        Expectation(arm="gdpo", claim="better", against="plain", by=0.5, apart=True),
        Expectation(arm="gdpo", claim="identical", against="trl", within=1e-3),
    ]
    assert (length.name, length.measure, length.better) == ("completions/mean_length", Measure("final"), "lower")
    assert length.expect == [Expectation(arm="raw", claim="not worse", against="gdpo", within=0.2)]


def test_a_file_of_trl_with_plugins_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("plugins: {gdpo: {}, path/to/my_method.py: {}, package.module:Mine: {}}\n")
    found = recipes.read(str(file))
    assert list(found.arms) == ["plain", "gdpo+my_method+Mine"]
    assert list(found.arms["gdpo+my_method+Mine"].plugins) == ["gdpo", "path/to/my_method.py", "package.module:Mine"]
    assert found.seeds == (1, 2, 3, 4, 5) and found.metrics == () and found.task is None


def test_seeds_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("plugins: {gdpo: {}}\nexperiment: {seeds: 3}\n")
    found = recipes.read(str(file))
    assert found.with_seeds(None).seeds == (1, 2, 3) and found.with_seeds(2).seeds == (1, 2)
    assert found.with_seeds(5).seeds == (1, 2, 3, 4, 5)
    file.write_text("plugins: {gdpo: {}}\nexperiment: {seeds: [4, 9]}\n")
    with pytest.raises(ConfigError, match="--seeds 3: the recipe lists 2 seeds"):
        recipes.read(str(file)).with_seeds(3)


EXPECT = {"arm": "gdpo", "is": "better", "against": "plain"}


def metric(**changes: Any) -> dict[str, Any]:
    return {"metrics": [{"name": "reward"} | changes]}


def expecting(**changes: Any) -> dict[str, Any]:
    return metric(expect={k: v for k, v in (EXPECT | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ("fast", ["experiment: expected a mapping, got 'fast'"]),
        ({"tsk": "modes"}, ["experiment: there is no key 'tsk'", "Did you mean 'task'?"]),
        ({"task": 3}, ["experiment.task: expected text, got 3"]),
        ({"trainer": "gpro"}, ["experiment.trainer: 'gpro' is none of the choices", "Did you mean 'grpo'?"]),
        ({"train_size": 0}, ["experiment.train_size: expected a number of at least 1, got 0"]),
        ({"seeds": 0}, ["experiment.seeds: expected a number of seeds or a list of them, got 0"]),
        ({"seeds": []}, ["experiment.seeds", "got []"]),
        ({"seeds": [1, "two"]}, ["experiment.seeds", "'two'"]),
        ({"seeds": True}, ["experiment.seeds", "got True"]),
        ({"seeds": [1, 1]}, ["a seed is listed twice"]),
        ({"arms": {"plain": None}}, ["a comparison needs two arms, got plain"]),
        ({"arms": ["plain"]}, ["experiment.arms: expected a mapping"]),
        ({"arms": {"a b": None, "c": None}}, ["experiment.arms: 'a b' cannot name an arm: a name of letters"]),
        (
            {"arms": {"a": {"plugin": ["gdpo"]}, "b": None}},
            ["experiment.arms.a: there is no key 'plugin'", "'plugins'"],
        ),
        ({"arms": {"a": {"plugins": "gdpo"}, "b": None}}, ["experiment.arms.a.plugins", "Write [gdpo]"]),
        ({"arms": {"a": {"plugins": {"gdpo": 3}}, "b": None}}, ["options of plugin 'gdpo' must be a mapping, got 3"]),
        ({"metrics": []}, ["experiment.metrics: expected a list such as"]),
        ({"metrics": [{"reduce": "final"}]}, ["experiment.metrics[0]: `name` is missing"]),
        ({"metrics": [{"name": "a"}, {"name": "a"}]}, ["'a: final' is listed twice"]),
        (metric(beter="higher"), ["experiment.metrics[0]: there is no key 'beter'", "Did you mean 'better'?"]),
        (metric(better="more"), ["experiment.metrics[0].better: 'more' is none of the choices"]),
        (metric(reduce="last"), ["experiment.metrics[0].reduce: 'last' is none of the choices", "final"]),
        (metric(reduce="steps_to"), ["steps_to needs a level, as in {steps_to: 0.9}"]),
        (metric(reduce={"steps_to": "high"}), ["reduce.steps_to: expected a number or the name of an arm, got 'high'"]),
        (metric(reduce={"step_to": 1}), ["reduce: there is no key 'step_to'", "Did you mean 'steps_to'"]),
        (metric(reduce={"mean": 3}), ["reduce.mean: expected no value, got 3"]),
        (metric(reduce={"mean": None, "window": 3}), ["reduce: mean takes no window"]),
        (metric(reduce={"max": None, "min": None}), ["expected one of final, mean", "got max and min"]),
        (metric(reduce={"window": 3}), ["expected one of final, mean", "got none"]),
        (metric(reduce={"steps_to": True}), ["reduce.steps_to: expected a number or the name of an arm, got True"]),
        (metric(reduce={"final": True}), ["reduce.final: expected a whole number, got True"]),
        (metric(expect=3), ["metrics[0].expect: expected a list, got 3"]),
        (metric(reduce={"final": 0}), ["reduce.final: expected a number of at least 1, got 0"]),
        (expecting(against=None), ["`against` is missing, as in {arm: gdpo"]),
        (
            expecting(claim="better"),
            ["expect[0]: there is no key 'claim'", "Known: against, apart, arm, by, is, met, reason, within"],
        ),
        (expecting(arm="gdop"), ["expect[0].arm: 'gdop' is none of the choices", "Did you mean 'gdpo'?"]),
        (expecting(against="gdpo"), ["'gdpo' is compared with itself"]),
        (expecting(**{"is": "beter"}), ["expect[0].is: 'beter' is none of the choices", "Did you mean 'better'?"]),
        (expecting(met=False), ["expect[0]: `met: false` needs a `reason`"]),
        (expecting(met=False, reason=" "), ["expect[0]: `met: false` needs a `reason`"]),
        (expecting(reason="noisy"), ["expect[0]: `reason` goes with `met: false`"]),
        (expecting(met="no"), ["expect[0].met: expected true or false, got 'no'"]),
        (expecting(within=0.1), ["expect[0]: `within` does not go with `is: better`, which takes by and apart"]),
        (expecting(by=-0.1), ["expect[0].by: expected a share of change such as 0.5 for half, got -0.1"]),
        (expecting(by="half"), ["expect[0].by: expected a number, got 'half'"]),
        (expecting(apart="yes please"), ["expect[0].apart: expected true or false, got 'yes please'"]),
        (expecting(**{"is": "not worse"}), ["`is: not worse` needs a margin"]),
        (expecting(**{"is": "not worse", "within": -1}), ["expect[0].within: expected a number of at least 0"]),
        (expecting(**{"is": "identical", "by": 0.1}), ["expect[0]: `by` does not go with `is: identical`"]),
    ],
    ids=str,
)
def test_mistakes_in_the_experiment(experiment: Any, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({"plugins": {"gdpo": {}}, "experiment": experiment}))
    with pytest.raises((ConfigError, OptionError)) as caught:
        recipes.read(str(file))
    text = str(caught.value)
    assert text.startswith(f"{file}: ") and all(word in text for word in words), text


def test_every_mistake_is_told_on_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    experiment = {"task": 3, "seeds": 0, "metrics": [{"name": "a", "reduce": "last"}]}
    file.write_text(yaml.safe_dump({"plugins": {"gdpo": {}}, "experiment": experiment}))
    with pytest.raises(ConfigError) as caught:
        recipes.read(str(file))
    assert [line.partition(": ")[2].partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "experiment.task",
        "experiment.seeds",
        "experiment.metrics[0].reduce",
    ]


def test_numbers_as_yaml_reads_them_and_names_of_arms(tmp_path: Path) -> None:
    """YAML reads `1e-3` as text, and it is a number all the same."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "plugins: {gdpo: {}}\nexperiment:\n  metrics:\n"
        "  - {name: a, reduce: {steps_to: 1e-3}, expect: {arm: gdpo, is: not worse, against: plain, within: 2e-3}}\n"
        "  - {name: b, reduce: {steps_down_to: plain, window: 2}}\n"
    )
    one, two = recipes.read(str(file)).metrics
    assert one.measure == Measure("steps_to", 1e-3) and one.expect[0].within == 2e-3
    assert two.measure == Measure("steps_down_to", None, 2, "plain") and two.better == "lower"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1.0e-3\n", ["there is nothing to compare", "plugins", "arms"]),
        ("plugins: gdpo\n", ["`plugins:` must be a mapping"]),
        ("- a\n", ["must hold a mapping of settings"]),
        ("a: [\n", ["is not valid YAML"]),
        ("plugins: {gdpo: {}}\npush_to_hub: true\n", ["leave out `push_to_hub`"]),
        ("plugins: {gdpo: {}}\nresume_from_checkpoint: true\n", ["leave out `resume_from_checkpoint`"]),
    ],
)
def test_mistakes_in_the_file(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises((ConfigError, OptionError)) as caught:
        recipes.read(str(file))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "--config" not in str(caught.value)


def test_a_file_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"^none.yaml: No such file"):
        recipes.read("none.yaml")
