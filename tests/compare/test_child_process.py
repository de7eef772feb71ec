"""Functions in other processes: results, words on the way, and every way to die."""

from __future__ import annotations

import os
import signal
import types
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from trl_ext.compare import child_process
from trl_ext.compare.child_process import Failure, Result, Said, Step
from trl_ext.errors import ConfigError, TrlExtError


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`outside(code)` makes a function `work(*args, tell)` in a module that a new process can import."""

    def make(code: str) -> Any:
        name = f"outside_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text("import os, sys, time\n" + code)
        monkeypatch.syspath_prepend(tmp_path)
        return __import__(name).work

    return make


def heard(child: child_process.ChildProcess) -> list[Any]:
    messages = []
    while not messages or not isinstance(messages[-1], Result | Failure):
        messages.append(child.receive())
    return messages


def test_words_and_a_result_and_output_in_a_file(outside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = outside(
        "from trl_ext.compare.child_process import Said, Step\n"
        "def work(a, b, tell):\n"
        "    import torch\n"
        "    tell(Said('beginning')); tell(Step(1, 2, ('loss',)))\n"
        "    print('printed'); os.system('echo from another program')\n"
        "    return a + b, os.environ['TRL_EXT_TEST_VARIABLE'], os.getcwd(), torch.get_num_threads()\n"
    )
    monkeypatch.setenv("TRL_EXT_TEST_VARIABLE", "set after the first process was made")
    monkeypatch.chdir(tmp_path)
    messages = heard(child_process.start(work, 1, 2, log=str(tmp_path / "log")))
    value = (3, "set after the first process was made", str(tmp_path), 1)
    assert messages == [Said("beginning"), Step(1, 2, ("loss",)), Result(value)]
    assert set((tmp_path / "log").read_text().splitlines()) == {"printed", "from another program"}


def test_a_call_that_takes_long_is_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [child_process.Said("checking"), child_process.Result(7)]
    child = types.SimpleNamespace(receive=lambda: messages.pop(0))
    answers = [False, True, False, False, True]
    said: list[str] = []
    monkeypatch.setattr(child_process, "start", lambda *args, log: child)
    monkeypatch.setattr(child_process, "ready", lambda children, timeout: children if answers.pop(0) else [])
    assert child_process.call(print, log="", say=said.append) == 7
    assert said == [
        *("starting a process that loads TRL", "starting a process that loads TRL, 0:00 so far"),
        *("checking", "checking, 0:00 so far", "checking, 0:00 so far"),
    ]


def test_an_error_with_its_traceback(outside: Any, tmp_path: Path) -> None:
    work = outside("def work(tell):\n    raise RuntimeError('broken')\n")
    (failure,) = heard(child_process.start(work, log=str(tmp_path / "log")))
    assert failure.message == "RuntimeError: broken" and failure.error is None
    assert "Traceback" in failure.trace and "RuntimeError: broken" in (tmp_path / "log").read_text()
    with pytest.raises(TrlExtError, match="RuntimeError: broken\nTraceback"):
        child_process.call(work, log=str(tmp_path / "log"), say=print)


def test_an_error_of_ours_keeps_its_class_and_its_words(outside: Any, tmp_path: Path) -> None:
    work = outside("from trl_ext.errors import ConfigError\ndef work(tell):\n    raise ConfigError('set beta=0')\n")
    with pytest.raises(ConfigError, match=r"^set beta=0$"):
        child_process.call(work, log=str(tmp_path / "log"), say=print)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL, which the system sends when memory runs out"),
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("os._exit(3)", "ended with exit code 3 and left no message"),
    ],
)
def test_a_sudden_death_is_told(action: str, words: str, outside: Any, tmp_path: Path) -> None:
    work = outside(f"def work(tell):\n    {action}\n")
    (failure,) = heard(child_process.start(work, log=str(tmp_path / "log")))
    assert words in failure.message


def test_a_log_that_cannot_be_written(outside: Any, tmp_path: Path) -> None:
    work = outside("def work(tell):\n    pass\n")
    (failure,) = heard(child_process.start(work, log=str(tmp_path / "no/log")))
    assert "No such file or directory" in failure.message


def test_stopping_cleans_up_and_ends_what_does_not_listen(
    outside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "PATIENCE", 3.0)
    work = outside(
        "import signal\nfrom trl_ext.compare.child_process import Said\n"
        "def work(deaf, file, tell):\n"
        "    if deaf: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    try:\n        tell(Said('ready')); time.sleep(60)\n"
        "    finally:\n        open(file, 'w').write('cleaned up')\n"
    )
    children = [
        child_process.start(work, deaf, str(tmp_path / str(deaf)), log=str(tmp_path / "log")) for deaf in (0, 1)
    ]
    for child in children:
        assert child.receive() == Said("ready")
    for child in children:
        child.stop()
        assert not child.process.is_alive()
    assert (tmp_path / "0").read_text() == "cleaned up" and not (tmp_path / "1").exists()


def test_a_worker_ends_when_nobody_listens(outside: Any, tmp_path: Path) -> None:
    work = outside(
        "from trl_ext.compare.child_process import Step\n"
        "def work(tell):\n    for step in range(10**6):\n        tell(Step(step, 10**6)); time.sleep(0.01)\n"
    )
    child = child_process.start(work, log=str(tmp_path / "log"))
    child.receive()
    child.pipe.close()
    child.process.join(timeout=20)
    assert child.process.exitcode == 1


def test_an_interrupt_of_the_terminal_is_for_the_parent(outside: Any, tmp_path: Path) -> None:
    work = outside(
        "from trl_ext.compare.child_process import Said\n"
        "def work(tell):\n    tell(Said('ready')); time.sleep(0.5); return 'went on'\n"
    )
    child = child_process.start(work, log=str(tmp_path / "log"))
    assert child.receive() == Said("ready")
    os.kill(child.process.pid, signal.SIGINT)
    assert child.receive() == Result("went on")


def test_this_process_needs_neither_torch_nor_trl() -> None:

    code = (
        "import sys, trl_ext.compare.schedule, trl_ext.compare.html_report, trl_ext.cli.compare\n"
        "print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    done = processes.run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
