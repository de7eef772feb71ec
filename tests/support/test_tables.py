"""Tables in pipes and terminals, and durations."""

import pytest

from trl_ext.support.tables import duration, print_table


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (75, "1:15"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("columns", [None, 120, 80, 60, 40, 24, 12])
def test_tables_fold_and_leave_nothing_out(columns, monkeypatch, capsys):
    """A pipe is 80 characters wide. Below the least widths of the columns, a row is a list of its cells."""
    names = ["name", "trainers", "what it changes", "number"]
    row = ["a-name", "grpo, rloo, dpo", "word " * 60 + "a_word_that_is_longer_than_a_column_of_the_table", "[0.5]"]
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    print_table(names, [row, row], title="what is " * 20 + "shown")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= (columns or 80)
    assert lines == [line.rstrip() for line in lines]
    shown = "".join("".join(lines).split())
    for cell in row:
        assert all(shown.count(letter) >= 2 * cell.count(letter) for letter in set(cell) - {" "}), cell
    if (columns or 80) >= 40:
        assert sum(line.count("word") for line in lines) == 2 * 61 and any("[0.5]" in line for line in lines)


def test_columns_that_fit_stay_on_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(["", ""], [["paper", "arXiv 2601.05242"], ["stages", "rewards, advantages"]])
    assert capsys.readouterr().out == "paper    arXiv 2601.05242\nstages   rewards, advantages\n"


def test_wide_characters_are_counted_as_the_terminal_shows_them(monkeypatch, capsys):
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", "40")
    print_table(["x", "y"], [["名前" * 15, "word " * 20]])
    assert max(map(cell_len, capsys.readouterr().out.splitlines())) <= 40
