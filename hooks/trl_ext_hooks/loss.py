# mypy: disable-error-code="empty-body"
"""Forward and loss: a micro-batch inside the loss, and the hooks that read and change both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .basics import Logps, Logs, Metric, Mode, Role, TrainerKind, loss_mask
from .plugin import hookspec
from .side_rows import SideRows
from .trainer import TrainerView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogpsCall:
    """Describes one request for log-probabilities.

    Attributes:
        kind: The trainer that asks. GRPO and RLOO ask about completions, DPO about pairs.
        role: `"policy"` (with gradient, inside the loss), `"old"` (no gradient, right after sampling) or
            `"reference"`.
        model: The model to call, wrapped as the trainer holds it.
        input_ids, attention_mask: (B, P + T), prompts padded left and completions padded right. For pairs (2n, L),
            padded right, the chosen ones first.
        logits_to_keep: T. For pairs L - 1.
        score_mask: None for completions. For pairs (2n, L), true on the tokens to score.
        batch_size: Rows per forward that the trainer asks for, or None for all at once.
        compute_entropy: Whether entropies are wanted.
        extra: Further arguments, such as image tensors or `compute_aux_loss`.
        side: Whether a plugin asks, with `trainer.logps`, for rows of its own. The role is then `"policy"` with
            gradient, else `"old"`.
    """

    kind: TrainerKind
    role: Role
    model: Any
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    logits_to_keep: int
    score_mask: torch.Tensor | None
    batch_size: int | None
    compute_entropy: bool
    extra: Mapping[str, Any]
    side: bool = False


@dataclass(frozen=True)
class Loss(Logs):
    """Holds one micro-batch inside the loss, after the policy's forward.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        batch: The micro-batch by TRL's names (m rows), with every field that `batch_fields` added.
        per_token_logps: (m, T) with gradient.
        entropies: (m, T) or None. TRL's own carry a gradient from TRL 1.15 on.
        hidden_states: By plugin, what it named in `hidden_positions`, from this very forward: (n, H), detached.
        step_statistics: By plugin, what its `step_statistics` returned for this optimizer step.
        side: By plugin, the scored rows of its `side_batch` that belong to this micro-batch.
        position: Number of this micro-batch in `StepBatch.micro_batches`, where a plugin has `step_statistics`.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    batch: Mapping[str, Any]
    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None
    hidden_states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step_statistics: Mapping[str, Any] = field(default_factory=dict)
    side: Mapping[str, SideRows] = field(default_factory=dict)
    position: int = 0

    @property
    def mask(self) -> torch.Tensor:
        """Marks the tokens that the loss counts with 1, others with 0: (m, T)."""
        return loss_mask(self.batch)

    @property
    def advantages(self) -> torch.Tensor:
        """Returns the advantages in a shape that multiplies token values: (m, 1) or (m, T)."""
        advantages = self.batch["advantages"]
        return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages

    @property
    def group_ids(self) -> torch.Tensor:
        """Returns group ids (m,): rows of one prompt have the same number.

        Raises:
            AttributeError: No plugin of the run has the need `whole_groups`, `grouped_steps` or
                `grouped_order`.
        """
        ids: torch.Tensor | None = self.batch.get("trl_ext_group_ids")
        if ids is None:
            needs = "`whole_groups`, `grouped_steps` or `grouped_order`"
            raise AttributeError(f"no plugin of this run needs {needs}; declare the need")
        return ids

    @property
    def clip_range(self) -> tuple[float, float]:
        """Returns how far the trainer lets the importance ratio go below and above 1: `epsilon` and `epsilon_high`.

        Where `epsilon_high` is None, both numbers are `epsilon`.
        """
        low, high = self.trainer.args.epsilon, getattr(self.trainer.args, "epsilon_high", None)
        return float(low), float(low if high is None else high)

    @property
    def sampling_ratio(self) -> torch.Tensor | None:
        """Returns how much likelier the tokens are under TRL's policy than under the sampler (vLLM).

        (m, 1) or (m, T), detached. TRL multiplies its loss per token by it. None where the policy itself sampled, or
        where the correction is off.
        """
        return self.batch.get("importance_sampling_ratio")

    @property
    def old_per_token_logps(self) -> torch.Tensor:
        """Returns the log-probabilities under the policy that sampled: (m, T), without gradient.

        Where the round is on-policy, they are the current ones, detached.
        """
        old = self.batch.get("old_per_token_logps")
        return self.per_token_logps.detach() if old is None else old


@dataclass(frozen=True)
class StepBatch(Logs):
    """Holds what one optimizer step learns from, before any of its losses.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        micro_batches: The micro-batches of this process in order, as `loss_inputs` left them. Their log-probabilities
            and entropies are those of the policy before the step, without gradient. Every process has as many. In
            evaluation it is one.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    micro_batches: tuple[Loss, ...]

    def token_mean(self, values: Callable[[Loss], torch.Tensor]) -> torch.Tensor:
        """Averages values per token over all tokens of the step that the loss counts, on all processes. Collective.

        Args:
            values: Returns the (m, T) values of a micro-batch.

        Returns:
            A 0-d float64 tensor, equal on every process. 0 where the step has no token.
        """
        sums = [(values(loss).double() * loss.mask).sum() for loss in self.micro_batches]
        counts = [loss.mask.sum() for loss in self.micro_batches]
        # in one tensor, so that a single collective adds up sums and counts
        total, count = self.trainer.reduce(_pair(sum(sums), sum(counts)))
        return total / count.clamp(min=1)


def _pair(total: Any, count: Any) -> torch.Tensor:
    """Returns two 0-d tensors as one float64 tensor (2,), without importing torch."""
    both: torch.Tensor = total.new_zeros(2)
    both[0], both[1] = total, count
    return both


Normalisation = Literal["trainer", "token_mean", "sequence_mean", "share"]
"""How a `PolicyLoss` is averaged."""


@dataclass(frozen=True)
class PolicyLoss:
    """Holds a loss of a micro-batch: the policy loss itself, or a term beside it.

    Attributes:
        values: (m, T) loss per token, or a scalar that already is a mean over the micro-batch.
        normalisation: How (m, T) values are averaged. `"trainer"` averages as the trainer's `loss_type` does,
            `"token_mean"` over the tokens of the micro-batch, `"sequence_mean"` over each row first. `"share"` takes a
            scalar that is divided already, so that the mean over the micro-batches of all processes is the mean over
            the round (see `Round.micro_batches`), without the rows whose mask is 0.
    """

    values: torch.Tensor
    normalisation: Normalisation = "trainer"


Compute = Callable[[], Logps]
"""TRL's own forward."""


@hookspec
def hidden_positions(loss_mask: torch.Tensor) -> torch.Tensor:
    """Selects the tokens for which the plugin reads hidden states, such as where a value is learned. All plugins.

    Runs on every process, inside every forward of the policy that scores completions: once after sampling, and in each
    loss. Receives the loss mask (B, T) of the rows of that forward and returns (B, T) booleans. GRPO and RLOO.

    The hidden state of a token is that of the last layer one position before, from which the token is predicted. The n
    selected states are in `hidden_states[name of the plugin]` of `Round` and of `Loss`: (n, H), detached, in the order
    of the rows, in the dtype of the model. The loss runs no additional forward for them. The core computes old
    log-probabilities as with the need `old_logps`. The hook is refused beside a plugin that owns the forward (hook
    `logps`), because the rows of that forward may differ from those of the batch.

    ```python
    class FirstState(Plugin):
        name = "first-state"
        trainers = ("grpo", "rloo")

        @hookimpl
        def hidden_positions(self, loss_mask):
            return (loss_mask != 0) & (loss_mask.cumsum(1) == 1)  # the first token that the loss counts

        @hookimpl
        def loss_terms(self, loss):
            states = loss.hidden_states[self.name].float()  # (n, H)
            loss.log("norm", states.norm(dim=1))
    ```
    """


@hookspec
def logps(call: LogpsCall, compute: Compute) -> Logps:
    """Owns the forward that computes log-probabilities, in every role. One owner.

    Runs on every process. `compute()` runs TRL's own forward. The result must carry gradients in the role `policy`, be
    0 on masked tokens, and hold entropies where they are asked for. DPO has the roles `policy` and `reference`. All
    trainers, DPO from TRL 1.15.

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

    Runs on every process. `batch` is a copy by TRL's names (m rows, for pairs 2n). Returns the entries to replace,
    under names that the batch has. None replaces nothing. All trainers.

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
def step_statistics(step: StepBatch) -> Any:
    """Computes what the losses of an optimizer step need to know of the whole step. All plugins.

    Runs on every process, once per optimizer step before its first loss, and once per batch of an evaluation. The core
    scores all micro-batches of the step without gradient, through the owner of the forward, and gives them to the hook.
    The random state is as before when the losses begin. The result is `loss.step_statistics[name of the plugin]` of
    every micro-batch of the step. None leaves the plugin out there.

    A value for the whole step must be equal on every process: use `StepBatch.token_mean`, or `trainer.reduce`. The pass
    costs a forward of all rows. A run in which an optimizer step takes rows of two rounds is refused. GRPO and RLOO.
    Collective.

    ```python
    class TrustRegion(Plugin):
        name = "trust-region"
        trainers = ("grpo", "rloo")
        needs = ("old_logps",)

        @hookimpl
        def step_statistics(self, step):
            return step.token_mean(lambda loss: loss.old_per_token_logps - loss.per_token_logps)

        @hookimpl
        def loss_terms(self, loss):
            drift = loss.old_per_token_logps - loss.per_token_logps
            excess = torch.relu(loss.step_statistics[self.name] - 1e-4).float()
            return {"kl": PolicyLoss(1e3 * excess * drift, "token_mean")}
    ```
    """


@hookspec
def policy_loss(loss: Loss) -> PolicyLoss:
    """Replaces the policy loss of a micro-batch. One owner.

    Runs on every process, in training and in evaluation. It also replaces what TRL would add: KL term, entropy bonus,
    clipping and importance correction. Settings that ask for these are refused before training, unless `honours`
    declares them. Only a router's auxiliary loss stays. To a subclass of the trainer, `super()._compute_loss` gives the
    new loss, so what the subclass adds to it stays. A loss that uses no advantages claims `no_advantages`, and settings
    about advantages are then refused too. The core scales the loss for gradient accumulation. GRPO and RLOO.

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
    """Adds named terms to the loss of a micro-batch. All plugins, and the core adds up the terms.

    Runs on every process, after `policy_loss`. A term is a scalar that is a mean over the micro-batch, or a
    `PolicyLoss`. The core scales each term for gradient accumulation, so the micro-batch size does not change its
    weight. It reports each term as the metric `<plugin>/<term>`. None adds nothing. GRPO and RLOO.

    ```python
    class StayNear(Plugin):
        name = "stay-near"
        trainers = ("grpo",)

        @hookimpl
        def loss_terms(self, loss):
            drift = loss.per_token_logps - loss.old_per_token_logps
            entropy = ops.masked_mean(loss.entropies, loss.mask)
            return {"drift": PolicyLoss(0.1 * drift**2), "entropy_floor": torch.relu(0.5 - entropy)}
    ```
    """


@hookspec
def optimizer_step(trainer: TrainerView) -> None:
    """Updates what the plugin trains itself, right after each step of the trainer's optimizer. All plugins.

    Runs on every process. Parameters outside the model now hold the gradients that `loss_terms` sent to them, summed
    over the micro-batches of this process. Average them over processes with `trainer.reduce`, step, and clear them. All
    trainers. Collective.

    For a critic, make the module in `setup`, with its own seed, in float32 and outside the policy. Let it read hidden
    states (`hidden_positions`), and return the states of module and optimizer from `state_dict`.

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
            surprise = -ops.masked_mean(loss.per_token_logps.detach(), loss.mask)
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
def loss_metrics(loss: Loss) -> Mapping[str, Metric] | None:
    """Reports values of a micro-batch as {name: (sum, count)}. All plugins.

    Runs on every process, after `loss_terms`. The core adds sums and counts over processes, and reports the ratio as
    `<plugin>/<name>`. TRL averages the ratios of micro-batches. A hook that computes such a value on its way calls
    `loss.log` instead. None reports nothing. GRPO and RLOO. Collective.

    ```python
    class MeanLogp(Plugin):
        name = "mean-logp"
        trainers = ("grpo", "rloo")

        @hookimpl
        def loss_metrics(self, loss):
            return {"logp": ((loss.per_token_logps * loss.mask).sum().item(), loss.mask.sum().item())}
    ```
    """
