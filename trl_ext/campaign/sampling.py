"""Completions of prompts by a model in this process, reproducible from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..support.random_state import untouched_torch_state


def sampler(
    model: Any, tokenizer: Any, device: torch.device, *, num: int, temperature: float, top_p: float, max_tokens: int
) -> Callable[[list[Any], int], list[list[Any]]]:
    """Returns a function of prompts and a seed that samples `num` completions of each prompt.

    Completions are texts, or messages where the prompts are messages.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; prompts of messages go through its chat template.
        device: Where to sample.
        num, temperature, top_p, max_tokens: As usual; no other filter is applied.
    """
    model = model.to(device).eval()
    settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "max_new_tokens": max_tokens}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def sample(prompts: list[Any], seed: int) -> list[list[Any]]:
        chat = not isinstance(prompts[0], str)
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
            if chat
            else tokenizer(prompt)["input_ids"]
            for prompt in prompts
        ]
        width = max(map(len, ids))
        batch = torch.tensor([[padding] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        with untouched_torch_state(), torch.no_grad():
            torch.manual_seed(seed)
            out = model.generate(
                input_ids=batch, attention_mask=mask, num_return_sequences=num, pad_token_id=padding, **settings
            )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        found = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
        return [found[i * num : (i + 1) * num] for i in range(len(prompts))]

    return sample
