# mypy: disable-error-code="empty-body"
"""The hooks. A docstring here is the contract: when the hook runs, where, what it gets and what its result means.

A hook is a method of a `Plugin` under `@hookimpl` that takes any of the arguments named here. "Collective" hooks run on
every process at the same point; they must call the same collectives everywhere. Hooks that return None change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .plugin import hookspec
from .types import (
    Compute,
    Config,
    Fields,
    Generate,
    Generation,
    Job,
    Logps,
    LogpsCall,
    Loss,
    Metric,
    PairLogps,
    Pairs,
    PolicyLoss,
    Refuse,
    Requirement,
    Rewards,
    Rollout,
    Round,
    Scored,
    ScoredPairs,
    TrainerView,
    Views,
)

if TYPE_CHECKING:
    import torch


@hookspec
def configure(config: Config) -> Iterable[Requirement] | None:
    """Checks the run before the trainer is built and the model is loaded.

    Runs on every process. All plugins' answers are collected; refusals are reported together in one error. Nothing can
    be changed here: a plugin requires a value, and the user sets it.

    ```python
    class NoGroupScaling(Plugin):
        name = "no-group-scaling"
        trainers = ("grpo",)

        @hookimpl
        def configure(self, config):
            yield Require("scale_rewards", ("none",), why="the method divides by nothing")
            if config.args.num_generations < 4:
                yield Warn("fewer than 4 completions per prompt make the group mean noisy")
    ```
    """


@hookspec
def trainer_arguments() -> Mapping[str, Any] | None:
    """Gives the trainer what its caller left out: `tools`, `environment_factory` or `rollout_func`. GRPO.

    Runs on every process before `configure`, for trainers that are built with the plugin (`enable`, `extend`, the
    command line). Two givers of one argument are refused, the caller being one of them. What a trainer was built with
    stays when the plugin is switched off.

    ```python
    class Multiplication(Plugin):
        name = "multiplication"
        trainers = ("grpo",)

        @hookimpl
        def trainer_arguments(self):
            def multiply(a: int, b: int) -> int:
                \"\"\"Multiplies two numbers.

                Args:
                    a: The first number.
                    b: The second number.
                \"\"\"
                return a * b

            return {"tools": [multiply]}
    ```
    """


@hookspec
def setup(trainer: TrainerView) -> Iterable[Refuse] | None:
    """Prepares what needs the built trainer. The random state is restored afterwards.

    Runs once on every process, after construction and before the first step. What can be checked only now, such as the
    tokenizer, is refused by returning `Refuse`s as in `configure`.

    ```python
    class CountParameters(Plugin):
        name = "count-parameters"
        trainers = ("grpo", "rloo", "dpo")

        @hookimpl
        def setup(self, trainer):
            self.size = sum(p.numel() for p in trainer.unwrapped_model.parameters() if p.requires_grad)
    ```
    """


@hookspec
def teardown(trainer: TrainerView) -> None:
    """Releases what `setup` took. Runs when the plugin is switched off.

    ```python
    class Trace(Plugin):
        name = "trace"
        trainers = ("grpo",)

        @hookimpl
        def setup(self, trainer):
            self.handle = trainer.unwrapped_model.register_forward_hook(lambda module, inputs, output: None)

        @hookimpl
        def teardown(self):
            self.handle.remove()
    ```
    """


@hookspec
def select_rows(rows: list[dict[str, Any]], trainer: TrainerView) -> list[dict[str, Any]] | None:
    """Replaces the prompts of a training round, before anything is generated. Chained.

    Gets the dataset rows of all processes (N, every prompt G times in a row) and returns N rows in the same layout.
    Every process gets the same rows and has to return the same rows; each then keeps its own part. GRPO, RLOO; training
    rounds only.

    ```python
    class EasiestFirst(Plugin):
        name = "easiest-first"
        trainers = ("grpo", "rloo")
        needs = ("column:difficulty",)

        @hookimpl
        def select_rows(self, rows):
            return sorted(rows, key=lambda row: row["difficulty"])  # stable: copies of a prompt stay together
    ```
    """


@hookspec
def rollout(prompts: list[Any], generate: Generate, trainer: TrainerView) -> Generation:
    """Surrounds the generation of a round. Plugins nest in order, the first one outermost. Collective.

    `generate(prompts)` runs the next plugin and finally TRL's generation, tools included. It may be called again for
    a second pass, on every process the same number of times, and always takes and returns b rows (a group may lie on
    two processes). GRPO and RLOO.

    ```python
    class ThinkHint(Plugin):
        name = "think-hint"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts, generate):
            return generate([[*prompt, {"role": "user", "content": "Think first."}] for prompt in prompts])
    ```
    """


@hookspec
def annotate(rollout: Rollout) -> Fields | None:
    """Adds values per row after generation and before rewards, such as counted tool calls. All plugins. Collective.

    Returns {name: b values}; names must be declared in `fields`. Reward functions receive them as keyword arguments,
    later hooks in `fields`, and tensors (b, ...) also from all processes in `gathered`.

    ```python
    class CountQuestions(Plugin):
        name = "count-questions"
        trainers = ("grpo", "rloo")
        fields = ("questions",)

        @hookimpl
        def annotate(self, rollout):
            return {"questions": torch.tensor([float(str(text).count("?")) for text in rollout.completions])}
    ```
    """


@hookspec
def rewards(scored: Scored) -> Rewards | torch.Tensor | None:
    """Rewrites the rewards of all processes, before any statistic and before they are logged. Chained.

    Returns (N, F) values, or `Rewards` to add, drop or rename columns. NaN means "does not apply". Every process must
    return the same values.

    ```python
    class ClipRewards(Plugin):
        name = "clip-rewards"
        trainers = ("grpo", "rloo")

        @hookimpl
        def rewards(self, scored):
            return scored.rewards.clamp(-1, 1)
    ```
    """


@hookspec
def advantages(round: Round) -> torch.Tensor | None:
    """Computes or adjusts the advantages of a round. One estimator first, then the other plugins in order. Collective.

    A plugin that claims `estimator` computes them from `round.rewards`; the others start from `round.advantages`.
    Returns (N,) for all processes, equal on each, or (b, T) for this process's tokens (GRPO only). Both must be finite.

    ```python
    class MeanOnly(Plugin):
        name = "mean-only"
        trainers = ("grpo",)
        claims = ("estimator",)

        @hookimpl
        def advantages(self, round):
            total = (round.rewards * round.reward_weights).nansum(1)
            return ops.group_normalize(total, round.group_ids, scale=False)
    ```
    """


@hookspec
def keep_rows(round: Round) -> torch.Tensor | None:
    """Selects the rows that a training round learns from. All plugins; each must keep a row for it to stay. Collective.

    Returns (N,) booleans for the rows of all processes, equal on each. The others become as if they had never been
    sampled: their advantage and loss mask are 0, and no denominator of the loss counts them. `num_items_in_batch`
    (loss types dapo, cispo, vespo) is counted again; where the loss averages over rows (grpo, sapo, dr_grpo, luspo,
    RLOO) it is scaled by N / kept; in bnpo, which averages inside micro-batches, each micro-batch weighs as many rows
    as it keeps. So are terms per token of `loss_terms`; scalar terms are averaged as plugins do it, `loss.mask` is 0 on
    the rows left out. A `policy_loss` that is a scalar has to leave them out itself and to say so:
    `honours = ("keep_rows",)`. Later hooks of the round see what is left in `round.kept`.

    Advantages and group statistics are computed before, with all rows. Training rounds only. GRPO and RLOO.

    ```python
    class SkipSilentGroups(Plugin):
        name = "skip-silent-groups"
        trainers = ("grpo", "rloo")

        @hookimpl
        def keep_rows(self, round):
            total = (round.rewards * round.reward_weights).nansum(1)
            return ~ops.group_stats(total, round.group_ids).constant
    ```
    """


@hookspec
def batch_fields(round: Round) -> Mapping[str, torch.Tensor] | None:
    """Adds tensors (b, ...) that travel with their rows through shuffling and splitting to the loss. All plugins.

    Names must be declared in `fields`. A 0-d tensor reaches every micro-batch unchanged. Collective. GRPO and RLOO.

    ```python
    class CarryLengths(Plugin):
        name = "carry-lengths"
        trainers = ("grpo", "rloo")
        fields = ("completion_lengths",)

        @hookimpl
        def batch_fields(self, round):
            return {"completion_lengths": round.loss_mask.sum(1)}
    ```
    """


@hookspec
def hidden_positions(loss_mask: torch.Tensor) -> torch.Tensor:
    """Names the tokens for which the plugin reads hidden states, such as where a value is learned. All plugins.

    The hidden state of a token is that of the last layer one position before, from which the token is predicted. Runs
    inside every forward of the policy that scores completions: once after sampling, and in each loss. Gets `loss_mask`
    (B, T) of its rows and returns (B, T) booleans. The n states come back detached, in the order of the rows, in the
    dtype of the model, as `hidden_states[name of the plugin]` of `Round` and of `Loss`; the loss costs no forward more.

    Old log-probabilities are computed as with the need `old_logps`. Refused beside a plugin that owns the forward
    (hook `logps`), whose rows need not be those of the model. GRPO and RLOO.

    ```python
    class FirstState(Plugin):
        name = "first-state"
        trainers = ("grpo", "rloo")

        @hookimpl
        def hidden_positions(self, loss_mask):
            return (loss_mask != 0) & (loss_mask.cumsum(1) == 1)  # the first token that the loss counts

        @hookimpl
        def loss_metrics(self, loss):
            states = loss.hidden_states[self.name].float()  # (n, H)
            return {"norm": (states.norm(dim=1).sum().item(), len(states))}
    ```
    """


@hookspec
def logps(call: LogpsCall, compute: Compute) -> Logps:
    """Owns the forward that gives log-probabilities, in all three roles. One owner. All trainers; DPO from TRL 1.15.

    `compute()` is TRL's own forward. The result must carry gradients in the role `policy`, be 0 on masked tokens and
    hold entropies when they are asked for. DPO has the roles `policy` and `reference`.

    ```python
    class TimeForward(Plugin):
        name = "time-forward"
        trainers = ("grpo", "rloo")

        @hookimpl
        def logps(self, call, compute):
            start = time.perf_counter()
            result = compute()
            self.seconds = time.perf_counter() - start
            return result
    ```
    """


@hookspec
def loss_inputs(batch: Mapping[str, Any], trainer: TrainerView) -> Mapping[str, Any] | None:
    """Replaces entries of a micro-batch just before its loss. Chained.

    `batch` is a copy by TRL's names (m rows); the entries returned replace those of the same name.

    ```python
    class HalveNegatives(Plugin):
        name = "halve-negatives"
        trainers = ("grpo",)

        @hookimpl
        def loss_inputs(self, batch):
            advantages = batch["advantages"]
            return {"advantages": torch.where(advantages < 0, 0.5 * advantages, advantages)}
    ```
    """


@hookspec
def policy_loss(loss: Loss) -> PolicyLoss:
    """Replaces the policy loss of a micro-batch. One owner. GRPO and RLOO.

    Everything that TRL would add (KL term, entropy bonus, clipping, importance correction) is replaced too, so settings
    that ask for it are refused before training unless they are declared in `honours`; only a router's auxiliary loss
    stays. A loss that uses no advantages claims `no_advantages`, and their settings are refused as well. The core
    scales for accumulation.

    ```python
    class Reinforce(Plugin):
        name = "reinforce"
        trainers = ("grpo",)

        @hookimpl
        def policy_loss(self, loss):
            return PolicyLoss(-loss.advantages * loss.per_token_logps)
    ```
    """


@hookspec
def loss_terms(loss: Loss) -> Mapping[str, torch.Tensor | PolicyLoss] | None:
    """Adds named terms to the loss of a micro-batch. Summed over plugins.

    A term is a scalar that is a mean over the micro-batch, or a `PolicyLoss` with one value per token, which the core
    averages as the trainer's `loss_type` does. The core scales both for gradient accumulation, so a term counts the
    same whatever the micro-batch size, and reports each as the metric `<plugin>/<term>`. GRPO and RLOO.

    ```python
    class StayNear(Plugin):
        name = "stay-near"
        trainers = ("grpo",)

        @hookimpl
        def loss_terms(self, loss):
            drift = loss.per_token_logps - loss.old_per_token_logps
            entropy = (loss.entropies * loss.mask).sum() / loss.mask.sum().clamp(min=1)
            return {"drift": PolicyLoss(0.1 * drift**2), "entropy_floor": torch.relu(0.5 - entropy)}
    ```
    """


@hookspec
def optimizer_step(trainer: TrainerView) -> None:
    """Runs right after each step of the trainer's optimizer, for plugins that train something themselves. All plugins.

    What `loss_terms` sends a gradient to besides the model has it now, added up over the micro-batches of this process.
    Average it over processes (`trainer.reduce`), step, and clear it. Collective. All trainers.

    ```python
    class Temperature(Plugin):
        name = "temperature"
        trainers = ("grpo", "rloo")

        @hookimpl
        def setup(self, trainer):
            self.log_scale = torch.zeros((), device=trainer.device, requires_grad=True)
            self.optimizer = torch.optim.SGD([self.log_scale], lr=0.1)

        @hookimpl
        def loss_terms(self, loss):
            surprise = -(loss.per_token_logps.detach() * loss.mask).sum() / loss.mask.sum().clamp(min=1)
            return {"fit": (surprise - self.log_scale.exp()) ** 2}

        @hookimpl
        def optimizer_step(self, trainer):
            self.log_scale.grad = trainer.reduce(self.log_scale.grad) / trainer.num_processes
            self.optimizer.step()
            self.optimizer.zero_grad()

        @hookimpl
        def state_dict(self):
            return {"log_scale": self.log_scale.detach()}

        @hookimpl
        def load_state_dict(self, state):
            self.log_scale.data.copy_(state["log_scale"])
    ```
    """


@hookspec
def round_metrics(round: Round) -> Mapping[str, Metric] | None:
    """Reports values of a finished round as {name: (sum, count)}. All plugins. Collective. GRPO and RLOO.

    The core adds sums and counts over processes, and reports the ratio as `<plugin>/<name>`.

    ```python
    class ZeroShare(Plugin):
        name = "zero-share"
        trainers = ("grpo", "rloo")

        @hookimpl
        def round_metrics(self, round):
            return {"zero": ((round.advantages == 0).sum().item(), round.advantages.numel())}
    ```
    """


@hookspec
def loss_metrics(loss: Loss) -> Mapping[str, Metric] | None:
    """The same for every micro-batch. All plugins. Collective. GRPO and RLOO.

    ```python
    class MeanLogp(Plugin):
        name = "mean-logp"
        trainers = ("grpo", "rloo")

        @hookimpl
        def loss_metrics(self, loss):
            return {"logp": ((loss.per_token_logps * loss.mask).sum().item(), loss.mask.sum().item())}
    ```
    """


@hookspec
def run(job: Job) -> None:
    """Takes the whole run over: several trainings in place of one. One owner. Collective. DPO.

    `trl_ext train` calls it in place of TRL's script, `trl_ext.run` in a Python script. The trainers that `job.train`
    builds have all plugins of the run, this one included. Keep what is finished in folders (`job.produce`), so that a
    killed run can go on.

    ```python
    class TwoHalves(Plugin):
        name = "two-halves"
        trainers = ("dpo",)

        @hookimpl
        def run(self, job):
            half = len(job.data) // 2
            first = job.train(job.model, job.data.select(range(half)), "first-half")
            second = job.train(str(first), job.data.select(range(half, 2 * half)), "second-half")
            job.finish(second)
    ```
    """


@hookspec
def pair_batch(pairs: Pairs) -> Mapping[str, Any] | None:
    """Adds fields to a micro-batch of pairs, before its forwards. All plugins. DPO.

    Names must be declared in `fields`; `pair_logps` and `pair_metrics` find the values in `pairs.fields`, and the model
    never sees them. The columns that `needs` names (`column:NAME`) are in `pairs.rows`, whatever TRL drops, in training
    and in evaluation. Runs in the training process, also where worker processes load the data.
    `trl_ext_hooks.ops.align_tokens` lays one value per completion token out like the log-probabilities.

    ```python
    class Confidence(Plugin):
        name = "confidence"
        trainers = ("dpo",)
        needs = ("column:difficulty",)
        fields = ("confidence",)

        @hookimpl
        def pair_batch(self, pairs):
            hard = torch.tensor([float(row["difficulty"]) for row in pairs.rows], device=pairs.trainer.device)
            return {"confidence": 1 / (1 + hard)}

        @hookimpl
        def pair_logps(self, pairs):
            weight = pairs.fields["confidence"].repeat(2).unsqueeze(1)  # (2n, 1): the rejected rows follow the chosen
            return PairLogps(weight * pairs.per_token_logps, weight * pairs.ref_per_token_logps)
    ```
    """


@hookspec
def pair_logps(pairs: ScoredPairs) -> PairLogps | None:
    """Rewrites the log-probabilities of policy and reference, token by token. Chained. DPO from TRL 1.15.

    TRL then forms what it forms of every loss, divergence and metric from the result, so its `rewards/*` and `logps/*`
    are about rewritten values. The policy's must keep their gradient. Refused with `precompute_ref_log_probs`, which
    keeps sums only.

    ```python
    class FirstTokens(Plugin):
        name = "first-tokens"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs):
            early = pairs.mask.cumsum(1) <= 4
            return PairLogps(pairs.per_token_logps * early, pairs.ref_per_token_logps * early)
    ```
    """


@hookspec
def pair_metrics(pairs: ScoredPairs) -> Mapping[str, Metric] | None:
    """Reports values of a micro-batch of pairs as {name: (sum, count)}. All plugins. Collective. DPO from TRL 1.15.

    The log-probabilities are those of the models, detached, before any `pair_logps`.

    ```python
    class TokenMargin(Plugin):
        name = "token-margin"
        trainers = ("dpo",)

        @hookimpl
        def pair_metrics(self, pairs):
            chosen, rejected = (pairs.per_token_logps * pairs.mask).sum(1).chunk(2)
            return {"margin": ((chosen - rejected).sum().item(), len(chosen))}
    ```
    """


@hookspec
def inspect(round: Round) -> Views | None:
    """Returns spans and curves of a finished round for `trl_ext inspect`. All plugins. GRPO and RLOO.

    Called only while a run records rounds (`trl_ext train --inspect N`, `Handle.record`), on every process, after
    `round_metrics`. Tokens, masks, fields, tool results, and rewards and advantages before and after each plugin are
    recorded without it: return what only the plugin knows, for the local rows. It is not part of the method: nothing
    that it does may reach training, it runs without gradients, and the random state is restored after it.

    ```python
    class Halves(Plugin):
        name = "halves"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round):
            position = torch.arange(round.loss_mask.shape[1], device=round.loss_mask.device)
            self.first = position < round.loss_mask.sum(1, keepdim=True) / 2  # (b, T)
            return torch.where(self.first, round.token_advantages, 0.5 * round.token_advantages)

        @hookimpl
        def inspect(self, round):
            spans, curves = [], []
            for row, ids in enumerate(round.completion_ids):
                middle = int(self.first[row].sum())
                if 0 < middle < len(ids):
                    spans += [Span(row, 0, middle, "half 1", value=1.0), Span(row, middle, len(ids), "half 2", 0.5)]
                curves.append(Curve(row, "share read", range(len(ids)), [(i + 1) / len(ids) for i in range(len(ids))]))
            return Views(spans, curves)
    ```
    """


@hookspec
def state_dict() -> Mapping[str, Any] | None:
    """Returns what must survive a restart: tensors, numbers, strings, lists and dicts of them.

    Called for every checkpoint on the main process, so the state must be the same on every process.

    ```python
    class Counter(Plugin):
        name = "counter"
        trainers = ("grpo",)
        rounds = 0

        @hookimpl
        def round_metrics(self, round):
            self.rounds += round.mode == "train"
            return {"rounds": (self.rounds, 1)}

        @hookimpl
        def state_dict(self):
            return {"rounds": self.rounds}

        @hookimpl
        def load_state_dict(self, state):
            self.rounds = state["rounds"]
    ```
    """


@hookspec
def load_state_dict(state: Mapping[str, Any]) -> None:
    """Takes back what `state_dict` returned. Runs on every process when training resumes, before the first step.

    See `state_dict` for an example; a plugin implements both or neither.
    """
