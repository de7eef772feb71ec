"""Help texts of commands, wrapped at the width of the terminal, and wrong use as errors of ours."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import ConfigError

_COMMAND = "  trl_ext "
"""How the line of an example begins."""


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, wraps its help at the width of the terminal and raises our errors."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\nSee `{self.prog} --help`.")


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(reflow(text, width))

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        if usage is None:
            return super()._format_usage(usage, actions, groups, prefix)
        start = "usage: "
        lines = []
        for line in usage.splitlines():  # one for each way to use the command
            lines.append(_wrap(line, self._width, start, " " * (len(start) + 4)))
            start = " " * len(start)
        return "\n".join(lines) + "\n\n"


def reflow(text: str, width: int) -> list[str]:
    """Breaks a help text at a width.

    Paragraphs and the explanations below examples are filled. A command that is too long goes on after a backslash.
    Other lines with an indentation stay lines.
    """
    lines: list[str] = []
    example = False  # whether the block before was a command, so that an explanation may follow
    for indent, block in _blocks(text.split("\n")):
        space = " " * indent
        if block[0].startswith(_COMMAND):
            command = " ".join(line.strip().removesuffix("\\").rstrip() for line in block)
            lines += _broken_command(command, width, space)
        elif indent == 0 or example:
            lines += _wrap(" ".join(line.strip() for line in block), width, space, space).split("\n")
        else:
            for line in block:
                column = re.match(r" +\S+(?: \S+)*  +(?=\S)", line)  # the second column of a listing
                hanging = " " * (len(column.group()) if column else indent)
                lines += [line] if len(line) <= width else _wrap(line.strip(), width, space, hanging).split("\n")
        example = block[0].startswith(_COMMAND)
    return lines


def _blocks(lines: Sequence[str]) -> Iterable[tuple[int, list[str]]]:
    """Yields the lines that belong together, with their indentation: a command is one block with its continuations."""
    block: list[str] = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        goes_on = block and block[-1].endswith("\\")
        same = block and indent == len(block[0]) - len(block[0].lstrip()) and line.strip() and block[0].strip()
        if block and not goes_on and (not same or line.startswith(_COMMAND)):
            yield len(block[0]) - len(block[0].lstrip()), block
            block = []
        block.append(line)
    if block:
        yield len(block[0]) - len(block[0].lstrip()), block


def _broken_command(command: str, width: int, space: str) -> list[str]:
    """Returns the lines of a command, each but the last with a backslash at its end."""
    # a value stays beside its option
    words = re.sub(r"(?<= )(--\S+) (?!-)", "\\1\0", command)
    lines = _wrap(words, width - 2, space, space + "    ").replace("\0", " ").split("\n")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _wrap(text: str, width: int, first: str, others: str) -> str:
    return textwrap.fill(
        text,
        max(width, 20),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
