"""The front page is short, its script runs, and its tables say what the declarations and the tests say."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from trl_ext.catalog import builtins, find
from trl_ext.trl_internals import seams

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIRST_SCREEN = README.partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """Returns the cells of the table below a heading, without the table's head."""
    _, _, section = README.partition(f"\n## {heading}\n")
    table = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1:]]


def test_it_is_short() -> None:
    assert len(README.splitlines()) - len(rows("Methods")) <= 85  # the table grows with the methods


def test_the_first_screen_has_promise_commands_diff_and_one_picture() -> None:
    promise = " ".join(FIRST_SCREEN.split("\n\n")[1].split())
    for content in ("with one line", "stock TRL", "no fork", "no subclass", "undo is exact"):
        assert content in promise, content
    for content in ("make demo", "make test", "```diff\n", "trl_ext train --plugin"):
        assert content in FIRST_SCREEN, content
    assert README.count("![") == FIRST_SCREEN.count("![") == 1


def test_the_install_line_has_the_versions_and_extras_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text, beyond = " ".join(FIRST_SCREEN.split()), seams.BEYOND
    assert f"trl {seams.OLDEST} to {beyond.major}.{beyond.minor - 1}, " in text
    assert f"trl>={seams.OLDEST},<{beyond}" in project["dependencies"]
    (torch,) = [name.removeprefix("torch>=") for name in project["dependencies"] if name.startswith("torch>=")]
    python = project["requires-python"].removeprefix(">=")
    assert f"torch {torch} or later and Python {python} or later" in text
    named = re.findall(r"`([a-z-]+)`", text.partition("Extras: ")[2].partition(".")[0])
    assert {*named, "dev"} == set(project["optional-dependencies"])
    # the reward function of the script needs this extra
    assert re.findall(r"^pip install (.*)$", FIRST_SCREEN, re.MULTILINE) == ['".[math]"']


def test_the_change_of_the_script_is_three_lines() -> None:
    """That the script runs after it is a test of all pages."""
    (diff,) = re.findall(r"```diff\n(.*?)```", FIRST_SCREEN, re.DOTALL)
    lines = diff.splitlines()
    added = [line[1:] for line in lines if line.startswith("+")]
    assert added == ["import trl_ext", 'trl_ext.enable("gdpo")', "trl_ext.disable()"]
    stock = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    compile(stock, "script", "exec")
    assert "trl_ext" not in stock and not any(line.startswith("-") for line in lines)
    assert len([line for line in lines if line]) <= 9


def test_the_table_of_methods_is_that_of_the_declarations() -> None:
    names = []
    for first, method, trainers, when in rows("Methods"):
        link = re.fullmatch(r"\[`([a-z0-9-]+)`\]\(plugins/docs/([a-z0-9-]+)\.md\)", first)
        assert link is not None and link[1] == link[2], first
        plugin, *_ = find.find(link[1])
        names.append(link[1])
        assert trainers == ", ".join(kind.upper() for kind in plugin.trainers), link[1]
        assert not plugin.paper.startswith("arXiv") or f"[{plugin.paper}](" in method, link[1]
        assert 4 < len(when.split()) < 16 and not when.endswith("."), when
    assert sorted(names) == sorted(builtins.BUILTINS)


def test_where_it_ran_is_where_the_tests_run() -> None:
    table = dict(rows("What was run where"))
    assert list(table) == [
        "CPU, one process",
        "DDP, 2 processes on a CPU (gloo)",
        "DDP, 3 processes on a CPU (gloo)",
        "DDP, several machines",
        "FSDP2, ZeRO-2, ZeRO-3",
        "vLLM",
        "CUDA",
    ]
    for where in list(table)[3:]:
        assert table[where].startswith("not run"), where
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert set(re.findall(r"processes\.launch\((\w+),", tests)) == {"2", "count"}
    assert set(re.findall(r"count(?:: int)?\s?=\s?(\d+)\)", tests)) >= {"3"}


def test_methods_that_ran_on_two_processes_are_named() -> None:
    rooms = [ROOT / "tests" / room for room in ("end_to_end", "plugins")]
    fast = builtins_in([ROOT / "tests" / "end_to_end" / "scripts" / "processes.py"])
    scripts = builtins_in(path for room in rooms for path in (room / "scripts").glob("*.py"))
    # a method of `make slow` has a script there, or compares in its own test of training
    own = (ROOT / "tests" / "plugins").glob("*/test_training.py")
    checked = re.compile(r" compare\(2, |processes=2")
    compared = {path.parent.name.replace("_", "-") for path in own if checked.search(path.read_text())}
    (cell,) = [cell for where, cell in rows("What was run where") if where.startswith("DDP, 2")]
    slow, _, not_run = cell.partition("Not run:")
    assert re.findall(r"`([a-z-]+)`", slow) == sorted((scripts | compared) - fast - {"tools"})
    assert set(re.findall(r"`([a-z-]+)`", not_run)) == set(builtins.BUILTINS) - scripts - compared


def builtins_in(paths: Iterable[Path]) -> set[str]:
    """Returns the built-in plugins that programs enable."""
    text = "".join(path.read_text() for path in paths)
    return {name for name in builtins.BUILTINS if f'"{name}"' in text}
