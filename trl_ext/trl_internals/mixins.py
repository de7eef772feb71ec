"""Classes put in front of a TRL trainer: they wrap its private methods and hand over to the host of its plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trl_ext_hooks import Logps, LogpsCall, TrainerKind
from trl_ext_hooks.basics import Role

from .forwards import adapters_off
from .generation import pack_generation, unpack_generation
from .host import Host
from .seams import trainer_class
from .trainer_state import checkpoint_folder, drawing

if TYPE_CHECKING:
    _Base: Any = object
else:
    _Base = object


class TrainerMixin(_Base):
    """What all trainers share: the end of a step, state in checkpoints, the model card, and columns for plugins."""

    _trl_ext: Host
    _signature_columns: list[str] | None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().training_step(*args, **kwargs)
        self._trl_ext.step_ended()
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._trl_ext.save(checkpoint_folder(self, trial))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._trl_ext.load(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._trl_ext.complete_card(self.args.output_dir)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns or []
        self._signature_columns = [*known, *(name for name in self._trl_ext.columns if name not in known)]


class RoundMixin(TrainerMixin):
    """GRPO and RLOO: generation rounds and losses."""

    def get_train_dataloader(self) -> Any:
        with drawing(self, self._trl_ext.prompts):
            return super().get_train_dataloader()

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return self._trl_ext.round(inputs, super()._generate_and_score_completions)

    def _generate(self, prompts: Any) -> Any:
        kind, stock = self._trl_ext.kind, super()._generate
        generation = self._trl_ext.generate(prompts, lambda prompts: unpack_generation(kind, stock(prompts)))
        if generation.prompts is not None:
            prompts[:] = generation.prompts  # TRL's round scores and logs what its own list holds
        return pack_generation(kind, generation)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self._trl_ext.turn_begins()
        return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        return self._trl_ext.score(inputs, prompts, completions, completion_ids_list, super()._calculate_rewards)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **extra: Any,
    ) -> Any:
        host, stock = self._trl_ext, super()._get_per_token_logps_and_entropies

        def dense() -> Any:
            # by keyword, because TRL 1.14 takes no batch size by position
            wanted = {"batch_size": batch_size, "compute_entropy": compute_entropy, **extra}
            return stock(model, input_ids, attention_mask, logits_to_keep, **wanted)

        if not host.watches_logps:
            return dense()
        role: Role
        if host.in_loss:
            role = "policy"
        elif model in (host.reference, getattr(self, "ref_model", None)) or adapters_off(self, model):
            role = "reference"
        else:
            role = "old"
            compute_entropy = compute_entropy or host.needs_old_entropies
        call = LogpsCall(
            kind=host.kind,
            role=role,
            model=model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            score_mask=None,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            extra=extra,
        )
        result = host.logps(call, lambda: Logps(*dense()))
        return result.per_token_logps, result.entropies, result.aux_loss

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        stock = super()._compute_loss
        return self._trl_ext.loss(inputs, lambda batch: stock(model, batch))


def scores_without_plugins(trainer: Any, *columns: list[Any]) -> torch.Tensor:
    """Returns what the trainer's reward functions give for rows, prompts, completions and their ids: (N, F).

    Collective, with as many rows on every process.
    """
    scores: torch.Tensor = super(RoundMixin, trainer)._calculate_rewards(*columns)
    return scores


def logps_without_plugins(trainer: Any, *arguments: Any, **sizes: Any) -> Logps:
    """Runs TRL's log-probability method with its own arguments."""
    return Logps(*super(RoundMixin, trainer)._get_per_token_logps_and_entropies(*arguments, **sizes))


class OwnLossMixin(_Base):
    """GRPO and RLOO, behind the classes of users: what they call as TRL's loss."""

    _trl_ext: Host

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        stock = super()._compute_loss
        return self._trl_ext.own_loss(inputs, lambda batch: stock(model, batch))


class PairMixin(TrainerMixin):
    """DPO: losses on pairs."""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        stock, reference = super()._compute_loss, super().compute_ref_log_probs
        return self._trl_ext.pair_loss(
            inputs,
            lambda batch: stock(model, batch, return_outputs),
            lambda batch: reference(self.model if self.ref_model is None else self.ref_model, batch),
        )

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(model, self._trl_ext.without_rows(inputs))


MIXINS: dict[TrainerKind, type[Any]] = {"grpo": RoundMixin, "rloo": RoundMixin, "dpo": PairMixin}


def bases(kind: TrainerKind, cls: type[Any]) -> tuple[type[Any], ...]:
    """Returns the bases of a trainer class with plugins: a mixin in front of `cls`, and one right before TRL's class.

    Args:
        kind: The trainer.
        cls: TRL's class, or a subclass by a user.
    """
    if kind == "dpo":
        return (MIXINS[kind], cls)
    trl_class = trainer_class(kind)
    # a subclass of TRL's class that is named last stands behind `cls` and before TRL's class in the order of methods
    last = type(trl_class.__name__, (OwnLossMixin, trl_class), {"__module__": trl_class.__module__})
    return (MIXINS[kind], last) if cls is trl_class else (MIXINS[kind], cls, last)
