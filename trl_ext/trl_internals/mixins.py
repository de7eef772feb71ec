"""Classes put in front of a TRL trainer: they wrap its private methods and hand over to the session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_ext_hooks import Logps, LogpsCall, TrainerKind
from trl_ext_hooks.types import Role

from ..engine.stages import advantages, loss, pairs, rollout, scoring, turns
from .forwards import adapters_off
from .generation import pack_generation, row_order, unpack_generation
from .rewards import RewardColumns

if TYPE_CHECKING:
    from ..engine.host import Session

    _Base: Any = object
else:
    _Base = object


class TrainerMixin(_Base):
    """What all trainers share: proof of firing and state in checkpoints."""

    _trl_ext: Session

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().training_step(*args, **kwargs)
        self._trl_ext.verify_fired()
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._trl_ext.save_state(trial)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._trl_ext.load_state(checkpoint)


class RoundMixin(TrainerMixin):
    """GRPO and RLOO: generation rounds and losses."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        session = self._trl_ext
        columns = RewardColumns(self)
        session.begin_round(columns)
        try:
            output = super()._generate_and_score_completions(rollout.select_rows(session, inputs))
        finally:
            columns.restore()
        return advantages.finish(session, output)

    def _generate(self, prompts: Any) -> Any:
        session, stock = self._trl_ext, super()._generate

        def generate(prompts: list[Any]) -> Any:
            with turns.reading(session):
                return unpack_generation(session.kind, stock(prompts))

        return pack_generation(session.kind, rollout.generate(session, prompts, generate))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        turns.read(self._trl_ext)
        return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        return scoring.score(
            self._trl_ext, inputs, prompts, completions, completion_ids_list, super()._calculate_rewards
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        session = self._trl_ext
        if not session.keeps_groups:
            return super()._prepare_inputs(generation_batch)
        with row_order(session.kind, advantages.keep_groups):
            return super()._prepare_inputs(generation_batch)

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
        session, stock = self._trl_ext, super()._get_per_token_logps_and_entropies

        def dense() -> Any:
            # by keyword, because TRL 1.14 takes no batch size by position
            wanted = {"batch_size": batch_size, "compute_entropy": compute_entropy, **extra}
            return stock(model, input_ids, attention_mask, logits_to_keep, **wanted)

        if not session.watches_logps:
            return dense()
        role: Role
        if session.in_loss:
            role = "policy"
        elif model in (session.reference, getattr(self, "ref_model", None)) or adapters_off(self, model):
            role = "reference"
        else:
            role = "old"
        call = LogpsCall(
            kind=session.kind,
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
        result = loss.logps(session, call, lambda: Logps(*dense()))
        return result.per_token_logps, result.entropies, result.aux_loss

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        stock = super()._compute_loss
        return loss.compute(self._trl_ext, inputs, lambda batch: stock(model, batch))


class PairMixin(TrainerMixin):
    """DPO: losses on pairs."""

    _signature_columns: list[str] | None

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        stock, reference = super()._compute_loss, super().compute_ref_log_probs
        return pairs.compute(
            self._trl_ext,
            inputs,
            lambda batch: stock(model, batch, return_outputs),
            lambda batch: reference(self.model if self.ref_model is None else self.ref_model, batch),
        )

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(model, pairs.without_rows(inputs))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns or []
        self._signature_columns = [*known, *(name for name in self._trl_ext.columns if name not in known)]


MIXINS: dict[TrainerKind, type[Any]] = {"grpo": RoundMixin, "rloo": RoundMixin, "dpo": PairMixin}
