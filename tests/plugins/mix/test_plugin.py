"""A weighted mix of estimators: numbers by hand, outside parts, TRL as a part, state, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext.catalog import find, options
from trl_ext.catalog.builtins import BUILTINS
from trl_ext.errors import OptionError, UnknownPluginError
from trl_ext.plan.compose import compose
from trl_ext_hooks import Plugin, PluginName, Require, hookimpl

ROOT = 0.70710678  # 1 / sqrt(2): what a pair of different rewards is normalised to
REWARDS = {"one": [1.0, 0.0, 1.0, 0.0], "two": [0.0, 0.0, 0.0, 4.0]}
"""Two groups of two rows. In the first only reward one tells them apart, in the second the rewards pull apart."""
BY_HAND = {
    # sums (ROOT, -ROOT, 0, 0) of the normalised rewards, divided by their deviation sqrt((0.5 + 0.5) / 3)
    "gdpo": [1.22474487, -1.22474487, 0.0, 0.0],
    # group 1: 0.5 / ROOT; group 2: (0.5 - 2) / (ROOT + 4 * ROOT)
    "dvao": [ROOT, -ROOT, -0.42426407, 0.42426407],
    # sums of rewards (1, 0) and (1, 4), normalised
    "trl": [ROOT, -ROOT, -ROOT, ROOT],
}
TINY_EPS: dict[str, Any] = {"gdpo": {"group_eps": 1e-12, "batch_eps": 1e-12}, "dvao": {"eps": 1e-12}}
CALLS: list[str] = []


def one(prompts: list[Any], **kwargs: Any) -> list[float]:
    CALLS.append("one")
    return REWARDS["one"]


def two(prompts: list[Any], **kwargs: Any) -> list[float]:
    return REWARDS["two"]


SMALL = {"rewards": [one, two], "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 1}


def test_numbers_by_hand_metrics_and_state(train: Any, look: str, tmp_path: Any) -> None:
    CALLS.clear()
    weights = {"gdpo": 0.5, "dvao": 0.3, "trl": 0.2}
    with trl_ext.enable("mix", look, mix={"weights": weights}, **TINY_EPS):
        trainer = train(save_strategy="steps", **SMALL)
        (round,) = trainer._trl_ext.plugins["look"].rounds
        assert list(trainer._trl_ext.plugins) == ["mix", "look", "gdpo", "dvao"]
        assert trainer._trl_ext.calls["gdpo", "advantages"] == trainer._trl_ext.calls["dvao", "advantages"] == 1
    # 0.5 * 1.224745 + 0.3 * 0.707107 + 0.2 * 0.707107 = 0.965926, and 0.3 * -0.424264 + 0.2 * -0.707107 = -0.268701
    assert round.advantages.tolist() == pytest.approx([0.965926, -0.965926, -0.268701, 0.268701], abs=1e-4)
    assert list(trainer._logs["advantages"]) == pytest.approx(round.advantages.tolist())
    assert CALLS == ["one"], "rewards are made once for all parts"
    logs = trainer.state.log_history[0]
    for name, weight in weights.items():
        sizes = [abs(value) for value in BY_HAND[name]]
        assert logs[f"mix/weight/{name}"] == pytest.approx(weight)
        assert logs[f"mix/size/{name}"] == pytest.approx(sum(sizes) / 4, abs=1e-4)
        assert logs[f"mix/mean/{name}"] == pytest.approx(0.0, abs=1e-6)
    assert "gdpo/zero_std/two" in logs and "dvao/weight/two" in logs  # the metrics of the parts are there
    (file,) = tmp_path.glob("run*/checkpoint-1/trl_ext_state.pt")
    assert set(torch.load(file, weights_only=True)["plugins"]) == {"gdpo", "dvao", "mix", "look"}


def test_each_part_alone_is_what_it_is_without_the_mix(train: Any, look: str) -> None:
    for name, expected in BY_HAND.items():
        part = {} if name == "trl" else {name: TINY_EPS[name]}
        with trl_ext.enable("mix", look, mix={"weights": {name: 1.0}}, **part):
            (round,) = train(**SMALL)._trl_ext.plugins["look"].rounds
        assert round.advantages.tolist() == pytest.approx(expected, abs=2e-4), name


class Outside(Plugin):
    """An estimator of somebody else: one advantage per token, and a count that has to survive a restart."""

    name = "outside"
    trainers = ("grpo",)
    claims = ("estimator",)
    needs = ("token_advantages",)
    state = ("rounds",)

    def start(self) -> None:
        self.rounds = 0

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.rounds += 1
        assert not (round.advantages == 7).any(), "each part starts from what TRL made"
        return 7.0 * torch.ones_like(round.loss_mask, dtype=torch.float32)


def test_an_outside_part_per_token_and_its_state(train: Any, plugin: Any, look: str) -> None:
    with trl_ext.enable(plugin(Outside), "mix", look, mix={"weights": {"outside": 0.5, "trl": 2.0}}):
        trainer = train(save_strategy="steps", **SMALL)
        (round,) = trainer._trl_ext.plugins["look"].rounds
        mask = round.loss_mask
        rows = torch.tensor(BY_HAND["trl"]).unsqueeze(1)
        torch.testing.assert_close(round.advantages * mask, (3.5 + 2 * rows) * mask, atol=1e-3, rtol=0)
        folder = f"{trainer.args.output_dir}/checkpoint-1"
        trainer._trl_ext.plugins["outside"].rounds = 0
        trainer._trl_ext.load(folder)
        assert trainer._trl_ext.plugins["outside"].rounds == 1


def test_options_from_every_place() -> None:
    """A name in `weights` adds its plugin, in any spelling, unless it was asked for with options."""
    specs = compose(find.resolve({"mix": {"weights": {"gdpo": 0.7, "DVAO": "3e-1", "trl": 0}}}))
    assert [spec.name for spec in specs] == ["mix", "gdpo", "dvao"]
    assert specs[0].options.weights == {"gdpo": 0.7, "dvao": 0.3, "trl": 0.0}
    typed = options.parse_set(["mix.weights={gdpo: 0.7, dvao: 0.3}", "gdpo.batch_norm=false"])
    requests = find.merge(["mix", "gdpo"], {"dvao": {"eps": 0.5}}, typed)
    named = {spec.name: spec for spec in compose(find.resolve(requests))}
    assert set(named) == {"dvao", "gdpo", "mix"}
    assert named["gdpo"].options.batch_norm is False and named["dvao"].options.eps == 0.5
    assert options.describe(dict[PluginName, float]) == "a mapping of plugin name to float"
    assert "trl" not in BUILTINS


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"gdop": 1.0}, ["mix.weights: no plugin is called 'gdop'. Did you mean 'gdpo'"]),
        ({"gdpo": -1.0}, ["plugin 'mix': the weight of gdpo must be a number from 0 up, got -1.0"]),
        ({"gdpo": float("nan")}, ["the weight of gdpo must be a number from 0 up"]),
        ({"gdpo": 0.0}, ["one of the weights must be above 0"]),
        ({"gdpo": "much"}, ["mix.weights: expected a mapping of plugin name to float, got {'gdpo': 'much'}"]),
    ],
)
def test_wrong_weights(weights: dict[str, Any], words: list[str]) -> None:
    with refused(UnknownPluginError if "gdop" in weights else OptionError, *words):
        find.resolve({"mix": {"weights": weights}})


class Wants(Plugin):
    """An estimator that cannot do without another loss."""

    name = "wants"
    trainers = ("grpo",)
    claims = ("estimator",)

    @hookimpl
    def configure(self, config: Any) -> Any:
        yield Require("loss_type", ("bnpo",), why="it says so")

    @hookimpl
    def advantages(self, round: Any) -> None:
        return None


class Insists(Wants):
    name = "insists"

    @hookimpl
    def configure(self, config: Any) -> Any:
        yield Require("loss_type", ("grpo", "dapo"), why="it is like that")


def test_what_is_refused_before_training(build: Any, plugin: Any) -> None:
    for request, options_, words in (
        (["mix"], {}, ["mix: nothing has a weight."]),
        (["mix", "gdpo"], {"trl": 1.0}, ["mix: gdpo makes advantages and has no weight."]),
        (
            ["mix"],
            {"thinkless": 1.0},
            ["thinkless has a weight and makes no advantages of its own. These do: trl."],
        ),
        (
            ["mix", plugin(Wants), plugin(Insists)],
            {"wants": 1.0, "insists": 1.0},
            ["no loss_type suits all plugins: wants needs 'bnpo' (it says so), insists needs 'grpo' or 'dapo' (it is"],
        ),
    ):
        with trl_ext.enable(*request, mix={"weights": options_}), refused(trl_ext.ConfigError, *words):
            build()


class Wrong(Plugin):
    name = "wrong"
    trainers = ("grpo",)

    @hookimpl
    def mix_advantages(self, parts: Any) -> Any:
        return parts["trl"][:1]


def test_two_mixers_and_a_wrong_result(train: Any, plugin: Any) -> None:
    reference = plugin(Wrong)
    with refused(trl_ext.ConfigError, "both claim mix_advantages"):
        trl_ext.enable("mix", reference)
    with trl_ext.enable(reference), refused(trl_ext.PluginError, "plugin 'wrong' returned advantages (1,), expected"):
        train(**SMALL)
