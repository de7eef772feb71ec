"""`trl_ext bench shared-prefix`: small runs of the real measurement."""

import json

import pytest

from trl_ext.cli import main


@pytest.mark.slow
def test_every_figure_is_reported(model, tmp_path, capsys):
    picture = tmp_path / "speed.png"
    shapes = ["--shape", "24x3x8", "--shape", "40x4x8"]
    options = ["--repeats", "1", "--trainer", "--json", "--plot", str(picture)]
    assert main.main(["bench", "shared-prefix", "--model", model, *shapes, *options]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["prompt_length"], first["group_size"], first["completion_length"]) == (24, 3, 8)
    # the last completion token predicts nothing, so it is not packed
    assert first["token_ratio"] == pytest.approx(3 * 32 / (24 + 3 * 7))
    assert second["token_ratio"] == pytest.approx(4 * 48 / (40 + 4 * 7))
    for entry in (first, second):
        assert entry["speedup"] == pytest.approx(entry["seconds_dense"] / entry["seconds_shared"])
        assert entry["max_logprob_diff"] < 5e-6 and 0 < entry["rel_grad_diff"] < 1e-5
        assert entry["flop_ratio"] > 1 and entry["speedup_trainer"] > 0
        assert entry["peak_memory_ratio"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
