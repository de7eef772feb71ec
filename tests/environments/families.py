"""Tiny vision-language models of several families, made from configurations, with one tokenizer and one template.

Whether TRL's tool loop carries the images of a tool does not depend on what a model has learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, PATCH, SIDE = 32, 8, 16
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SPECIAL = [
    *("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<start_of_image>", "<end_of_image>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<image_soft_token>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<IMG_CONTEXT>", "<img>", "</img>"),
]
TEMPLATE = """\
{%- macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}
{%- if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool['function']['name'] }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ shown(message['content'] or '') }}
{%- for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}
{{- '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tokenizer(image: str, **named: str) -> Any:
    """Characters, and the special tokens of all families; `image` is what stands for an image in the template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from trl_ext.testing.tiny import _RESPONSE

    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    marks = ["<tool_call>", "</tool_call>"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters, *marks])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    special = [token for token in SPECIAL[2:] if token != "<|im_end|>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=special,
        **named,
    )
    made.chat_template = TEMPLATE.replace("IMAGE", image)
    made.response_template = _RESPONSE
    return made


def ids(made: Any, token: str) -> dict[str, int]:
    return {
        "vocab_size": len(made),
        "pad_token_id": made.pad_token_id,
        "eos_token_id": made.eos_token_id,
        "bos_token_id": None,
    } | ({"image_token_id": made.convert_tokens_to_ids(token)} if token else {})


def llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    made = tokenizer("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, **ids(made, "")),
        image_token_index=made.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = LlavaProcessor(
        images,
        made,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=made.chat_template,
    )
    return LlavaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    made = tokenizer("<start_of_image>", **named)
    patches = (SIDE // PATCH) ** 2
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Gemma3TextConfig(**TEXT, **ids(made, ""), query_pre_attn_scalar=8),
        image_token_index=made.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=made.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=made.convert_tokens_to_ids("<end_of_image>"),
        mm_tokens_per_image=patches,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = Gemma3Processor(images, made, image_seq_length=patches, chat_template=made.chat_template)
    return Gemma3ForConditionalGeneration(config), processor


def qwen2_vl(version: str = "2") -> tuple[Any, Any]:
    import transformers

    name = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    processor_class = getattr(transformers, f"{name}Processor")  # type: ignore
    made = tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    vision: dict[str, Any] = {"depth": 1, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 1}
    if version == "2":
        vision |= {"embed_dim": WIDTH, "hidden_size": WIDTH}
    else:
        vision |= {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 64}
    if version == "2.5":
        vision |= {"fullatt_block_indexes": [0], "window_size": 16}
    if version == "3":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    marks = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = config_class(
        text_config={**TEXT, **ids(made, ""), "rope_parameters": rope},
        vision_config=vision,
        **{key: made.convert_tokens_to_ids(token) for key, token in marks.items()},
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=1, size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    )

    class WithoutVideo(processor_class):  # the video processor, and it alone, needs torchvision
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", None
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(self.image_token), None
            transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return model_class(config), WithoutVideo(images, made, chat_template=made.chat_template)


def idefics3() -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlamaConfig,
    )

    made = tokenizer("<image>")
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
        ),
        made,
        image_seq_len=1,
        chat_template=made.chat_template,
    )
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**TEXT, **ids(made, "")),
        image_token_id=made.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=made.pad_token_id,
        tie_word_embeddings=True,
    )
    return Idefics3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": lambda: qwen2_vl("2.5"),
    "qwen3-vl": lambda: qwen2_vl("3"),
    "idefics3": idefics3,
}


def save(family: str, folder: Path) -> tuple[str, Any]:
    """Makes a model and its processor; saves the model and returns its folder and the processor."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = FAMILIES[family]()
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return str(folder), processor
