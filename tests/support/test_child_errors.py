"""Errors of child processes, which the parent prints once."""

from trl_ext.support import child_errors


def fail(monkeypatch, folder, rank, error):
    monkeypatch.setenv("TRL_EXT_FAILURES", str(folder))
    monkeypatch.setenv("RANK", str(rank))
    return child_errors.write_error(error)


def test_what_all_workers_met_is_told_once(monkeypatch, tmp_path, capsys):
    from trl_ext import ConfigError

    assert [fail(monkeypatch, tmp_path, rank, ConfigError("the same thing")) for rank in range(3)] == [2, 2, 2]
    assert child_errors.print_errors(tmp_path, 1) == 2
    assert capsys.readouterr().err == "error: the same thing\n"


def test_other_errors_keep_their_traceback(monkeypatch, tmp_path, capsys):
    from trl_ext import ConfigError

    fail(monkeypatch, tmp_path, 0, ConfigError("ours"))
    try:
        raise ValueError("not ours")
    except ValueError as error:
        assert fail(monkeypatch, tmp_path, 1, error) == 1
    assert child_errors.print_errors(tmp_path, 1) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ours\nTraceback") and text.endswith("error: ValueError: not ours\n")


def test_a_process_that_was_killed(tmp_path, capsys):
    assert child_errors.print_errors(tmp_path, -9) == 1
    assert "ended by SIGKILL, which the system sends when memory runs out" in capsys.readouterr().err
    assert child_errors.print_errors(tmp_path, 3) == 1
    assert "exit code 3" in capsys.readouterr().err
    assert child_errors.print_errors(tmp_path, 0) == 0
