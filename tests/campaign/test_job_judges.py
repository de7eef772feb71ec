"""Asynchronous judges of a plugin that owns its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_ext.campaign.job import LocalJob
from trl_ext.testing import tiny_args, tiny_data

JUDGE = """
import asyncio

LIMIT = asyncio.Semaphore(1)


async def judge(completions, **columns):
    async def one(text):
        async with LIMIT:
            await asyncio.sleep(0)
            return float(len(text))

    return list(await asyncio.gather(*map(one, completions)))
"""


def test_an_asynchronous_judge_serves_every_round(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A semaphore belongs to the loop in which somebody first had to wait for it."""
    (tmp_path / "judge_of_a_job.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    job = LocalJob(model, tiny_args("dpo", tmp_path), tiny_data("dpo"), None, None)
    score = job.rewards(["judge_of_a_job.judge"])
    rows = [{"prompt": "1+1="}, {"prompt": "2+2="}]
    assert [score(rows, ["a", "bb"]), score(rows, ["ccc", ""])] == [[1.0, 2.0], [3.0, 0.0]]
