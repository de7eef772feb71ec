"""Pictures for tasks whose tools return images: tokens, processor, configuration and batches of a small Qwen2-VL.

TRL's tool loop carries images for this family. `trl_ext/environments/README.md` lists others, with the reasons.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .definition import Shape

BEGIN, PICTURE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
"""Tokens before a picture, for each of its patches, and after it. TRL looks for the middle one by its name."""
MARKS = (BEGIN, PICTURE, END)


def patches(shape: Shape) -> int:
    """Returns how many tokens a picture takes, without those around it."""
    return (shape.picture // shape.patch) ** 2


@functools.cache
def _processor_class() -> Any:
    from transformers import ProcessorMixin, Qwen2VLProcessor

    class PictureProcessor(Qwen2VLProcessor):
        """Qwen2-VL's processor without videos, which would need torchvision."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token, self.video_token = PICTURE, None
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(PICTURE), None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return PictureProcessor


def processor(shape: Shape, tokenizer: Any) -> Any:
    """Joins a tokenizer and an image processor, for TRL's `processing_class`."""
    from transformers import Qwen2VLImageProcessorPil

    pixels = shape.picture**2
    images = Qwen2VLImageProcessorPil(
        patch_size=shape.patch, merge_size=1, size={"shortest_edge": pixels, "longest_edge": pixels}
    )
    return _processor_class()(images, tokenizer, chat_template=tokenizer.chat_template)


def processor_of(folder: str, shape: Shape) -> Any:
    """Returns the processor for the folder of a model."""
    from transformers import PreTrainedTokenizerFast

    return processor(shape, PreTrainedTokenizerFast.from_pretrained(folder))


def configuration(shape: Shape, tokenizer: Any) -> Any:
    """Returns the configuration of a Qwen2-VL. Its vision tower has one layer of the same width."""
    from transformers import Qwen2VLConfig

    begin, picture, end = tokenizer.convert_tokens_to_ids(list(MARKS))
    half = shape.width // shape.heads // 2  # rotary frequencies of a head, shared by time, height and width
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.width,
            "intermediate_size": shape.feed_forward,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "max_position_embeddings": shape.positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            "tie_word_embeddings": True,
            **ids,
        },
        vision_config={
            "depth": 1,
            "embed_dim": shape.width,
            "hidden_size": shape.width,
            "num_heads": shape.heads,
            "mlp_ratio": 2,
            "patch_size": shape.patch,
            "spatial_merge_size": 1,
        },
        image_token_id=picture,
        video_token_id=tokenizer.unk_token_id,  # there are no videos, and TRL would let the model sample their token
        vision_start_token_id=begin,
        vision_end_token_id=end,
        tie_word_embeddings=True,
        **ids,
    )


def as_json(value: Any) -> dict[str, str]:
    """Encodes a picture of a trace, for `json.dumps(default=...)`.

    Raises:
        TypeError: The value is not an image of Pillow.
    """
    if not hasattr(value, "save"):
        raise TypeError(f"{type(value).__name__} is neither JSON nor an image")
    file = io.BytesIO()
    value.save(file, format="PNG")
    return {"png": base64.b64encode(file.getvalue()).decode()}


def in_order(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the encoded pictures of a conversation in their order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [block["image"]["png"] for blocks in contents for block in blocks if block["type"] == "image"]


def expanded(tokens: Sequence[int], learnt: Sequence[int], shape: Shape, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Repeats `PICTURE` for every patch, as the processor does, in token ids and in the marks beside them."""
    picture, count = tokenizer.convert_tokens_to_ids(PICTURE), patches(shape)
    ids: list[int] = []
    marks: list[int] = []
    for token, mark in zip(tokens, learnt, strict=True):
        repeated = count if token == picture else 1
        ids += [token] * repeated
        marks += [mark] * repeated
    return ids, marks


def collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Makes the collator of the warm-up, for rows with `input_ids`, `labels` and `pictures`."""
    import torch
    from PIL import Image
    from torch.nn.utils.rnn import pad_sequence

    @functools.cache
    def pixels(picture: str) -> tuple[Any, Any]:
        image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
        features = processor.image_processor(images=[image], return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"]

    tokenizer = processor.tokenizer
    picture_token = tokenizer.convert_tokens_to_ids(PICTURE)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], True, padding_value=-100)
        values, grids = zip(*(pixels(picture) for row in rows for picture in row["pictures"]), strict=True)
        return {
            "input_ids": ids,
            "attention_mask": (ids != tokenizer.pad_token_id).long(),
            "mm_token_type_ids": (ids == picture_token).long(),
            "labels": labels,
            "pixel_values": torch.cat(values),
            "image_grid_thw": torch.cat(grids),
        }

    return collate
