"""Final answers in the data: how they are read, and columns that hold something else."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_ext.testing import tiny_args
from trl_ext_hooks import Config, Refuse, UsageError
from trl_ext_hooks.toolkit.answers import answer_requirements, answer_text, row_answer

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
PROSE = "Half of 48 is 24 and so the sum of both of them is 48 + 24 = 72."
MATH = "The sum is $1+2=3$, so the answer is $\\boxed{3}$."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("72", "72"),
        (" 7 2\n", "7 2"),
        ("-1,000.5", "-1,000.5"),
        ("$72$", "72"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("\\boxed{72}", "72"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("{1}, {2}", "{1}, {2}"),
        ("$5", "$5"),
        ("$", "$"),
        (72, "72"),
        (-3, "-3"),
        (72.0, "72"),  # as a column of whole numbers with a hole is stored
        (np.int64(7), "7"),
        (np.float32(7), "7"),
        (torch.tensor(7), "7"),
        (np.str_("72"), "72"),
        (None, None),
        ("", None),
        (" ", None),
        ("$ $", None),
        (float("nan"), None),
    ],
)
def test_answers_as_text(value: Any, expected: str | None) -> None:
    assert answer_text(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["72"], "['72'], which is of the type list"),
        ([], "[], which is of the type list"),
        ({"value": 72}, "which is of the type dict"),
        (0.5, "0.5, a number that can be written in several ways"),
        (np.float32(0.1), "a number that can be written in several ways"),
        (float("inf"), "inf, a number that can be written in several ways"),
        (True, "True, which is of the type bool"),
        (decimal.Decimal(1), "which is of the type Decimal"),
        (torch.tensor([3]), "tensor([3]), which is of the type Tensor"),
        (np.array(["a"]), "which is of the type ndarray"),
        (GSM8K, "'Natalia sold 48/2 = <<48/2=24>>24  ... >72 clips.\\n#### 72', which is a whole solution"),
        (MATH, "which is a whole solution"),
        ("\\boxed{1} or \\boxed{2}", "which is a whole solution"),
    ],
)
def test_what_is_no_answer(value: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        answer_text(value)
    assert reason in str(caught.value)
    with pytest.raises(UsageError, match="the column 'truth' should hold final answers, and it holds"):
        row_answer({"truth": value}, "truth")


def test_the_answer_of_a_row() -> None:
    assert row_answer({"truth": " 7 "}, "truth") == "7"
    assert row_answer({}, "truth") is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["1", "2", None], None),
        ([1, 2, None], None),
        ([1.0, None, 2.0], None),
        (["1", GSM8K], "a whole solution"),
        ([["1"], ["2"]], "which is of the type list"),
        ([1.0, 0.5], "0.5, a number"),
        ([None, ""], "the column 'truth' is empty in the first 2 rows of the data."),
        (
            ["Half of 48 is 24 and so the sum of both of them is 48 + 24 = 72."] * 2,
            "which is longer than a final answer",
        ),
        (["\\begin{pmatrix}\n1\n\\end{pmatrix}", "1", "2"], None),  # long answers are rare
        (["The Treaty of Westphalia", "no"], None),
        ([], None),
    ],
)
def test_columns_are_read_before_training(values: list[Any], reason: str | None, tmp_path: Any) -> None:
    data = Dataset.from_dict({"prompt": ["p"] * len(values), "truth": values})
    config = Config("grpo", tiny_args("grpo", tmp_path), (), ("prompt", "truth"), (), data=data)
    found = list(answer_requirements(config, "truth", "spae.answer_column"))
    if reason is None:
        assert found == []
    else:
        (refusal,) = found
        assert isinstance(refusal, Refuse) and reason in refusal.what and "set spae.answer_column" in refusal.fix


def test_unknown_data_are_not_refused(tmp_path: Any) -> None:
    for columns, data in ((None, None), (("truth",), None), (("prompt",), Dataset.from_dict({"prompt": ["p"]}))):
        config = Config("grpo", tiny_args("grpo", tmp_path), (), columns, (), data=data)
        assert list(answer_requirements(config, "truth", "spae.answer_column")) == []
