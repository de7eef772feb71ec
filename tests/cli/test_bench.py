"""`trl_ext bench`: what it prints and refuses."""

from trl_ext.cli import main


def test_shared_prefix_prints_a_table(model, capsys):
    assert main.main(["bench", "shared-prefix", "--model", model, "--shape", "24x3x8", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "24 x 3 x 8" in shown and "2.13" in shown and "Ratios are dense by shared" in shown


def test_a_malformed_shape_is_refused(capsys):
    assert main.main(["bench", "shared-prefix", "--shape", "24x3"]) == 2
    expected = "--shape: a shape is PROMPTxGROUPxCOMPLETION, such as 1024x8x64; got '24x3'"
    assert expected in capsys.readouterr().err
