"""VL-DAC as a plugin: its options and hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext_hooks import (
    Config,
    Curve,
    Loss,
    Need,
    Plugin,
    PolicyLoss,
    Recommend,
    Refuse,
    Require,
    Requirement,
    Round,
    Span,
    TrainerView,
    UsageError,
    Views,
    Warn,
    hookimpl,
    option,
)

from .critic import Critic, ValueHead
from .episodes import Episodes, cut_short, episodes, reported
from .maths import (
    any_in_step,
    clipped_surrogate,
    explained_variance,
    first_tokens,
    gae,
    kl_to_reference,
    normalize,
    step_mean_weights,
    token_counts,
    value_loss,
)

DIVERGED = "The value network or the policy has diverged: lower vl-dac.value_lr or learning_rate."


@dataclass(frozen=True)
class Scored:
    """A round with step values, (b, K) float64, 0 where no step is: V, R, A, and A normalised."""

    episodes: Episodes
    values: torch.Tensor
    returns: torch.Tensor
    raw: torch.Tensor
    normal: torch.Tensor


class VLDAC(Plugin):
    """VL-DAC for GRPOTrainer with environments, tools or a rollout function."""

    name = "vl-dac"
    paper = "arXiv 2508.04280"
    bibtex = """@misc{vldac2025,
      title = {{Enhancing Vision-Language Model Training with Reinforcement Learning in Synthetic Worlds for Real-
        World Success}},
      eprint = {2508.04280},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "actor-critic for environments: PPO on action tokens, a value per environment step"
    trainers = ("grpo",)
    needs = ("tools", "turns", "old_logps")
    claims = ("estimator",)
    fields = ("vl_dac_step", "vl_dac_weight", "vl_dac_value", "vl_dac_return")
    honours = ("loss_type", "vllm_importance_sampling_correction")

    @dataclass(frozen=True)
    class Options:
        """Options of VL-DAC. Its clipping and KL factor are these, not the trainer's `epsilon` and `beta`."""

        gamma: float = option(
            0.99,
            ge=0,
            le=1,
            help="discount per environment step",
            source="paper, table 6 (MiniWorld); EZPoints 1, ALFWorld .9 to 1",
        )
        gae_lambda: float = option(0.95, ge=0, le=1, help="lambda of GAE", source="paper, table 6; configs")
        clip_eps: float = option(
            0.1, gt=0, help="clipping of the ratio, and of the value's change", source="authors' configs"
        )
        value_coef: float = option(0.15, gt=0, help="factor of the value loss", source="paper, table 6; configs .5")
        kl_beta: float = option(
            0.05,
            ge=0,
            help="factor of the KL term to the frozen start; 0 = off, without a reference",
            source="paper, table 6",
        )
        value_warmup_iterations: int = option(
            2, ge=0, help="rounds that train the value alone and leave the policy as it is", source="paper"
        )
        value_lr: float = option(
            1e-3,
            gt=0,
            help="learning rate of the value network; useful: 1e-4 to 1e-3",
            source="ours; paper: one optimizer, 5e-5",
        )
        head_sizes: tuple[int, ...] = option(
            (3072, 2048), help="inner layers of the value network", source="paper, code"
        )
        value_clip: bool = option(
            True, help="clip the value's change, as the ratio's", source="authors' code; not in paper"
        )
        ratio_guard: float | None = option(
            10.0, help="steps with a larger ratio use the clipped term alone; null = off", source="authors' code"
        )
        time_limits: bool = option(
            True,
            help="a step ended by a limit has no advantage, and its value stands for what follows",
            source="configs",
        )
        outcome_weight: float | None = option(
            None,
            help="adds the reward functions to an episode's last step; default: only where nobody tells step rewards",
        )

        def __post_init__(self) -> None:
            if self.ratio_guard is not None and self.ratio_guard <= 1 + self.clip_eps:
                raise ValueError("ratio_guard must be greater than 1 + clip_eps, or null")
            if any(size < 1 for size in self.head_sizes):
                raise ValueError("head_sizes must be at least 1")

    options: Options

    def start(self) -> None:
        self.iterations = 0  # training rounds so far, the current one included
        self.critic: Critic  # from `setup` on
        self.scored: Scored  # of the last round
        self._gradient = 0.0

    # --- life ---

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options, args = self.options, config.args
        if options.kl_beta:
            yield Need("ref_logps")
        yield Require(
            "loss_type", ("dapo",), why="the mean over steps is made from the mean over all tokens of a round"
        )
        yield Require(
            "mask_truncated_completions",
            (False,),
            why="an episode that a limit cuts still has steps to learn from, the last one included",
        )
        yield Require(
            "fp16", (False,), why="its loss scale would multiply the gradients of the value network; use bf16"
        )
        yield Require("scale_rewards", ("group",), why="advantages come from the value network, not from groups")
        yield Require(
            "multi_objective_aggregation", ("sum_then_normalize",), why="advantages come from the value network"
        )
        if options.value_warmup_iterations and args.weight_decay:
            yield Refuse(
                f"weight_decay={args.weight_decay} would change the policy while only the value is trained.",
                "Set weight_decay=0, or vl-dac.value_warmup_iterations=0.",
            )
        for name, neutral in (("top_p", 1.0), ("min_p", None), ("top_k", 0)):
            if getattr(args, name, neutral) not in (neutral, None, -1):
                yield Warn(
                    f"{name}={getattr(args, name)} cuts the distribution that tokens are drawn from, and "
                    f"log-probabilities are those of the whole one"
                )
        if config.rewriters and not options.outcome_weight:
            yield Refuse(
                f"{', '.join(config.rewriters)} rewrites rewards, which are not used where the environment tells "
                f"rewards step by step.",
                "Set vl-dac.outcome_weight, such as 1.0, to add them to the last step of an episode.",
            )
        yield Recommend("num_iterations", 2, "paper, table 6: PPO epochs")

    @hookimpl
    def setup(self, trainer: TrainerView) -> list[Refuse]:
        config = trainer.unwrapped_model.config.get_text_config()
        head = ValueHead(config.hidden_size, self.options.head_sizes, trainer.args.seed)
        self.critic = Critic(head, self.options.value_lr, trainer.device)
        if self.options.value_warmup_iterations and trainer.has_router_loss:
            return [
                Refuse(
                    "the router's auxiliary loss would change the policy while only the value is trained.",
                    "Set router_aux_loss_coef=0.0, or vl-dac.value_warmup_iterations=0.",
                )
            ]
        return []

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"iterations": self.iterations, **self.critic.state_dict()}

    @hookimpl
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iterations = int(state["iterations"])
        self.critic.load_state_dict(state)

    def _warms_up(self, mode: str) -> bool:
        return mode == "train" and self.iterations <= self.options.value_warmup_iterations

    # --- a round ---

    @hookimpl
    def hidden_positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        return first_tokens(loss_mask)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options, mask = self.options, round.loss_mask
        self.iterations += round.mode == "train"
        turns = reported(round.rows, mask) if round.turns is None else round.turns
        cut = torch.tensor(cut_short(round.completions), device=mask.device)
        steps = episodes(mask, turns, cut, round.total_reward[round.local], options.outcome_weight)
        with torch.no_grad():
            at_starts = self.critic.values_at(first_tokens(mask), round.hidden_states[self.name]).double()
        values = steps.of_steps(at_starts)
        self._check(values, round)
        raw, returns = gae(
            steps.rewards,
            values,
            steps.last,
            steps.last & steps.truncated.unsqueeze(1),
            torch.zeros(len(values), dtype=torch.float64, device=values.device),  # every row ends with its last step
            gamma=options.gamma,
            gae_lambda=options.gae_lambda,
            time_limits=options.time_limits,
        )
        normal = torch.zeros_like(raw)
        normal[steps.exists] = normalize(raw[steps.exists], round.trainer.reduce)
        self.scored = Scored(steps, values, returns, raw, normal)
        self._log_round(round)
        return steps.on_tokens(normal).to(round.advantages.dtype)

    def _check(self, values: torch.Tensor, round: Round) -> None:
        """Stops every process where a value is no number."""
        bad = ~torch.isfinite(values).all(dim=1)
        if int(round.trainer.reduce(bad.long().sum())):
            rows = [round.rows[row] for row in bad.nonzero().flatten().tolist()]
            place = f"here: {rows[0]}" if rows else "on another process"
            raise UsageError(f"values of steps are not finite ({place}). {DIVERGED}")

    def _log_round(self, round: Round) -> None:
        """Logs how well V explains the returns, and means over steps and over the episodes of this process."""
        scored, steps = self.scored, self.scored.episodes
        values, returns = scored.values[steps.exists], scored.returns[steps.exists]
        round.log("explained_variance", explained_variance(returns, values, round.trainer.reduce))
        round.log("steps", steps.counts)
        round.log("truncated", (steps.truncated & (steps.counts > 0)).double())
        round.log("without_steps", (steps.counts == 0).double())
        round.log("unscored", steps.unscored.double())
        round.log("dropped_turns", steps.dropped)
        round.log("value", values)
        round.log("return", returns)
        round.log("advantage_raw", scored.raw[steps.exists].abs())
        round.log("value_gradient", self._gradient)
        if round.mode == "train":
            round.log("iterations", self.iterations)
            round.log("warming_up", float(self._warms_up(round.mode)))

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """Returns what the loss needs of each step, on its tokens. Rows that other plugins leave out have no steps."""
        scored, steps = self.scored, self.scored.episodes
        step = torch.where(round.kept.unsqueeze(1), steps.step, -1)
        number = round.trainer.reduce(first_tokens(step >= 0).sum())
        return {
            "vl_dac_step": step,
            "vl_dac_weight": step_mean_weights(step, round.batch["num_items_in_batch"], number).float(),
            "vl_dac_value": steps.on_tokens(scored.values).float(),
            "vl_dac_return": steps.on_tokens(scored.returns).float(),
        }

    # --- a micro-batch ---

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        options, batch, old = self.options, loss.batch, loss.old_per_token_logps
        if self._warms_up(loss.mode):
            return PolicyLoss(0.0 * loss.per_token_logps)  # every parameter keeps its path, and a gradient of 0
        reference = batch["ref_per_token_logps"] if options.kl_beta else old
        # A step with a log-probability that is no number is left out as a whole.
        unknown = ~(torch.isfinite(loss.per_token_logps) & torch.isfinite(old) & torch.isfinite(reference))
        step = batch["vl_dac_step"]
        usable = (step >= 0) & ~any_in_step(unknown, step)
        logps, old, reference = (torch.where(usable, x, 0.0) for x in (loss.per_token_logps, old, reference))
        surrogate = clipped_surrogate(logps - old, loss.advantages, step, options.clip_eps, options.ratio_guard)
        if loss.sampling_ratio is not None:
            surrogate = surrogate * loss.sampling_ratio
        divergence = kl_to_reference(logps, reference)
        self._log_update(loss, (logps - old).detach().exp(), divergence.detach(), usable)
        weight = torch.where(usable, batch["vl_dac_weight"], 0.0)
        return PolicyLoss(weight * (surrogate + options.kl_beta * divergence))

    def _log_update(self, loss: Loss, ratio: torch.Tensor, divergence: torch.Tensor, usable: torch.Tensor) -> None:
        """Logs the shares of clipped tokens and of guarded and skipped steps, and the KL."""
        eps, guard, step = self.options.clip_eps, self.options.ratio_guard, loss.batch["vl_dac_step"]
        too_high, too_low = (ratio > 1 + eps) & (loss.advantages > 0), (ratio < 1 - eps) & (loss.advantages < 0)
        starts = first_tokens(step >= 0)
        loss.log("clip_ratio", (too_high | too_low)[usable].double())
        loss.log("skipped_steps", (~usable)[starts].double())
        if guard is not None:
            loss.log("guarded_steps", any_in_step(ratio > guard, step)[starts].double())
        if self.options.kl_beta:
            loss.log("kl", divergence[usable])

    @hookimpl
    def loss_terms(self, loss: Loss) -> dict[str, PolicyLoss]:
        batch, options = loss.batch, self.options
        values = self.critic.values_at(first_tokens(loss.mask), loss.hidden_states[self.name])
        starts = first_tokens(batch["vl_dac_step"] >= 0)
        clip = options.clip_eps if options.value_clip else None
        errors = value_loss(values, batch["vl_dac_value"], batch["vl_dac_return"], clip)
        errors = torch.where(starts, errors, 0.0)
        if not torch.isfinite(errors).all():
            row = int((~torch.isfinite(errors)).any(dim=1).nonzero()[0])
            raise UsageError(
                f"the value loss is not finite: values {values[row][starts[row]].tolist()} for returns "
                f"{batch['vl_dac_return'][row][starts[row]].tolist()}. {DIVERGED}"
            )
        share = batch["vl_dac_weight"] * token_counts(batch["vl_dac_step"])  # N / S: a mean over all steps
        return {"value_loss": PolicyLoss(options.value_coef * errors * share)}

    @hookimpl
    def optimizer_step(self, trainer: TrainerView) -> None:
        self._gradient = self.critic.step(trainer.reduce, trainer.num_processes)

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """Returns steps with their normalised advantages, and curves of V, R and the advantage at their beginnings."""
        scored, spans, curves = self.scored, [], []
        for row, count in enumerate(scored.episodes.counts.tolist()):
            step = scored.episodes.step[row].cpu()
            tokens = [(step == number).nonzero().flatten().tolist() for number in range(count)]
            for number, at in enumerate(tokens):
                spans.append(Span(row, at[0], at[-1] + 1, f"step {number + 1}", scored.normal[row, number].item()))
            if count:
                starts = [at[0] for at in tokens]
                for name, values in (("V", scored.values), ("return", scored.returns), ("advantage", scored.normal)):
                    curves.append(Curve(row, name, starts, values[row, :count].tolist()))
        return Views(spans, curves)
