"""Private state of a TRL trainer, read and written for the rest of trl_ext."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from trl_ext_hooks import Generation, Logps, LogpsCall, TrainerKind
from trl_ext_hooks.types import Mode, Role

from ..errors import CompatError
from .seams import trainer_class

_GENERATED: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": (
        "prompt_ids",
        "completion_ids",
        "tool_mask",
        "completions",
        "logprobs",
        "extra_fields",
        "images",
        "tool_images",
    ),
    "rloo": ("prompt_ids", "completion_ids", "completions"),
}
_OWN = ("prompt_ids", "completion_ids", "completions", "tool_mask", "logprobs")


def mode(trainer: Any) -> Mode:
    return "train" if trainer.model.training else "eval"


def num_generations(trainer: Any) -> int:
    return int(trainer.num_generations if mode(trainer) == "train" else trainer.num_generations_eval)


def reward_names(trainer: Any) -> tuple[str, ...]:
    return tuple(getattr(trainer, "reward_func_names", ()))


def reward_name(function: Any) -> str:
    """The name under which TRL reports a reward function, before the trainer is built."""
    from trl.trainer.utils import get_callable_name, get_config_model_id

    if isinstance(function, str):
        return function.split("/")[-1]
    config: Any = getattr(function, "config", None)
    if isinstance(function, torch.nn.Module) and config is not None:
        return get_config_model_id(config).split("/")[-1]
    return get_callable_name(function)


def tool_sources(trainer: Any) -> tuple[str, ...]:
    """Which constructor arguments gave a trainer tools."""
    held = {"tools": "tools", "environment_factory": "environment_factories", "rollout_func": "rollout_func"}
    return tuple(name for name, attribute in held.items() if getattr(trainer, attribute, None))


def renders_tool_calls(arguments: Mapping[str, Any]) -> bool:
    """Whether TRL's tool loop can work with the chat template, asked before the model is loaded.

    Args:
        arguments: The arguments with which a GRPO trainer is about to be built.
    """
    from transformers import AutoProcessor
    from trl.chat_template_utils import supports_tool_calling
    from trl.trainer.utils import get_config_model_id

    if not (arguments.get("tools") or arguments.get("environment_factory")):
        return True  # a `rollout_func` renders its own conversations
    processor = arguments.get("processing_class")
    if processor is None:
        model, args = arguments["model"], arguments["args"]
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision")
        remote = getattr(args, "trust_remote_code", False)
        processor = AutoProcessor.from_pretrained(name, revision=revision or "main", trust_remote_code=remote)
    return bool(supports_tool_calling(processor))


def environments(trainer: Any) -> list[Any] | None:
    """The environment of each row of the current round; None without any."""
    return getattr(trainer, "environments", None)


def optimizer_callback(run: Callable[[], None]) -> Any:
    """A callback that runs after every step of the trainer's optimizer."""
    from transformers import TrainerCallback

    class Stepped(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            run()

    return Stepped()


def reward_weights(trainer: Any) -> torch.Tensor:
    return trainer.reward_weights.to(trainer.accelerator.device)


def unpack_generation(kind: TrainerKind, result: tuple[Any, ...]) -> Generation:
    """TRL's tuple of a generated round by names."""
    layout = _GENERATED[kind]
    if len(result) != len(layout):
        raise CompatError(f"{kind.upper()} generation returned {len(result)} values, expected {len(layout)}: {layout}.")
    named = dict(zip(layout, result, strict=True))
    own = {name: named.pop(name) for name in _OWN if name in named}
    return Generation(**own, extra=named)


def pack_generation(kind: TrainerKind, generation: Generation) -> tuple[Any, ...]:
    named = {**generation.extra, **{name: getattr(generation, name) for name in _OWN}}
    return tuple(named[name] for name in _GENERATED[kind])


def add_metric(trainer: Any, name: str, value: float) -> None:
    """Adds a value that is already reduced over processes; TRL averages over the logging interval."""
    trainer._metrics[mode(trainer)][name].append(value)


def replace_last_metric(trainer: Any, name: str, value: float) -> None:
    values = trainer._metrics[mode(trainer)].get(name)
    if values:
        values[-1] = value


@contextlib.contextmanager
def only_metrics(trainer: Any, keep: Sequence[str]) -> Iterator[None]:
    """Drops what TRL records inside the block, except for some names."""
    metrics = trainer._metrics[mode(trainer)]
    before = {name: len(values) for name, values in metrics.items()}
    yield
    for name in list(metrics):
        if name not in keep:
            del metrics[name][before.get(name, 0) :]
            if not metrics[name]:
                del metrics[name]


def replace_logged_advantages(trainer: Any, values: list[float]) -> None:
    """Puts the advantages that are really used into the completions table, one float per row of the round."""
    logged = trainer._logs["advantages"]
    for _ in range(min(len(values), len(logged))):
        logged.pop()
    logged.extend(values)


def prompt_text(trainer: Any, prompt: Any) -> str:
    """A prompt as the trainer gives it to the policy: messages through its chat template, with its arguments."""
    if isinstance(prompt, str):
        return prompt
    return trainer.processing_class.apply_chat_template(
        prompt,
        tools=getattr(trainer, "tools", None) or None,
        chat_template=getattr(trainer, "chat_template", None),
        add_generation_prompt=True,
        tokenize=False,
        **(getattr(trainer, "chat_template_kwargs", None) or {}),
    )


def logged_completions(trainer: Any) -> list[Any]:
    """Completions of the last round, as text or messages."""
    return list(trainer._logs["completion"])


def logged_round(trainer: Any) -> list[dict[str, Any]]:
    """Rows of the last round: `prompt`, `completion`, `advantage`, and `rewards` by name; none for DPO."""
    logs = getattr(trainer, "_logs", None)
    if not logs or "prompt" not in logs:
        return []
    size = len(logs["prompt"])
    columns = {name: [None] * (size - len(values)) + list(values) for name, values in logs["rewards"].items()}
    rewards = [{name: values[row] for name, values in columns.items()} for row in range(size)]
    rows = zip(logs["prompt"], logs["completion"], logs["advantages"], rewards, strict=True)
    return [dict(zip(("prompt", "completion", "advantage", "rewards"), row, strict=True)) for row in rows]


class RewardColumns:
    """Lets a round have other reward columns than the trainer has reward functions, and restores them after it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.saved: dict[str, Any] = {}

    def use(self, names: Sequence[str], weights: torch.Tensor) -> None:
        if tuple(names) == reward_names(self.trainer) and torch.equal(weights, reward_weights(self.trainer)):
            return
        for attribute in ("reward_func_names", "reward_weights", "reward_funcs"):
            self.saved.setdefault(attribute, getattr(self.trainer, attribute))
        self.trainer.reward_func_names = list(names)
        self.trainer.reward_weights = weights
        self.trainer.reward_funcs = [None] * len(names)  # from here on TRL uses its length only

    def restore(self) -> None:
        for attribute, value in self.saved.items():
            setattr(self.trainer, attribute, value)
        self.saved.clear()


def loss_divisor(trainer: Any, kind: TrainerKind) -> float:
    """What a mean over a micro-batch must be divided by: GRPO scales for accumulation itself, the others do not."""
    if kind == "grpo" and mode(trainer) == "train":
        return float(trainer.current_gradient_accumulation_steps)
    return 1.0


def router_loss(trainer: Any, kind: TrainerKind, aux_loss: torch.Tensor) -> torch.Tensor:
    """The load-balancing term of a mixture of experts as TRL adds it to the loss of a micro-batch."""
    return trainer.router_aux_loss_coef * aux_loss / loss_divisor(trainer, kind)


LossUnit = Literal["tokens", "rows", "micro_batch"]


def loss_unit(trainer: Any, kind: TrainerKind) -> LossUnit:
    """What the trainer's own loss divides by: counted tokens of the round, rows, or what a micro-batch holds."""
    loss_type = trainer.loss_type if kind == "grpo" else "rows"
    if loss_type in ("dapo", "cispo", "vespo"):
        return "tokens"
    return "micro_batch" if loss_type == "bnpo" else "rows"


def adds_to_loss(trainer: Any) -> str | None:
    """A term that the trainer adds to its loss with a mean of its own, by the setting that asks for it, or None."""
    if getattr(trainer.args, "entropy_coef", None) or getattr(trainer.args, "use_adaptive_entropy", False):
        return "an entropy bonus (entropy_coef, use_adaptive_entropy)"
    return "the router's auxiliary loss (output_router_logits)" if getattr(trainer, "aux_loss_enabled", False) else None


def aggregate(
    trainer: Any, kind: TrainerKind, values: torch.Tensor, mask: torch.Tensor, batch: Mapping[str, Any]
) -> torch.Tensor:
    """Averages (m, T) token losses as the trainer's own loss does, scaled for accumulation.

    GRPO follows `loss_type`; RLOO adds up each row and averages over rows.
    """
    if kind != "grpo":
        return (values * mask).sum(dim=1).mean()
    loss_type, training = trainer.loss_type, mode(trainer) == "train"
    if loss_type in ("dapo", "cispo", "vespo"):
        # the count spans the generation batch of all processes; rescale it to one accumulation window
        items = batch["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if training:
            items = items * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
        return (values * mask).sum() / items
    if loss_type in ("grpo", "sapo"):
        loss = ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)).mean()
    elif loss_type == "bnpo":
        loss = (values * mask).sum() / mask.sum().clamp(min=1.0)
    elif loss_type == "dr_grpo":
        loss = (values * mask).sum() / (values.size(0) * trainer.max_completion_length)
    elif loss_type == "luspo":
        loss = (values * mask).sum(dim=1).mean()
    else:
        raise CompatError(
            f"loss_type {loss_type!r} has no known normalisation; use another normalisation or loss_type."
        )
    return loss / loss_divisor(trainer, kind)


def adapters_off(trainer: Any, model: Any) -> bool:
    """Whether a PEFT model computes its reference now: adapters disabled, or the frozen copy `ref` active."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = trainer.accelerator.unwrap_model(model)
    if not hasattr(base, "peft_config"):
        return False
    layer = next((module for module in base.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (layer.disable_adapters or layer.active_adapters == ["ref"])


@contextlib.contextmanager
def scoring(trainer: Any) -> Iterator[None]:
    """No gradients and no gradient checkpointing, as TRL scores completions."""
    from trl.models.utils import disable_gradient_checkpointing

    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        yield


@contextlib.contextmanager
def last_hidden_states(trainer: Any, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Inside the block, `see` gets the last hidden states (B, L, H) of every forward of the policy, detached.

    TRL calls the backbone as a module, with its fused head and without, and so does generation: the block must be no
    larger than the forward that is meant. Gradient checkpointing runs layers again, and never the backbone.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy

    def seen(module: Any, args: Any, output: Any) -> None:
        see(getattr(output, "last_hidden_state", output[0]).detach())

    handle = policy.base_model.register_forward_hook(seen)
    try:
        yield
    finally:
        handle.remove()


_VISION = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def completion_logps(trainer: Any, batch: Mapping[str, Any], model: Any = None) -> torch.Tensor:
    """(b, T) log-probabilities of a round's completions under a model (the policy as it is now), no gradient."""
    rows = (
        trainer.args.per_device_train_batch_size
        if mode(trainer) == "train"
        else trainer.args.per_device_eval_batch_size
    )
    with scoring(trainer):
        return trainer._get_per_token_logps_and_entropies(
            trainer.model if model is None else model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=rows,
            **{name: batch[name] for name in _VISION if batch.get(name) is not None},
        )[0]


def add_fused_head(model: Any) -> None:
    """Gives a model TRL's fused head with log-probabilities and entropies, as GRPOTrainer does (from TRL 1.15)."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))


def set_collator(trainer: Any, collator: Any) -> None:
    """Exchanges the collator, and lets TRL find out anew which columns it drops."""
    trainer.data_collator = collator
    trainer._signature_columns = None


def uses_virtual_tokens(trainer: Any) -> bool:
    """Whether the policy is a PEFT model that learns prompt tokens, which the fused forward does not see."""
    configs = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    return any(config.is_prompt_learning for config in configs.values())


PairForward = Callable[[LogpsCall, Callable[[], Logps]], Logps]
_FUSED = ("mean_logits", "is_top1", "log_sum_sq_probs")


@contextlib.contextmanager
def pair_forwards(trainer: Any, run: PairForward) -> Iterator[None]:
    """Inside the block, DPO's fused forwards of policy and reference go through `run(call, TRL's own forward)`.

    DPO calls its models inside one long method, so the forward of the model itself is wrapped; a model that `run` calls
    is called as it was.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    policy = trainer.accelerator.unwrap_model(trainer.model)
    models = [policy.get_base_model() if hasattr(policy, "peft_config") else policy]
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        reference = trainer.accelerator.unwrap_model(reference)
        models.append(reference)
    running: list[Any] = []

    def wrap(model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if running or not kwargs.get("fused_lm_head"):
                return original(*args, **kwargs)
            extra = dict(kwargs)
            ids, mask, labels = (extra.pop(name) for name in ("input_ids", "attention_mask", "labels"))
            scored = labels != -100
            role: Role = "reference" if model is reference or adapters_off(trainer, trainer.model) else "policy"

            def dense() -> Logps:
                out = original(**kwargs)
                values = {name: getattr(out, name) for name in _FUSED if getattr(out, name) is not None}
                return Logps(out.log_probs, out.entropy, out.aux_loss, values)

            call = LogpsCall("dpo", role, model, ids, mask, ids.size(1) - 1, scored, None, role == "policy", extra)
            running.append(model)
            try:
                result = run(call, dense)
            finally:
                running.pop()
            return FusedCausalLMOutput(
                log_probs=result.per_token_logps,
                entropy=result.entropies,
                aux_loss=result.aux_loss,
                label_mask=scored[:, 1:],
                **result.extra,
            )

        return forward

    with contextlib.ExitStack() as stack:
        for model in models:
            own = vars(model).get("forward")
            stack.callback(_restore_forward, model, own)
            model.forward = wrap(model, model.forward)
        yield


def _restore_forward(model: Any, own: Any) -> None:
    if own is None:
        del model.forward
    else:
        model.forward = own


@contextlib.contextmanager
def row_order(kind: TrainerKind, order: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]) -> Iterator[None]:
    """Inside the block, a round is permuted by `order(TRL's own permutation, batch)` instead of TRL's permutation."""
    module: Any = importlib.import_module(trainer_class(kind).__module__)
    original = module.shuffle_sequence_dict

    def shuffle(seq_dict: Mapping[str, Any]) -> dict[str, Any]:
        rows = len(next(value for value in seq_dict.values() if value is not None))
        permutation = order(torch.randperm(rows), seq_dict)  # the draw keeps the random stream of plain TRL

        def permute(value: Any) -> Any:
            if value is None or (isinstance(value, torch.Tensor) and value.dim() == 0):
                return value
            return value[permutation] if isinstance(value, torch.Tensor) else [value[i] for i in permutation.tolist()]

        return {name: permute(value) for name, value in seq_dict.items()}

    module.shuffle_sequence_dict = shuffle
    try:
        yield
    finally:
        module.shuffle_sequence_dict = original


def checkpoint_folder(trainer: Any, trial: Any) -> str:
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    return os.path.join(trainer._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
