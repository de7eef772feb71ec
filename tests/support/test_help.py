"""Help texts at any width."""

from __future__ import annotations

import pytest

from trl_ext import ConfigError
from trl_ext.support.help import Parser, reflow

TEXT = """\
Says in a paragraph
what it does.

examples:
  trl_ext train --plugin gdpo --config run.yaml \\
      --learning_rate 1e-6
      explains what the command above does
  trl_ext new it

in the file:
  plugins:
    gdpo: {group_eps: 1.0e-4}
  name   a listing with two columns"""


def test_a_wide_terminal_joins_lines() -> None:
    assert reflow(TEXT, 90) == [
        "Says in a paragraph what it does.",
        "",
        "examples:",
        "  trl_ext train --plugin gdpo --config run.yaml --learning_rate 1e-6",
        "      explains what the command above does",
        "  trl_ext new it",
        "",
        "in the file:",
        "  plugins:",
        "    gdpo: {group_eps: 1.0e-4}",
        "  name   a listing with two columns",
    ]


def test_a_narrow_terminal_breaks_them() -> None:
    assert reflow(TEXT, 34) == [
        "Says in a paragraph what it does.",
        "",
        "examples:",
        "  trl_ext train --plugin gdpo \\",
        "      --config run.yaml \\",
        "      --learning_rate 1e-6",
        "      explains what the command",
        "      above does",
        "  trl_ext new it",
        "",
        "in the file:",
        "  plugins:",
        "    gdpo: {group_eps: 1.0e-4}",
        "  name   a listing with two",
        "         columns",
    ]


def test_wrong_use_is_an_error_of_ours() -> None:
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --frob\nSee `trl_ext show --help`"):
        Parser("trl_ext show").parse_args(["--frob"])
