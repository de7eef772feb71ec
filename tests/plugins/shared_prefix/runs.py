"""Pairs of runs: dense as TRL has it, and with shared prefixes."""

import contextlib

import pytest
import torch

import trl_ext
from trl_ext.testing import metrics_of
from trl_ext.trl_internals import seams

PACK = {"shared-prefix": {"min_gain": 0}}
FUSED = seams.trl_version() >= seams.Version("1.15")
NEEDS_FUSED = pytest.mark.skipif(not FUSED, reason="the forward of DPO can be owned from TRL 1.15 on")


def pair(train, kind, *, plugins=(), **settings):
    """The same run dense and shared."""
    torch.manual_seed(0)  # before TRL 1.15 an adapter is made before the trainer seeds
    with trl_ext.enable(*plugins) if plugins else contextlib.nullcontext():
        dense = train(kind, **settings)
    torch.manual_seed(0)
    with trl_ext.enable(*plugins, PACK):
        shared = train(kind, **settings)
    return dense, shared


def assert_same(dense, shared, tolerance=5e-5):
    """Parameters after Adam steps with a large learning rate, where rounding shows most, and every metric of TRL."""
    for (name, a), b in zip(dense.model.named_parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    for left, right in zip(metrics_of(dense), metrics_of(shared), strict=True):
        for key, value in left.items():
            if isinstance(value, float):
                assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def metric(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
