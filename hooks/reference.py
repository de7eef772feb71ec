"""Writes the hook reference in hooks/README.md from the docstrings of `trl_ext_hooks.specs`: `make docs`."""

from __future__ import annotations

import inspect
from pathlib import Path

from trl_ext_hooks import specs

README = Path(__file__).parent / "README.md"
MARKER = "<!-- below: written by `make docs` from trl_ext_hooks/specs.py -->\n"


def reference() -> str:
    """One heading per hook with its exact arguments, in the order of the module, and its docstring."""
    parts = []
    for name, function in vars(specs).items():
        if hasattr(function, "trl_ext_spec"):
            arguments = ", ".join(inspect.signature(function).parameters)
            parts.append(f"### {name}({arguments})\n\n{inspect.getdoc(function)}\n")
    return MARKER + "\n" + "\n".join(parts)


if __name__ == "__main__":
    head = README.read_text().split(MARKER)[0]
    README.write_text(head + reference())
