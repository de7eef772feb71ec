"""The metrics that are shown."""

from trl_ext.train import log_metrics

from .histories import evaluation, training


def test_shown_metrics():
    assert log_metrics.shown(training(1, 0.5, 0.25)) == {"good": 0.5, "total reward": 0.25, "length": 8.0}
    assert log_metrics.shown(evaluation(1, 0.5), "eval_") == {"good": 0.5, "total reward": 0.5, "length": 4.0}
    pairs = {"loss": 0.7, "rewards/chosen": 1.0, "rewards/accuracies": 0.5, "rewards/margins": 0.1}
    assert log_metrics.shown(pairs) == {"loss": 0.7, "accuracy": 0.5, "margin": 0.1}
    assert log_metrics.shown(training(1) | {"rewards/good/mean": None}) == {"total reward": 0.0, "length": 8.0}
