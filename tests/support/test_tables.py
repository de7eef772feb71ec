"""Tables in pipes and terminals, and durations."""

import pytest

from trl_ext.support.tables import duration, print_table


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (75, "1:15"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_tables_keep_words_whole_in_pipes_and_narrow_terminals(monkeypatch, capsys):
    row = ["a-name", "word " * 60, "[not markup]"]
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(["x", "y", "z"], [row])
    lines = capsys.readouterr().out.splitlines()
    assert any("word " * 59 in line and "[not markup]" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "60")
    print_table(["x", "y", "z"], [row])
    text = capsys.readouterr().out
    assert text.count("word") == 60 and max(map(len, text.splitlines())) <= 60
