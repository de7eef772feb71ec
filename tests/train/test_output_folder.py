"""What is in an output folder, what may be done to it, and how an interrupted run goes on."""

import dataclasses
import json
import shlex

import pytest

from trl_ext.errors import ConfigError
from trl_ext.train import after_interrupt, output_folder
from trl_ext.train.command_line import Request

REQUEST = Request({}, (), "grpo", None, {}, [])


@pytest.fixture
def folder(tmp_path):
    """`folder(status, *names)` makes an output folder with a record and files; `checkpoint-` names become folders."""

    def make(status, *names):
        if status is not None:
            record = {"status": status, "started": "today", "steps": 7, "max_steps": 100, "trainer": "grpo"}
            record["plugins"] = [{"name": "gdpo"}]
            (tmp_path / output_folder.RECORD).write_text(json.dumps(record))
        for name in names:
            if name.startswith("checkpoint-"):
                (tmp_path / name).mkdir()
                (tmp_path / name / "trainer_state.json").write_text("{}")
            else:
                (tmp_path / name).write_text("")
        return tmp_path

    return make


def refusal(folder, given=None, **request):
    with pytest.raises(ConfigError) as caught:
        output_folder.check(dataclasses.replace(REQUEST, **request), given or {}, folder)
    return str(caught.value)


def test_a_finished_run_is_told_with_what_is_there(folder):
    place = folder("finished", "model.safetensors", "checkpoint-9", "checkpoint-10")
    text = refusal(place)
    assert f"{place} holds a run of 7 steps (GRPO with gdpo, finished) and a model (model.safetensors)" in text
    assert "2 checkpoints (the last is checkpoint-10)" in text
    assert "--output_dir" in text and "--resume_from_checkpoint true" in text and "--overwrite" in text
    output_folder.check(dataclasses.replace(REQUEST, overwrite=True), {}, place)
    output_folder.check(REQUEST, {"resume_from_checkpoint": "true"}, place)


@pytest.mark.parametrize("names", [("adapter_model.safetensors",), ("checkpoint-5",)])
def test_a_model_or_a_checkpoint_without_a_record_is_kept_too(folder, names):
    assert names[0] in refusal(folder(None, *names))


@pytest.mark.parametrize("status", [None, "interrupted", "failed", "running"])
def test_what_holds_nothing_of_value_is_free(folder, status):
    place = folder(status, "notes.txt")
    output_folder.check(REQUEST, {}, place)
    output_folder.check(REQUEST, {}, place / "missing")


def test_options_that_contradict_each_other(folder):
    place = folder("finished", "checkpoint-5")
    assert "Leave one out" in refusal(place, {"resume_from_checkpoint": "true"}, overwrite=True)
    assert "Leave one out" in refusal(place, save=False, save_on_interrupt=True)
    assert "save_only_model" in refusal(place, {"save_only_model": True}, save_on_interrupt=True)


def test_the_model_of_the_run_itself_is_never_removed(folder):
    place = folder("finished", "checkpoint-5")
    text = refusal(place, {"model_name_or_path": str(place / "checkpoint-5")}, overwrite=True)
    assert "--overwrite would remove the model of this run" in text


def test_clearing_leaves_other_files(folder):
    place = folder("finished", "model.safetensors", "model-00001-of-2.safetensors", "checkpoint-5", "notes.txt")
    (place / "my-rewards.safetensors").write_text("of the user")
    output_folder.clear(place)
    assert sorted(path.name for path in place.iterdir()) == ["my-rewards.safetensors", "notes.txt"]


def test_the_command_goes_on_from_the_last_complete_checkpoint(folder):
    place = folder("interrupted", "checkpoint-9", "checkpoint-10")
    (place / "checkpoint-10" / "trainer_state.json").write_text('{"cut')
    argv = ["trl_ext", "train", "--plugin", "gdpo", "--overwrite", "--resume_from_checkpoint", "old", "--beta", "0.1"]
    record = after_interrupt.end_record(place, "today", "interrupted")
    first, second = after_interrupt.lines(place, record, argv, None)
    assert first == f"interrupted after step 7 of 100; saved: {place / 'checkpoint-9'}"
    expected = ["trl_ext", "train", "--plugin", "gdpo", "--beta", "0.1", "--resume_from_checkpoint"]
    assert second == f"go on with: {shlex.join([*expected, str(place / 'checkpoint-9')])}"
    # a file that plugins write last is missing
    assert "no checkpoint was written" in after_interrupt.lines(place, record, argv, "trl_ext_state.pt")[0]


def test_without_a_checkpoint_the_command_would_save_one(folder):
    record = after_interrupt.end_record(folder("running"), "today", "interrupted")
    argv = ["trl_ext", "train"]
    first, second = after_interrupt.lines(folder(None), record, argv, None)
    assert first.startswith("interrupted; no checkpoint was written")  # the record is older than the interruption
    assert second == "start it again with: trl_ext train --save_on_interrupt"
    assert "before training began" in after_interrupt.lines(folder(None), {}, argv, None)[0]


def test_only_the_record_of_this_run_is_changed(folder):
    place = folder("running")
    assert after_interrupt.end_record(place, "another day", "failed") == {}
    assert output_folder.read_record(place)["status"] == "running"
    assert after_interrupt.end_record(place, "today", "failed")["steps"] == 7
    assert output_folder.read_record(place)["status"] == "failed"


def test_a_run_that_a_plugin_owns(folder):
    argv = ["trl_ext", "train", "--plugin", "apo"]
    assert "nothing was written" not in after_interrupt.owned(folder(None, "apo.json"), argv)[0]
    assert after_interrupt.owned(folder(None), argv)[1].endswith("--plugin apo --resume_from_checkpoint true")
    assert after_interrupt.owned(folder(None) / "missing", argv)[1] == f"start it again with: {shlex.join(argv)}"
