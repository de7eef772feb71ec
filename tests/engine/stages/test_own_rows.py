"""Rows of a plugin's own in real trainers: discarded generations, scores, log-probabilities, and their traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

import trl_ext
from tests.conftest import tool_call
from tests.engine.stages.ranks import Ranks, RankView
from trl_ext.engine.stages.own_rows import OwnRows
from trl_ext.errors import PluginError
from trl_ext.testing import digits, metrics_of, tiny_data
from trl_ext.trl_internals import generation
from trl_ext_hooks import Plugin, UsageError, hookimpl


async def answers(completions: list[Any], answer: list[str], log_metric: Any, log_extra: Any, **kw: Any) -> list[Any]:
    log_metric("answers", float(len(completions)))
    log_extra("known", list(answer))
    return [None if text == "14" else float(len(text)) for text in answer]


class Looks(Plugin):
    """Generates and scores beside the round, and uses nothing of it. `asks` switches that off."""

    name = "looks"
    trainers = ("grpo", "rloo")
    needs = ("old_logps",)
    asks = True
    weight = "embed_tokens"

    def start(self) -> None:
        self.seen: dict[str, list[Any]] = {name: [] for name in ("greedy", "scores", "round", "logps", "result")}

    @hookimpl
    def rollout(self, prompts: Any, generate: Any, trainer: Any, context: Any) -> Any:
        assert context.num_generations == (4 if context.mode == "train" else 2) and len(context.rows) == len(prompts)
        if self.asks:
            greedy = generate(prompts[:3], greedy=True)
            generate([], greedy=True)
            self.seen["greedy"].append(greedy)
            given = (context.rows[:3], prompts[:3], greedy.completions, greedy.completion_ids)
            self.seen["scores"].append((trainer.score(*given), context.rows[:3], greedy))
            assert trainer.score([], [], [], []).shape == (0, 2)
            assert trainer.logps([], [], entropy=True).per_token_logps.shape == (0, 0)
        result = generate(prompts)
        self.seen["result"].append(result)
        return result

    @hookimpl
    def rewards(self, scored: Any) -> Any:
        return scored.rewards * 0.5  # no part of `score`

    @hookimpl
    def advantages(self, round: Any) -> None:
        if self.asks:
            given = (round.rows, round.prompts, round.completions, round.completion_ids)
            self.seen["round"].append((round.trainer.score(*given), round.rewards))
            logps = round.trainer.logps(prompts(round.batch), round.completion_ids, entropy=True)
            self.seen["logps"].append((logps, round.batch["old_per_token_logps"] * round.loss_mask, round.batch))

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        if not self.asks or loss.mode == "eval":
            return {"nothing": loss.per_token_logps.sum() * 0}
        lengths = loss.batch["completion_mask"].sum(1)
        completions = [ids[:length].tolist() for ids, length in zip(loss.batch["completion_ids"], lengths, strict=True)]
        again = loss.trainer.logps(prompts(loss.batch), completions, grad=True).per_token_logps
        wanted = loss.per_token_logps[:, : again.shape[1]] * loss.mask[:, : again.shape[1]]
        torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)
        weight = next(p for name, p in loss.trainer.unwrapped_model.named_parameters() if self.weight in name)
        gradients = [torch.autograd.grad(values.sum(), [weight], retain_graph=True)[0] for values in (again, wanted)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=0)
        assert gradients[0].abs().max() > 1e-3
        return {"nothing": again.sum() * 0}


def prompts(batch: Any) -> list[list[int]]:
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in pairs]


class Silent(Looks):
    asks = False


class Adapter(Looks):
    weight = "lora_B"


def train(build: Any, plugin: Any, cls: type[Plugin], kind: str = "grpo", *others: Any, **settings: Any) -> Any:
    common: dict[str, Any] = {"num_iterations": 2, "num_generations_eval": 2, "eval_strategy": "steps", "eval_steps": 2}
    common |= {"trainer": {"eval_dataset": tiny_data().select([3, 5])}, "rewards": [digits, answers]}
    with trl_ext.enable(plugin(cls), *others):
        trainer = build(kind, **common | settings)
        trainer.train()
        return trainer, trainer._trl_ext.plugins["looks"].seen, trainer._trl_ext.plugins


@pytest.mark.parametrize("kind", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_what_a_plugin_asks_for_leaves_no_trace(kind: str, build: Any, plugin: Any) -> None:
    stock, *_ = train(build, plugin, Silent, kind)
    trainer, seen, _ = train(build, plugin, Looks, kind)
    assert metrics_of(trainer) == metrics_of(stock)
    assert repr(dict(trainer._logs["rewards"])) == repr(dict(stock._logs["rewards"]))  # NaN is no NaN
    for name in ("prompt", "completion", "advantages"):
        assert list(trainer._logs[name]) == list(stock._logs[name]), name
    assert list(trainer._logs["extra"]["known"]) == list(stock._logs["extra"]["known"])
    for ours, theirs in zip(trainer.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert any(len(set(map(tuple, result.completion_ids))) > 1 for result in seen["result"])  # it does sample
    _greedy_is_the_likeliest(trainer, seen["greedy"][-1])
    for scores, rows, greedy in seen["scores"]:
        expected = [[d, float("nan") if row["answer"] == "14" else float(len(row["answer"]))]
                    for d, row in zip(digits(greedy.completions), rows, strict=True)]  # fmt: skip
        torch.testing.assert_close(scores, torch.tensor(expected), equal_nan=True)
    for scores, rewards in seen["round"]:
        torch.testing.assert_close(scores * 0.5, rewards, equal_nan=True)
    for logps, old, batch in seen["logps"]:
        torch.testing.assert_close(logps.per_token_logps, old[:, : logps.per_token_logps.shape[1]], atol=1e-5, rtol=0)
        assert ((logps.entropies > 0) == (batch["completion_mask"] == 1)[:, : logps.entropies.shape[1]]).all()
    # TRL's own numbers are those that are computed for mixed rounds
    trainer.model.train()  # it was left after an evaluation
    first = generation.recorded_of(trainer, seen["result"][0], list)
    for name, (value,) in first.metrics.items():
        assert trainer.state.log_history[0][name] == pytest.approx(value, rel=1e-6)
    assert trainer.state.log_history[0]["num_tokens"] == first.tokens


def _greedy_is_the_likeliest(trainer: Any, greedy: Any) -> None:
    """The last greedy pass ran in evaluation, after the last step."""
    row = max(range(3), key=lambda i: len(greedy.completion_ids[i]))
    prompt, completion = greedy.prompt_ids[row], greedy.completion_ids[row]
    with torch.no_grad():
        logits = trainer.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(1).tolist() == completion


def test_with_shared_prefix(build: Any, plugin: Any) -> None:
    """The owner of the forward computes them, and its report stays that of the trainer's own forwards."""
    shared = {"shared-prefix": {"min_gain": 0}}
    _, seen, plugins = train(build, plugin, Looks, "grpo", shared, max_steps=1, eval_strategy="no")
    ((logps, old, _),) = seen["logps"]
    torch.testing.assert_close(logps.per_token_logps, old[:, : logps.per_token_logps.shape[1]], atol=1e-5, rtol=0)
    assert len(plugins["shared-prefix"]._forwards) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_with_an_adapter_and_a_reward_model(kind: str, build: Any, plugin: Any, model: str) -> None:
    from peft import LoraConfig
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(model)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    judge = Qwen2ForSequenceClassification(Qwen2Config(num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape))
    given = {"reward_funcs": [digits, judge], "reward_processing_classes": [None, tokenizer]}
    given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    _, seen, _ = train(build, plugin, Adapter, kind, eval_strategy="no", trainer=given)
    for scores, rewards in seen["round"]:
        torch.testing.assert_close(scores * 0.5, rewards, equal_nan=True)
        assert scores[:, 1].std() > 0
    for logps, old, _ in seen["logps"]:
        torch.testing.assert_close(logps.per_token_logps, old[:, : logps.per_token_logps.shape[1]], atol=1e-5, rtol=0)


def test_tools_in_passes_of_other_sizes(build: Any, plugin: Any, play: Any, tool_model: str) -> None:
    """Every pass calls the tools of its own rows, and the metrics are those of the pass that is used."""

    def double(number: int) -> int:
        """
        Doubles a number.

        Args:
            number: The number

        Returns:
            Twice the number
        """
        made.append(number)
        return 2 * number

    class Part(Plugin):
        name = "part"
        trainers = ("grpo",)
        first: Any = None
        used: Any = None

        @hookimpl
        def rollout(self, prompts: Any, generate: Any) -> Any:
            self.first = generate(prompts[-1:] + prompts, greedy=True)
            self.used = generate(prompts)
            return self.used.replaced([0], generate(prompts[2:3])) if mixed else self.used

    made: list[int] = []
    play([[tool_call("double", number=row), f"{row}"] if row % 2 else ["."] for row in range(8)])
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"#{row}#"}]} for row in range(8)])
    common = {"model": tool_model, "max_completion_length": 200, "max_steps": 1, "data": data, "num_generations": 2}
    common |= {"rewards": [lambda completions, **kwargs: [float(len(text)) for text in completions]]}
    for mixed in (False, True):
        made.clear()
        with trl_ext.enable(plugin(Part)):
            trainer = build(trainer={"tools": [double]}, **common)
            trainer.train()
            first, used = (getattr(trainer._trl_ext.plugins["part"], name) for name in ("first", "used"))
        texts = [completion[-1]["content"] for completion in first.completions]
        asked = [text.split("#")[1] for text in trainer.processing_class.batch_decode(first.prompt_ids)]
        assert texts == [row if int(row) % 2 else "." for row in asked] and len(texts) == 9
        assert len(made) > 2 and len(trainer._sync_tool_dicts) == 8
        logged = trainer.state.log_history[0]
        calls = [sum(message["role"] == "tool" for message in completion) for completion in used.completions]
        assert logged.get("tools/call_frequency") == (None if mixed else sum(calls) / 8)


class Knows(Plugin):
    name = "knows"
    trainers = ("grpo", "rloo", "dpo")

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.trainer = trainer


def test_data_and_steps(build: Any, plugin: Any) -> None:
    def known(kind: str = "grpo", **settings: Any) -> Any:
        with trl_ext.enable(plugin(Knows)):
            trainer = build(kind, **settings)
            return trainer._trl_ext.plugins["knows"].trainer, trainer

    view, trainer = known(max_steps=-1, num_train_epochs=3, remove_unused_columns=True)
    assert view.data[3].keys() == {"prompt"} and len(view.data) == 16 and view.data is view.data
    assert view.total_steps == 24 and view.reward_names == ("digits", "brevity") and view.learning_rate == 1e-2
    trainer.train_dataset = Dataset.from_list([{"prompt": "x"}])
    assert view.data[0] == {"prompt": "x"}
    stream = IterableDataset.from_generator(lambda: iter(tiny_data()))
    view, _ = known(data=stream)
    assert view.total_steps == 2
    with pytest.raises(UsageError, match="the training data are a stream"):
        _ = view.data
    view, trainer = known("dpo", max_steps=-1)
    with pytest.raises(UsageError, match="DPO counts its steps when training begins"):
        _ = view.total_steps
    assert len(view.data) == 16
    for call in (lambda: view.score([], [], [], []), lambda: view.logps([], [])):
        with pytest.raises(UsageError, match="is for GRPO and RLOO"):
            call()


def test_wrong_arguments_stop_every_process() -> None:
    class Context:
        kind, round, trainer = "grpo", None, None

    def errors(ask: Any) -> list[Any]:
        ranks = Ranks(2)

        def work(rank: int) -> None:
            context = Context()
            context.view = RankView(ranks, rank)  # type: ignore[attr-defined]
            context.trainer = type("T", (), {"environments": None})  # type: ignore[assignment]
            ask(OwnRows(context), rank)  # type: ignore[arg-type]

        return ranks.run(work)

    row, ids = {"prompt": "a"}, [1, 2]
    cases: list[tuple[Any, str]] = [
        (
            lambda own: own.score([row], ["a"], ["b", "c"], [ids]),
            "trainer.score on process 1: it got 1 rows, 1 prompts, 2",
        ),
        (lambda own: own.score(row, "a", "b", ids), "trainer.score on process 1: `rows` is a dict, expected a list"),
        (
            lambda own: own.score([1], ["a"], ["b"], [ids]),
            "trainer.score on process 1: a row is a int, expected a dict",
        ),
        (lambda own: own.score([row, {}], ["a"] * 2, ["b"] * 2, [ids] * 2), "rows have the columns ['prompt'] and []"),
        (lambda own: own.logps([ids], [ids, ids]), "trainer.logps on process 1: it got 1 prompts and 2 completions"),
        (lambda own: own.logps([[]], [ids]), "trainer.logps on process 1: a prompt is empty"),
        (lambda own: own.logps([ids], torch.ones(1, 2)), "`completion_ids` is a Tensor, expected a list"),
        (lambda own: own.logps([[1.5]], [ids]), "`prompt_ids` holds [1.5], expected a list of token ids"),
    ]
    for ask, expected in cases:
        right = (lambda own: own.logps([], [])) if "logps" in ask.__code__.co_names else None
        found = errors(lambda own, rank, ask=ask, right=right: ask(own) if rank else (right or _score_nothing)(own))
        assert [type(error) for error in found] == [PluginError] * 2, found
        assert all(expected in str(error) for error in found), found
    found = errors(lambda own, rank: own.logps([], [], grad=bool(rank)))
    assert all("other values of `grad` or `entropy` on some processes" in str(error) for error in found)
    found = errors(lambda own, rank: own.logps([], []) if rank else _score_nothing(own))
    assert all("trainer.score is under way on process 0, and trainer.logps on process 1" in str(e) for e in found)


def _score_nothing(own: OwnRows) -> Any:
    return own.score([], [], [], [])
