"""Tokenizer of a task: characters, and the words that the task wants as one token each.

The vocabulary is spelled like that of a byte-level BPE (`Ċ` is a line break). The chat template knows tools and marks
what the assistant says. The response template lets TRL read tool calls.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ConfigError
from . import pictures
from .definition import Task

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>")
CHARACTERS = ("\n", *map(chr, range(32, 127)))

# A message is its role, its text and END. Tools are listed with the names of their parameters only, to stay short.
CHAT_TEMPLATE = """\
{%- macro shown(content) %}
{%- if content is string %}{{ content }}
{%- else %}
{%- for part in content or [] %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor %}
{%- endif %}
{%- endmacro %}
{%- if tools %}{{ '<|tools|>' }}
{%- for tool in tools %}
{%- set called = tool.function if tool.function is defined else tool %}
{{- called.name + '(' + (called.parameters.properties | default({}, true) | list | join(',')) + ')' }}
{%- endfor %}{{ '<|end|>' }}
{%- endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.role == 'assistant' %}
{{- message.prefix | default('', true) }}
{%- generation %}
{{- shown(message.content) }}
{%- for call in message.tool_calls | default([], true) %}
{%- set called = call.function if call.function is defined else call %}
{{- '<tool_call>\\n{"name": "' + called.name + '", "arguments": ' }}
{{- called.arguments if called.arguments is string else called.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endgeneration %}
{%- else %}
{{- shown(message.content) }}{{ '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": END, "content": "text"},
    },
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Everything that determines a tokenizer.

    Attributes:
        words: Texts of more than one character that are one token, the longest first.
        characters: Texts of one character that are tokens.
        calls: Whether the tokenizer reads tool calls.
        sees: Whether there are tokens for pictures.
    """

    words: tuple[str, ...]
    characters: tuple[str, ...]
    calls: bool
    sees: bool = False

    @classmethod
    def of(cls, task: Task) -> Vocabulary:
        """Returns the vocabulary of a task."""
        tools = tools_of(task)
        words = {*task.words, *_words_of_calls(tools)}
        for word in words:
            if not word or any(special in word for special in (PAD, UNKNOWN, END, *ROLES, *pictures.MARKS)):
                raise task.broken(f"`words` holds {word!r}; a word is a text without the tokens of the chat template.")
        characters = {*CHARACTERS, *(letter for word in words for letter in word)}
        longest_first = sorted((word for word in words if len(word) > 1), key=lambda word: (-len(word), word))
        return cls(tuple(longest_first), tuple(sorted(characters)), bool(tools), task.shape.picture > 0)

    def build(self) -> Any:
        """Builds a fast tokenizer of transformers."""
        import transformers
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        spelled = [
            "".join(piece for piece, _ in spell.pre_tokenize_str(text)) for text in (*self.characters, *self.words)
        ]
        marks = pictures.MARKS if self.sees else ()
        tokens = [PAD, UNKNOWN, END, *ROLES, *marks, *spelled]
        backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
        pieces = Regex("|".join([*map(_escape, self.words), r"[\s\S]"]))
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), spell])
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=PAD,
            unk_token=UNKNOWN,
            eos_token=END,
            additional_special_tokens=[*ROLES, *marks],
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        if self.calls:
            if not hasattr(tokenizer, "response_template"):
                raise ConfigError(
                    f"tasks with tools need transformers 5.13 or newer, which reads tool calls; "
                    f"{transformers.__version__} is installed."
                )
            tokenizer.response_template = RESPONSE_TEMPLATE
        return tokenizer


def tools_of(task: Task) -> list[Callable[..., Any]]:
    """Returns the tools of a task and of its environment, in the order in which TRL lists them."""
    tools = list(task.tools)
    if task.environment is not None:
        environment = task.environment()
        tools += [
            getattr(environment, name)
            for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
            if name not in ("reset", "get_reward") and not name.startswith("_")
        ]
    return tools


def _words_of_calls(tools: Iterable[Callable[..., Any]]) -> set[str]:
    """Returns the words that keep calls short: a call is JSON, and each text between its values is one token."""
    words: set[str] = set()
    for tool in tools:
        words |= {'<tool_call>\n{"name": "', tool.__name__}
        between = '", "arguments": {'
        for name, parameter in inspect.signature(tool).parameters.items():
            quote = '"' if parameter.annotation in (str, "str") else ""
            words |= {name, f'{between}"{name}": {quote}'}
            between = f"{quote}, "
        words.add(between.removesuffix(", ") + "}}\n</tool_call>")
    return words


def _escape(word: str) -> str:
    """Escapes a word for the regular expressions of tokenizers, which are not those of Python."""
    return re.sub(r"([^\w\s])", r"\\\1", word)
