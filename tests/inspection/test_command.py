"""`trl_ext inspect` and `trl_ext train --inspect`: what they show, what they choose, and every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import processes
from trl_ext.cli import inspect as command
from trl_ext.cli import main
from trl_ext.inspection import file_format
from trl_ext.testing import tiny_data
from trl_ext.train import command_line, handover
from trl_ext.trl_internals import arguments as trl_arguments
from trl_ext.trl_internals import launch


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the recorded run's folder, to be spoiled."""
    shutil.copytree(folder / "inspect", tmp_path / "run" / "inspect")
    return tmp_path / "run"


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`inspect(*argv)` -> exit code, output and errors of the command in this process."""

    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main(["inspect", *map(str, argv)])
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return code, out.out, out.err

    return run


# --- showing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run", "run/inspect", "run/inspect/round-2.json"])
def test_a_folder_of_a_run_a_folder_of_recordings_and_a_file(place: str, copy: Path, inspect: Any) -> None:
    code, out, err = inspect(copy.parent / place)
    assert code == 0 and out.startswith(f"round {2 if place.endswith('json') else 1} before step")
    rounds = "1 round" if place.endswith("json") else "2 rounds"
    assert f"trl_ext: {rounds} as a page: {copy / 'inspect' / 'inspect.html'}" in err
    assert (copy / "inspect" / "inspect.html").read_text().startswith("<!doctype html>")


def test_choosing_rounds_groups_and_rows(copy: Path, inspect: Any) -> None:
    def rows(*argv: Any) -> list[int]:
        code, out, _ = inspect(copy, *argv)
        assert code == 0
        return [int(number) for number in re.findall(r"^row (\d+)  ", out, re.MULTILINE)]

    assert rows() == list(range(4))
    assert rows("--group", 1, 2) == list(range(4, 12))
    assert rows("--group", "all") == list(range(12))
    assert rows("--rows", 3, 7) == [3, 7]
    assert inspect(copy, "--round", 2)[1].startswith("round 2 before step 2")


def test_the_default_group_is_one_that_differs(copy: Path, inspect: Any) -> None:
    file = copy / "inspect" / "round-1.json"
    content = json.loads(file.read_text())
    for row in content["rows"][:4]:
        row["advantages"] = [0.0, 1e-17, 0.0]
    file.write_text(json.dumps(content))
    _, out, _ = inspect(copy)
    assert "\nrow 4  " in out and "\nrow 0  " not in out and "~0 … ~0" in out


def test_the_page_goes_where_it_is_asked_to(copy: Path, inspect: Any, tmp_path: Path) -> None:
    code, _, err = inspect(copy, "--html", tmp_path / "look.html")
    assert code == 0 and str(tmp_path / "look.html") in err
    assert (tmp_path / "look.html").read_text().startswith("<!doctype html>")
    assert not (copy / "inspect" / "inspect.html").exists()


def test_looking_needs_no_torch(copy: Path) -> None:
    code = (
        "import sys; from trl_ext.cli import main; main.main(['inspect', sys.argv[1]]);"
        "print(sorted({'torch', 'trl', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = processes.run_python(code, str(copy))
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("inspect", "train"):
        with pytest.raises(SystemExit) as stopped:
            main.main([name, "--help"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert "--inspect" in out
    main.main([])
    assert "inspect" in capsys.readouterr().out


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["name what to look at", "trl_ext inspect runs/a", "--plugin gdpo"]),
        (["--round", "1"], ["name what to look at"]),
        (["nowhere"], ["nowhere: there is no such file or folder (looked in"]),
        (["RUN", "--round", "3"], ["--round 3 is not recorded; recorded: 1, 2", "--inspect 2"]),
        (["RUN", "--round", "two"], ["--round: invalid int value: 'two'", "trl_ext inspect --help"]),
        (["RUN", "--group", "3"], ["--group 3: round 1 has no such group; it has 0-2, or say `all`"]),
        (["RUN", "--rows", "1", "12"], ["--rows 12: round 1 has no such row; it has 0-11."]),
        (["RUN", "--rows", "1", "--group", "0"], ["--group and --rows choose the same thing"]),
        (["RUN", "--plugin", "gdpo"], ["--plugin gdpo: with a folder or a file", "leave", "out, or record with"]),
        (["RUN", "--html", "none/page.html"], ["the page cannot be written to none/page.html", "--html PATH"]),
        (["--plugin", "gdop"], ["no plugin is called 'gdop'", "Did you mean 'gdpo'"]),
        (["--plugin", "gdpo", "--learning_rat", "1"], ["has an option --learning_rat"]),
        (["--trainer", "dpo"], ["--inspect records rounds of completions, and the DPO trainer generates none"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused(argv: list[str], words: list[str], copy: Path, inspect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    code, _, err = inspect(*["run" if argument == "RUN" else argument for argument in argv])
    assert code == 2 and all(word in err for word in words), err


def test_rows_that_were_left_out_are_told(copy: Path, inspect: Any) -> None:
    file = copy / "inspect" / "round-1.json"
    file.write_text(file.read_text().replace('"left_out":0', '"left_out":52'))
    _, _, err = inspect(copy, "--rows", 40)
    assert "it has 0-11. Not recorded: 52 rows of the round." in err


def test_a_folder_without_recordings(inspect: Any, tmp_path: Path) -> None:
    (tmp_path / "inspect").mkdir()
    (tmp_path / "inspect" / "round-x.json").write_text("{}")
    code, _, err = inspect(tmp_path)
    assert code == 2 and "holds no recorded rounds" in err
    assert "trl_ext train --plugin gdpo --inspect 2" in err and "trl_ext inspect --plugin gdpo" in err


def test_a_file_that_cannot_be_shown(copy: Path, inspect: Any) -> None:
    file = copy / "inspect" / "round-1.json"
    file.write_text("{")
    code, out, err = inspect(file)
    assert code == 2 and out == "" and f"{file} is not a recorded round (invalid JSON: " in err


@pytest.mark.parametrize("value", ["0", "1.5", "many"])
def test_a_number_of_rounds_that_cannot_be(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--inspect", value]) == 2
    message = capsys.readouterr().err
    assert f"argument --inspect: expected a number of rounds, at least 1, got '{value}'" in message


# --- recording from the command line ----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[command_line.Request]:
    """What the workers get from a launcher that ends at once and records nothing."""
    requests: list[command_line.Request] = []

    def read(args: Any) -> int:
        requests.append(handover.read(Path(args.training_script_args[0])))
        return 0

    monkeypatch.setattr(launch, "launch", read)
    return requests


def test_one_round_of_the_embedded_default(
    launched: Any, inspect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trl_ext.train.demo import model, task

    monkeypatch.setattr(model, "folder", lambda say: Path("the-model"))
    monkeypatch.setattr(task, "folder", lambda say: Path("the-data"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, err = inspect("--plugin", "gdpo")
    assert code == 2 and "the run ended before a round was trained on" in err  # as nothing was launched
    parser = trl_arguments.trl_parser("grpo")
    (request,) = launched
    assert ([spec.name for spec in request.specs], request.inspect, request.save) == (["gdpo"], 1, False)
    settings = vars(parser.parse_known_args(request.arguments)[0])
    expected = command.ONE_ROUND | {"per_device_train_batch_size": 32, "model_name_or_path": "the-model"}
    for name, value in expected.items():
        assert str(settings[name]) in (str(value), f"['{value}']"), name
    assert settings["output_dir"].startswith(str(tmp_path / "trl_ext-inspect-"))
    assert list(tmp_path.iterdir()) == []  # no folder without a recording is left behind


def test_settings_of_the_user_win(launched: Any, inspect: Any, tmp_path: Path) -> None:
    data = ["--model_name_or_path", "m", "--dataset_name", "d"]
    options = ["--max_steps", "7", "--output_dir", "o", "--inspect", 4, "--output_dir", tmp_path]
    code, _, _ = inspect("--plugin", "gdpo", *data, *options)
    assert code == 2 and tmp_path.is_dir()
    (request,) = launched
    assert request.inspect == 4
    settings = vars(trl_arguments.trl_parser("grpo").parse_known_args(request.arguments)[0])
    assert settings["max_steps"] == 7 and settings["output_dir"] == str(tmp_path)


@pytest.mark.slow
def test_it_records_and_shows_one_round(model: str, rounds: Any, tmp_path: Path) -> None:
    """As a user starts it, with a plugin from a file and a YAML file whose output folder is a real run's."""
    (tmp_path / "steps.py").write_text(Path(rounds.__file__).read_text())
    (tmp_path / "data").mkdir()
    rows = tiny_data(rows=12).to_list()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": model, "dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "precious"),
        "reward_funcs": ["steps.numbers", "steps.brief"], "num_generations": 4, "per_device_train_batch_size": 12,
        "max_completion_length": 8, "max_steps": 50, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    paths = os.pathsep.join(path for path in sys.path if path)
    done = processes.run(
        [sys.executable, "-m", "trl_ext", "inspect", "--plugin", "gdpo", "steps.py:Steps", "--config", "run.yaml",
         "--output_dir", "look", "--group", "1", "--html", "look.html"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stdout and "TRL → gdpo → steps" in done.stdout and "\x1b" not in done.stdout
    assert "\nrow 4  " in done.stdout and "\nrow 0  " not in done.stdout and "Model saved" not in done.stdout
    assert f"1 round as a page: {tmp_path / 'look.html'}" in done.stderr
    (file,) = file_format.find(str(tmp_path / "look"))
    assert file_format.read(file).advantage_stages == ["TRL", "gdpo", "steps"]
    left = {path.name for path in (tmp_path / "look").iterdir()}
    assert {"inspect", "trl_ext_run.json"} <= left
    assert not [name for name in left if name.startswith("checkpoint") or name.endswith(".safetensors")]
    assert not (tmp_path / "precious").exists()
    fired = json.loads((tmp_path / "look" / "trl_ext_run.json").read_text())["hooks_fired"]
    assert fired["steps"]["inspect"] == 1
