"""Which metrics of a log entry are shown."""

from __future__ import annotations

from trl_ext.train.log_metrics import is_evaluation, is_training, shown

from .histories import evaluation, training


def test_shown_metrics() -> None:
    assert shown(training(1, 0.5, 0.25)) == {"good": 0.5, "total reward": 0.25, "length": 8.0}
    assert shown(evaluation(1, 0.5), "eval_") == {"good": 0.5, "total reward": 0.5, "length": 4.0}
    pairs = {"loss": 0.7, "rewards/chosen": 1.0, "rewards/accuracies": 0.5, "rewards/margins": 0.1}
    assert shown(pairs) == {"loss": 0.7, "accuracy": 0.5, "margin": 0.1}
    assert shown(training(1) | {"rewards/good/mean": None}) == {"total reward": 0.0, "length": 8.0}


def test_kinds_of_entries() -> None:
    assert is_training(training(1)) and not is_evaluation(training(1))
    assert is_evaluation(evaluation(1, 0.5)) and not is_training(evaluation(1, 0.5))
    assert not is_training({"train_runtime": 1.0}) and not is_evaluation({"train_runtime": 1.0})
