"""Tools for testing plugins: a tiny model, data and real trainers that take seconds on a CPU.

trainer = tiny_trainer("grpo", tiny_model(tmp_path / "model"), tmp_path / "run")
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext_hooks import TrainerKind

from ..support.random_state import untouched_torch_state

if TYPE_CHECKING:
    from datasets import Dataset

_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool['function']['name'] }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_CALLS = (
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
)
_RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
"""Response template with which transformers reads tool calls from a completion."""


def tiny_model(folder: str | Path, *, tools: bool = False, **config: Any) -> str:
    """Saves a two-layer Qwen2 with a character tokenizer and a chat template and returns its folder. Always the same.

    Args:
        folder: Where to save it.
        tools: Whether template and tokenizer know tool calls, for TRL's `tools=[...]`. The model is not trained, so it
            takes `calls` to make it call.
        config: Settings of the architecture to override, such as `num_hidden_layers`.
    """
    import torch
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from tokenizers import decoders as token_decoders
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    marks = ["<tool_call>", "</tool_call>"] if tools else []
    # transformers reads the tokenizer of every Qwen2 as a byte-level one, like that of its hub models
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [spell.pre_tokenize_str(chr(code))[0][0] for code in [*range(32, 127), ord("\n")]]
    vocabulary = {token: index for index, token in enumerate([*special, *letters, *marks])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated"), spell])
    backend.decoder = token_decoders.ByteLevel()
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = _TEMPLATE
    if tools:
        tokenizer.chat_template = _TOOLS + _TEMPLATE.replace("{{ message['content'] }}", _CALLS)
        tokenizer.response_template = _RESPONSE
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    architecture = Qwen2Config(vocab_size=len(vocabulary), **ids, **shape | config)
    with untouched_torch_state():  # the caller's random numbers stay as they are
        torch.manual_seed(0)
        Qwen2ForCausalLM(architecture).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_data(kind: TrainerKind = "grpo", rows: int = 16) -> Dataset:
    """Makes prompts with the columns `answer` and `index`, or preference pairs for DPO."""
    from datasets import Dataset

    prompts = [[{"role": "user", "content": f"{i}+{i}="}] for i in range(rows)]
    if kind == "dpo":
        chosen = [[{"role": "assistant", "content": str(2 * i)}] for i in range(rows)]
        rejected = [[{"role": "assistant", "content": "no idea"}] for _ in range(rows)]
        return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    return Dataset.from_dict(
        {"prompt": prompts, "answer": [str(2 * i) for i in range(rows)], "index": list(range(rows))}
    )


def calls(folder: str, name: str, likelihood: float = 3.0, end: float = 3.0, **arguments: Any) -> dict[str, Any]:
    """Returns `generation_kwargs` with which the untrained tiny model calls a tool now and then, in TRL's own loop.

    A bias on sequences makes the first token of a call likely, and what follows it certain.

    Args:
        folder: Folder of `tiny_model(..., tools=True)`.
        name: Name of the tool.
        likelihood: Added to the logit of a call's first token wherever nothing else is certain.
        end: Added there to the logit of the end of a turn.
        arguments: Arguments of the call.
    """
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # after the first token of a call, every longer beginning of it makes its next token certain
    written = tokenizer("<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>")[
        "input_ids"
    ]
    stop = tokenizer.eos_token_id
    certain = [[[*written, stop][:length], 100.0] for length in range(2, len(written) + 2)]
    return {"sequence_bias": [[[written[0]], likelihood], [[stop], end], *certain]}


class Scripted:
    """A `rollout_func` that replays given rollouts: one list of rows per round, from the first again after the last.

    A row is a mapping of fields, which reward functions get as keyword arguments (see `reported`). Two fields are
    optional: `completion_ids`, by default different in length and content from row to row, and `env_mask`, which is 0
    on tokens that the model did not write.
    """

    def __init__(self, *rounds: Sequence[Mapping[str, Any]]) -> None:
        self.rounds = itertools.cycle(rounds)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        rows = next(self.rounds)
        if len(rows) != len(prompts):
            raise ValueError(f"the script has {len(rows)} rows for {len(prompts)} prompts")
        default_ids = [[10 + (7 * i + j) % 80 for j in range(2 + i % 3)] for i in range(len(rows))]
        fields = {name: [row[name] for row in rows] for name in rows[0]}
        fields["completion_ids"] = [row.get("completion_ids", ids) for row, ids in zip(rows, default_ids, strict=True)]
        return {**fields, "prompt_ids": [[20 + len(prompt)] for prompt in prompts], "logprobs": None}


def reported(name: str) -> Callable[..., list[float | None]]:
    """Makes a reward function called `name` that returns the field `name` of every rollout."""

    def reward(**kwargs: Any) -> list[float | None]:
        return list(kwargs[name])

    reward.__name__ = name
    return reward


def digits(completions: list[Any], **kwargs: Any) -> list[float]:
    """Rewards the share of digits in a completion."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def brevity(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Rewards short completions: 1 for an empty one, less for every token."""
    return [1.0 / (1 + len(ids)) for ids in completion_ids]


def tiny_args(kind: TrainerKind, output: str | Path, **settings: Any) -> Any:
    """Makes training arguments for two steps on a CPU. `settings` override them."""
    from trl import DPOConfig, GRPOConfig, RLOOConfig

    common: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if kind == "dpo":
        return DPOConfig(**common | settings)
    common |= {"num_generations": 4, "max_completion_length": 8}
    return (GRPOConfig if kind == "grpo" else RLOOConfig)(**common | settings)


def tiny_trainer(
    kind: TrainerKind,
    model: str,
    output: str | Path,
    *,
    cls: type[Any] | None = None,
    rewards: list[Callable[..., Any]] | None = None,
    data: Dataset | None = None,
    trainer: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Makes a real TRL trainer on the tiny model.

    Args:
        kind: Which trainer.
        model: Folder made by `tiny_model`.
        output: Output folder of the run.
        cls: Trainer class, by default TRL's.
        rewards: Reward functions, by default `digits` and `brevity`.
        data: Training data, by default `tiny_data`.
        trainer: Further arguments of the trainer, which win over the others.
        settings: Training arguments that differ from `tiny_args`.
    """
    from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

    cls = cls or {"grpo": GRPOTrainer, "rloo": RLOOTrainer, "dpo": DPOTrainer}[kind]
    arguments: dict[str, Any] = {
        "model": model,
        "args": tiny_args(kind, output, **settings),
        "train_dataset": tiny_data(kind) if data is None else data,
    }
    if kind != "dpo":
        arguments["reward_funcs"] = [digits, brevity] if rewards is None else rewards
    return cls(**arguments | dict(trainer or {}))


def metrics_of(trainer: Any) -> list[dict[str, Any]]:
    """Returns the logged metrics of a run without times, to compare two runs."""
    of_time = ("runtime", "per_second", "step_time", "profiling", "total_flos", "epoch")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in of_time)}
        for entry in trainer.state.log_history
    ]
