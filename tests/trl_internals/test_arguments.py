"""TRL's parser and the objects that it makes."""

import json

import pytest

from trl_ext.testing import tiny_data
from trl_ext.trl_internals import arguments


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), (True, True), ("false", None), (False, None), (None, None), ("none", None), ("a/b", "a/b")],
)
def test_resume_words(value, expected):
    assert arguments.resume_value(value) == expected


def test_every_trainer_parses(model, tmp_path):
    tiny_data("grpo").to_json(tmp_path / "data" / "train.jsonl")
    for kind in ("grpo", "rloo", "dpo"):
        argv = ["--model_name_or_path", model, "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        parsed = arguments.parse(kind, argv, {"dataset_name": str(tmp_path / "data"), "resume_from_checkpoint": "true"})
        assert parsed[1].resume_from_checkpoint is True and parsed[2].model_name_or_path == model
        assert json.loads(json.dumps(arguments.load_data(parsed)[0]))["prompt"]
