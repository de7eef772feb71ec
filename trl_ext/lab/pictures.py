"""Pictures: what a task whose tools show images has besides tokens. The model is a small Gemma 3 with a vision tower.

Gemma 3 is a family whose images TRL's tool loop carries; `trl_ext/environments/README.md` lists them.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .definition import Shape

BEGIN, PICTURE, END = "<|vision|>", "<|image|>", "<|/vision|>"
"""Tokens before, for the patches of, and behind a picture; TRL looks for the middle one by its name."""
NAMES = {"boi_token": BEGIN, "image_token": PICTURE, "eoi_token": END}


def patches(shape: Shape) -> int:
    """How many tokens a picture takes, apart from those around it."""
    return (shape.picture // shape.patch) ** 2


def processor(shape: Shape, tokenizer: Any) -> Any:
    """The tokenizer with an image processor that works without torchvision."""
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    images = Gemma3ImageProcessorPil(size={"height": shape.picture, "width": shape.picture})
    return Gemma3Processor(images, tokenizer, image_seq_length=patches(shape), chat_template=tokenizer.chat_template)


def configuration(shape: Shape, tokenizer: Any) -> Any:
    """A Gemma 3 of this shape; the vision tower has one layer of the same width."""
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    ids = dict(zip(NAMES, tokenizer.convert_tokens_to_ids(list(NAMES.values())), strict=True))
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        query_pre_attn_scalar=shape.width // shape.heads,
        max_position_embeddings=shape.positions,
        sliding_window=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        image_size=shape.picture,
        patch_size=shape.patch,
    )
    return Gemma3Config(
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=patches(shape),
        boi_token_index=ids["boi_token"],
        image_token_index=ids["image_token"],
        eoi_token_index=ids["eoi_token"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def as_json(value: Any) -> dict[str, str]:
    """A picture of a trace, for `json.dumps(default=...)`.

    Raises:
        TypeError: It is no image of Pillow.
    """
    if not hasattr(value, "save"):
        raise TypeError(f"{type(value).__name__} is neither JSON nor an image")
    file = io.BytesIO()
    value.save(file, format="PNG")
    return {"png": base64.b64encode(file.getvalue()).decode()}


def in_order(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The pictures of a conversation that comes from JSON."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["image"]["png"] for parts in contents for part in parts if part["type"] == "image"]


def expanded(tokens: Sequence[int], learnt: Sequence[int], shape: Shape, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and marks with every `BEGIN` replaced by what the processor makes of it."""
    begin = tokenizer.convert_tokens_to_ids(BEGIN)
    whole = tokenizer.encode(processor(shape, tokenizer).full_image_sequence, add_special_tokens=False)
    ids: list[int] = []
    marks: list[int] = []
    for token, mark in zip(tokens, learnt, strict=True):
        ids += whole if token == begin else [token]
        marks += [mark] * (len(whole) if token == begin else 1)
    return ids, marks


def collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Batches for the warm-up from rows with `input_ids`, `labels` and `pictures`."""
    import torch
    from PIL import Image
    from torch.nn.utils.rnn import pad_sequence

    @functools.cache
    def pixels(picture: str) -> Any:
        image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
        return processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]

    tokenizer = processor.tokenizer
    image = tokenizer.convert_tokens_to_ids(PICTURE)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, padding_value=-100)
        return {
            "input_ids": ids,
            "attention_mask": (ids != tokenizer.pad_token_id).long(),
            "token_type_ids": (ids == image).long(),
            "labels": labels,
            "pixel_values": torch.cat([pixels(picture) for row in rows for picture in row["pictures"]]),
        }

    return collate
