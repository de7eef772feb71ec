"""`trl_ext completion`: what a word may become, and real bash that asks."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import processes
from trl_ext.catalog import builtins, find
from trl_ext.catalog.option_names import option_names
from trl_ext.cli import completion, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", builtins.BUILTINS)
def test_options_read_from_the_source_are_those_of_the_class(name: str) -> None:
    assert option_names(name) == [field.name for field in dataclasses.fields(find.find(name)[0].Options)]


def test_options_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings_of_it.py").write_text("class Base:\n    a: int = 1\n\nclass Mine(Base):\n    b: int = 2\n")
    file = tmp_path / "method_of_it.py"
    file.write_text("from settings_of_it import Mine\n\nclass Method(Plugin):\n    Options = Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        option_names(str(file)) == option_names(f"{file}:Method") == option_names("method_of_it:Method") == ["a", "b"]
    )
    assert option_names("no_such_module:Method") == option_names("nothing.py") == option_names("gdop") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pl", ["plugins"]),
        ("plugins --s", ["--search"]),
        ("plugins --trainer ", ["grpo", "rloo", "dpo"]),
        ("show v", ["verl-rank", "vl-dac"]),
        ("train --plugin gd", ["gdpo"]),
        ("train --plugin gdpo otc thi", ["thinkless"]),
        ("train --no_save --trainer d", ["dpo"]),
        ("train --trainer = d", ["dpo"]),
        ("train --learning_rate 1e-6 --plugin gd", ["gdpo"]),
        ("inspect --plugin gd", ["gdpo"]),
        ("inspect --rou", ["--round"]),
        ("train --plugin gdpo --set gdpo.b", ["gdpo.batch_eps=", "gdpo.batch_norm="]),
        ("train --plugin GDPO --set GDPO.w", ["GDPO.whiten="]),
        ("train --set gd", ["gdpo."]),
        ("train --set gdpo.w", ["gdpo.whiten="]),
        ("train --set gdpo.whiten = ", []),
        ("train --config ", []),
        ("train --plugin my_method.p", []),
        ("bench shared-prefix --tr", ["--trainer"]),
        ("completion f", ["fish"]),
        ("nothing ", []),
    ],
)
def test_what_a_word_may_become(line: str, expected: list[str]) -> None:
    assert completion.complete(line.split(" ")) == expected


def test_every_command_and_plugin_is_offered() -> None:
    assert set(main.COMMANDS) <= set(completion.complete([""]))
    assert set(builtins.BUILTINS) <= set(completion.complete(["train", "--plugin", ""]))


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from trl_ext.cli import main;"
        "main.main(['completion', '--words', 'trl_ext', 'train', '--plugin', 'vl-dac', '--set', 'vl-dac.g']);"
        "print(sorted({'torch', 'trl', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = processes.run_python(code)
    assert done.stdout.split() == ["vl-dac.gamma=", "vl-dac.gae_lambda=", "[]"], done.stdout + done.stderr


BASH = """
source <(trl_ext completion bash)
ask() {
    COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _trl_ext trl_ext "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>/dev/null
    echo "${COMPREPLY[*]}" | tr '\\n' ' '; echo
}
complete -p trl_ext
ask trl_ext comp
ask trl_ext train --plugin gd
ask trl_ext train --plugin gdpo --set gdpo.batch_
ask trl_ext train --trainer = d
ask trl_ext train --config ""
"""


@pytest.fixture
def console_script(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that knows the command `trl_ext`."""
    script = tmp_path / "bin" / "trl_ext"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trl_ext "$@"\n')
    script.chmod(0o755)
    path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(console_script: dict[str, str], tmp_path: Path) -> None:
    done = processes.run(["bash", "--norc", "-c", BASH], env=console_script, cwd=tmp_path)
    assert done.stderr == ""
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["complete", "-o", "default", "-F", "_trl_ext", "trl_ext"],
        ["compare", "completion"],
        ["gdpo"],
        ["gdpo.batch_eps=", "gdpo.batch_norm="],
        ["dpo"],
        [],
    ]


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_the_script_of_a_shell_is_read_without_errors(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "completion --words" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    done = processes.run([shell, "-n", str(tmp_path / "script")])
    assert done.returncode == 0 and done.stderr == ""


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
