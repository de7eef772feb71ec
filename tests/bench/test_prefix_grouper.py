"""PrefixGrouper in every form: exact, as its speed would otherwise be compared with a wrong result."""

import importlib.util
from typing import get_args

import pytest

from trl_ext.bench import prefix_grouper, shared_prefix


@pytest.mark.skipif(importlib.util.find_spec("prefix_grouper") is None, reason="PrefixGrouper is not installed")
def test_every_form_of_prefix_grouper_is_exact():
    model, shape = shared_prefix.load_model(None), (24, 3, 8)
    ids, mask = shared_prefix.make_batch(model, shape)
    dense = shared_prefix.dense_logps(model, ids, mask, 8)
    for form in get_args(prefix_grouper.Form):
        grouped = prefix_grouper.grouped_logps(model, ids, shape, form)
        assert (grouped - dense).abs().max() < 5e-6
