# mypy: disable-error-code="empty-body"
"""Forward and loss: a micro-batch inside the loss, and the hooks that read and change both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .basics import Logs, Metric, Mode, Role, TrainerKind, loss_mask
from .plugin import hookspec
from .trainer import TrainerView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogpsCall:
    """One request for completion log-probabilities.

    Attributes:
        kind: The trainer that asks. GRPO and RLOO ask for completions, DPO for pairs.
        role: `"policy"` (with gradient, inside the loss), `"old"` (no gradient, right after sampling) or
            `"reference"`.
        model: The model to call, wrapped as the trainer holds it.
        input_ids, attention_mask: (B, P + T): prompts padded left, completions padded right. For pairs (2n, L) padded
            right, the chosen ones first.
        logits_to_keep: T; for pairs L - 1.
        score_mask: None for completions. For pairs (2n, L), true on the tokens to score.
        batch_size: Rows per forward that the trainer asks for, or None for all at once.
        compute_entropy: Whether entropies are wanted.
        extra: Further arguments, such as image tensors or `compute_aux_loss`.
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


@dataclass(frozen=True)
class Logps:
    """What a forward gives for the tokens to score.

    Attributes:
        per_token_logps: (B, T), 0 on masked tokens.
        entropies: (B, T) where asked for.
        aux_loss: Scalar, or None.
        extra: For pairs, the other per-token values of TRL's fused head by its names, such as `mean_logits`.
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss(Logs):
    """One micro-batch inside the loss, after the policy's forward.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        batch: The micro-batch by TRL's names (m rows), with every field that `batch_fields` added.
        per_token_logps: (m, T) with gradient.
        entropies: (m, T) or None. TRL's own carry a gradient from TRL 1.15 on.
        hidden_states: By plugin, (n, H) detached: what it named in `hidden_positions`, from this very forward.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    batch: Mapping[str, Any]
    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None
    hidden_states: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> torch.Tensor:
        """(m, T): 1 on the tokens that the loss counts."""
        return loss_mask(self.batch)

    @property
    def advantages(self) -> torch.Tensor:
        """(m, 1) or (m, T), ready to multiply token values."""
        advantages = self.batch["advantages"]
        return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages

    @property
    def group_ids(self) -> torch.Tensor:
        """(m,) which rows share a prompt: for plugins with the need `whole_groups` or `grouped_order`."""
        ids: torch.Tensor | None = self.batch.get("trl_ext_group_ids")
        if ids is None:
            raise AttributeError("no plugin of this run needs `whole_groups` or `grouped_order`; declare the need")
        return ids

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the trainer lets the importance ratio go below and above 1: `epsilon` and `epsilon_high`.

        Without `epsilon_high` both are `epsilon`.
        """
        low, high = self.trainer.args.epsilon, getattr(self.trainer.args, "epsilon_high", None)
        return float(low), float(low if high is None else high)

    @property
    def sampling_ratio(self) -> torch.Tensor | None:
        """(m, 1) or (m, T) detached: how much likelier TRL's policy found the tokens than the sampler (vLLM) did.

        TRL multiplies its loss per token by it. None where the policy itself sampled, or the correction is off.
        """
        return self.batch.get("importance_sampling_ratio")

    @property
    def old_per_token_logps(self) -> torch.Tensor:
        """(m, T) under the sampling policy; the detached current ones where the round is on-policy."""
        old = self.batch.get("old_per_token_logps")
        return self.per_token_logps.detach() if old is None else old


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of a micro-batch: the policy loss itself, or a term beside it.

    Attributes:
        values: (m, T) loss per token, or a scalar that already is a mean over the micro-batch.
        normalisation: For (m, T) only: `"trainer"` averages as the trainer's `loss_type` does, `"token_mean"` over the
            micro-batch's tokens, `"sequence_mean"` over each row first.
    """

    values: torch.Tensor
    normalisation: Literal["trainer", "token_mean", "sequence_mean"] = "trainer"


Compute = Callable[[], Logps]


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
def loss_metrics(loss: Loss) -> Mapping[str, Metric] | None:
    """The same for every micro-batch. All plugins. Collective. GRPO and RLOO. Other loss hooks may use `loss.log`.

    ```python
    class MeanLogp(Plugin):
        name = "mean-logp"
        trainers = ("grpo", "rloo")

        @hookimpl
        def loss_metrics(self, loss):
            return {"logp": ((loss.per_token_logps * loss.mask).sum().item(), loss.mask.sum().item())}
    ```
    """
