"""VL-DAC as a plugin: edge cases, resuming, adapters, other sources of rewards, refusals and options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig

import trl_ext
from trl_ext import ConfigError, OptionError
from trl_ext.testing import Scripted, metrics_of, reported, tiny_data

NAN = float("nan")
SMALL = {"head_sizes": [8], "value_warmup_iterations": 0}


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[f"vl-dac/{key}"] for entry in trainer.state.log_history if f"vl-dac/{key}" in entry]


def test_no_row_has_a_step(run: Any, call: Any) -> None:
    """Every reward is NaN: a round without anything to learn from, which changes nothing."""
    trainer = run([[call("go", pay=77), "done"]] * 8, kl_beta=0.2)
    assert same(*trainer.watch.policies) and logged(trainer, "without_steps") == [1.0]
    assert "vl-dac/explained_variance" not in metrics_of(trainer)[0]


def test_one_step_in_all(run: Any, call: Any) -> None:
    trainer = run([["said"], *[[call("go", pay=77), "done"]] * 7])
    assert (trainer.watch.rounds[0].advantages == 0).all() and trainer.state.log_history[0]["loss"] == pytest.approx(
        trainer.state.log_history[0]["vl-dac/value_loss"], abs=1e-6
    )


def test_a_step_without_known_log_probabilities_is_skipped(run: Any) -> None:
    trainer = run()
    loss, method = trainer.watch.losses[0], trainer.method
    old = loss.batch["old_per_token_logps"].clone()
    step = loss.batch["vl_dac_step"]
    row = int((step.amax(1) > 0).nonzero()[0])
    old[row, int((step[row] == 1).nonzero()[0])] = NAN
    values = method.policy_loss(dataclasses.replace(loss, batch=loss.batch | {"old_per_token_logps": old})).values
    assert (values[row][step[row] == 1] == 0).all() and values.isfinite().all()
    assert (values[row][step[row] == 0] != 0).any()
    assert loss.metric_log.values[f"{loss.metric_log.plugin}/skipped_steps"] == (1, 18)


def test_a_value_that_diverged_stops_the_run(run: Any) -> None:
    trainer = run()
    loss, method = trainer.watch.losses[0], trainer.method
    with torch.no_grad():
        next(method.critic.head.parameters()).fill_(NAN)
    with pytest.raises(ValueError, match="the value loss is not finite: values"):
        method.loss_terms(loss)
    with pytest.raises(ValueError, match="values of steps are not finite"):
        method.advantages(trainer.watch.rounds[0])


def test_a_resumed_run_has_the_same_value_network_and_optimizer(run: Any) -> None:
    settings = {
        "max_steps": 4,
        "value_warmup_iterations": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "data": tiny_data(),
    }
    whole = run(**settings)
    again = run(resume=f"{whole.args.output_dir}/checkpoint-2", **settings)
    assert same(whole.watch.policies[-1], again.watch.policies[-1])
    one, other = (trainer.method.state_dict() for trainer in (whole, again))
    assert one["iterations"] == other["iterations"] == 4
    assert one["head"].keys() == other["head"].keys() and same(list(one["head"].values()), list(other["head"].values()))
    for key, state in one["optimizer"]["state"].items():
        assert same(list(state.values()), list(other["optimizer"]["state"][key].values())) and state["step"] == 4
    assert logged(again, "warming_up")[-2:] == [1.0, 0.0]


def test_a_lora_policy_with_checkpointing(run: Any) -> None:
    from peft import LoraConfig

    trainer = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    base = run(learning_rate=0.1)
    settings = {"gradient_checkpointing": True, "learning_rate": 0.1, "num_iterations": 2, "max_steps": 2}
    found = run(trainer={"environment_factory": base.environment_factories[None], **trainer}, **settings)
    torch.testing.assert_close(found.method.scored.values, base.method.scored.values, atol=1e-5, rtol=0)
    assert not same(found.watch.policies[0], found.watch.policies[-1])


def test_evaluation_counts_no_iteration(run: Any) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 8}
    trainer = run(evaluate=tiny_data().select(range(4)), value_warmup_iterations=1, **settings)
    assert trainer.method.iterations == 2
    assert [round.mode for round in trainer.watch.rounds] == ["train", "eval", "train", "eval"]
    evaluated = [entry for entry in trainer.state.log_history if "eval_vl-dac/steps" in entry]
    assert len(evaluated) == 2 and "eval_vl-dac/value_loss" in evaluated[0]


def test_a_rollout_func_tells_step_rewards(build: Any, tool_model: str) -> None:
    rows = [
        {
            "completion_ids": [40, 41, 42, 43],
            "env_mask": [1, 0, 1, 1],
            "step_rewards": [0.5, 1.0],
            "done": True,
            "score": 3.0,
        },
        {"completion_ids": [40, 41], "env_mask": [1, 1], "step_rewards": [0.0], "done": False, "score": 3.0},
    ]
    rollouts = Scripted(rows * 2)
    with trl_ext.enable({"vl-dac": SMALL}):
        trainer = build(
            model=tool_model, max_steps=1, per_device_train_batch_size=4, num_generations=2,
            rewards=[reported("score")], trainer={"rollout_func": rollouts},
        )  # fmt: skip
        trainer.train()
        found = trainer._trl_ext.plugins["vl-dac"].scored.episodes
    assert found.counts.tolist() == [2, 1, 2, 1] and found.rewards.tolist() == [[0.5, 1], [0, 0]] * 2
    short = [{**row, "step_rewards": [1.0, 1.0]} for row in rows]
    with (
        trl_ext.enable({"vl-dac": SMALL}),
        pytest.raises(ValueError, match="row 1 of the rollout_func has 2 step_rewards"),
    ):
        build(
            model=tool_model, max_steps=1, per_device_train_batch_size=4, num_generations=2,
            rewards=[reported("score")], trainer={"rollout_func": Scripted(short * 2)},
        ).train()  # fmt: skip


def test_tools_without_an_environment_are_scored_by_their_outcome(build: Any, tool_model: str) -> None:
    from trl_ext.testing import calls
    from trl_ext.tools import calculator

    with trl_ext.enable({"vl-dac": SMALL}):
        trainer = build(
            model=tool_model, max_steps=1, trainer={"tools": [calculator]}, max_completion_length=150,
            generation_kwargs=calls(tool_model, "calculator", likelihood=5.0, expression="6 * 7"),
        )  # fmt: skip
        trainer.train()
        found = trainer._trl_ext.plugins["vl-dac"].scored.episodes
    outcome = torch.tensor(list(trainer._logs["rewards"]["digits"])) + torch.tensor(
        list(trainer._logs["rewards"]["brevity"])
    )
    assert found.counts.max() > 1
    torch.testing.assert_close(
        found.rewards.sum(1), torch.where(found.counts > 0, outcome.double(), 0.0), atol=1e-6, rtol=0
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type='dapo', it is 'grpo'"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions=False"),
        ({"beta": 0.1}, "does not apply beta=0.1; set beta=0.0"),
        ({"epsilon": 0.1}, "does not apply epsilon=0.1"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 would change the policy while only the value is trained"),
        ({"scale_rewards": "none"}, "scale_rewards='group'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, build: Any, tool_model: str) -> None:
    from trl_ext.tools import calculator

    with trl_ext.enable({"vl-dac": {"head_sizes": [8]}}), pytest.raises(ConfigError, match=message):
        build(model=tool_model, trainer={"tools": [calculator]}, **settings)


@pytest.mark.skipif(not hasattr(GRPOConfig, "router_aux_loss_coef"), reason="TRL adds no router's loss without it")
def test_a_router_must_not_move_while_the_value_warms_up(build: Any, tool_model: str) -> None:
    """The trainer decides on the loss of a router. The model's `output_router_logits` is False in all cases."""
    tokenizer = AutoTokenizer.from_pretrained(tool_model)

    def trainer(**settings: Any) -> Any:
        from trl_ext.tools import calculator

        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "head_dim": 8}
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        policy = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **experts, **ids))
        policy.config._name_or_path = policy.name_or_path = tool_model
        return build(model=policy, trainer={"tools": [calculator], "processing_class": tokenizer}, **settings)

    with trl_ext.enable({"vl-dac": {"head_sizes": [8]}}):
        with pytest.raises(ConfigError, match=r"the router's auxiliary loss would .* Set router_aux_loss_coef=0\.0"):
            trainer()
        trainer(router_aux_loss_coef=0.0)
    with trl_ext.enable({"vl-dac": SMALL}):
        trainer()


def test_it_needs_something_to_act_on(build: Any) -> None:
    with trl_ext.enable("vl-dac"), pytest.raises(ConfigError, match="rollouts must be able to call tools"):
        build()


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.1},
        {"gae_lambda": -0.1},
        {"clip_eps": 0},
        {"value_coef": 0},
        {"kl_beta": -1},
        {"value_warmup_iterations": -1},
        {"ratio_guard": 1.0},
        {"head_sizes": [0]},
        {"value_lr": 0},
    ],
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        trl_ext.enable({"vl-dac": options})


@pytest.mark.parametrize("weight", [None, 0.0, 1.0])
def test_rewritten_rewards_must_reach_the_episodes(weight: float | None, build: Any, tool_model: str) -> None:
    """OTC multiplies rewards, which episodes with step rewards use only where `outcome_weight` says so."""
    from trl_ext.tools import calculator

    with trl_ext.enable({"vl-dac": {"head_sizes": [8], "outcome_weight": weight}, "otc": {"c": 4}}):
        if weight:
            build(model=tool_model, trainer={"tools": [calculator]})
            return
        with pytest.raises(ConfigError, match=r"otc rewrites rewards, which are not used .* Set vl-dac.outcome_weight"):
            build(model=tool_model, trainer={"tools": [calculator]})


def test_it_is_refused_beside_shared_prefix() -> None:
    with pytest.raises(ConfigError, match="'vl-dac' reads hidden states of the policy's forward"):
        trl_ext.enable("vl-dac", "shared-prefix")
