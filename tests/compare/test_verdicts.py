"""Verdicts and expectations, from records typed by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from trl_ext.compare.recipe import Expectation
from trl_ext.compare.text_report import rows, sentences
from trl_ext.compare.verdicts import as_stated, summarize

from .typed import HIGH, LOW, SEEDS, expect, metric, recipe, record, records


def judged(expectation: Expectation, plain: list[Any], ours: list[Any], **changes: Any) -> tuple[bool | None, str]:
    found = summarize(recipe(metric(**changes, expect=[expectation])), records(plain, ours))
    (entry,) = found["metrics"][0]["expectations"]
    assert found["met"] == bool(entry["met"])
    return entry["met"], f"{entry['text']}: {entry['detail']}"


BETTER = expect()


def test_a_summary() -> None:
    found = summarize(recipe(metric()), records(LOW, HIGH))
    (content,) = found["metrics"]
    assert content["label"] == "reward: mean" and content["values"]["plain"]["2"] == 1.2
    assert content["estimates"]["ours"]["mean"] == pytest.approx(2.0)
    (pair,) = content["comparisons"]
    assert (pair["arm"], pair["against"], pair["verdict"], pair["apart"]) == ("ours", "plain", "better", True)
    assert pair["difference"]["mean"] == pytest.approx(1.0) and pair["change"]["mean"] == pytest.approx(1.0)
    assert found["complete"] and found["met"] and found["notes"] == []
    assert found["arms"]["plain"] == {"finished": 6, "failed": [], "seconds_per_run": 2.0}
    assert rows(found) == [
        ["reward: mean", "plain", "1 [0.85, 1.15]", "", ""],
        ["", "ours", "2 [1.78, 2.22]", "+1 [0.917, 1.08]", "better than plain"],
    ]


@pytest.mark.parametrize(
    ("plain", "ours", "better", "verdict"),
    [
        (LOW, HIGH, "lower", "worse"),
        (HIGH, LOW, "higher", "worse"),
        (HIGH, LOW, "lower", "better"),
        (LOW, LOW, "higher", "not distinguishable"),
        (LOW, LOW[::-1], "higher", "not distinguishable"),
    ],
)
def test_verdicts_know_the_direction(plain: Any, ours: Any, better: Any, verdict: str) -> None:
    found = summarize(recipe(metric(better=better)), records(plain, ours))
    assert found["metrics"][0]["comparisons"][0]["verdict"] == verdict
    assert rows(found)[1][-1].startswith(verdict)


def test_better() -> None:
    assert judged(BETTER, LOW, HIGH) == (True, "ours better than plain: better")
    assert judged(BETTER, LOW, LOW) == (False, "ours better than plain: not distinguishable")
    assert judged(BETTER, HIGH, LOW)[0] is False
    assert judged(BETTER, HIGH, LOW, better="lower")[0] is True


def test_better_by_a_share_needs_the_whole_interval() -> None:
    """0.8 .. 1.2 against 1.7 .. 2.3: half of it, give or take 5 points."""
    least = expect(by=0.4)
    met, text = judged(least, HIGH, LOW, better="lower")
    assert met and text.startswith("ours better than plain by at least 40%: better, by 50% [4")
    assert judged(expect(by=0.5), HIGH, LOW, better="lower")[0] is False
    assert judged(expect(by=0.9), LOW, HIGH)[0] is True  # doubled
    assert judged(expect(by=1.2), LOW, HIGH)[0] is False
    met, text = judged(least, [0.0] * 6, HIGH)
    assert met is None and "the mean of plain is not above 0" in text


def test_better_with_intervals_apart() -> None:
    apart = expect(apart=True)
    assert judged(apart, LOW, HIGH) == (True, "ours better than plain, intervals apart: better, intervals apart")
    close = [value + 0.1 for value in LOW]  # always 0.1 more, so better, and still within the other interval
    assert judged(BETTER, LOW, close)[0] is True
    assert judged(apart, LOW, close) == (False, "ours better than plain, intervals apart: better, intervals overlap")


def test_not_worse() -> None:
    margin = expect("not worse", within=0.15)
    slightly = [value - 0.1 for value in LOW]
    assert judged(margin, LOW, slightly)[0] is True and judged(margin, LOW, HIGH)[0] is True
    assert "worse by 0.1 at most" in judged(margin, LOW, slightly)[1]
    assert judged(margin, HIGH, LOW)[0] is False
    assert judged(margin, LOW, slightly, better="lower")[0] is True
    assert judged(margin, LOW, HIGH, better="lower")[0] is False
    noisy = [0.5, 1.5, 0.6, 1.6, 0.7, 1.2]  # not distinguishable, and still not shown to be as good
    assert judged(BETTER, LOW, noisy)[0] is judged(margin, LOW, noisy)[0] is False


def test_identical_compares_whole_curves() -> None:
    same = expect("identical")
    curve = record(1.0, 2.0, 3.0)
    assert judged(same, [curve] * 6, [curve] * 6) == (True, "ours identical to plain: the curves differ by 0 at most")
    other = record(1.0, 2.5, 2.5)  # the same mean
    assert judged(same, [curve] * 6, [curve] * 5 + [other])[0] is False
    assert judged(expect("identical", within=0.5), [curve] * 6, [other] * 6)[0] is True
    assert judged(same, [curve] * 6, [record(1.0, 2.0)] * 6)[0] is False  # not logged at the same steps


def test_steps_that_are_never_reached_are_said_and_count_as_a_bound() -> None:
    fast, slow, never = record(0.0, 1.0, 1.0), record(0.0, 0.0, 1.0), record(0.0, 0.0, 0.0)
    measure = {"reduce": {"steps_to": 1.0, "window": 1}, "better": "lower"}
    met, text = judged(BETTER, [slow, never, slow, slow, never, slow], [fast] * 6, **measure)
    assert met and text == "ours better than plain: better"
    met, text = judged(BETTER, [slow] * 6, [fast] * 5 + [never], **measure)
    assert met is False and "1 of 6 runs of ours never reached the level" in text
    found = summarize(recipe(metric(**measure)), records([slow, never, slow, slow, never, slow], [fast] * 6))
    assert found["metrics"][0]["censored"] == {"plain": [2, 5], "ours": []}
    assert found["metrics"][0]["values"]["plain"]["2"] == 4.0
    assert rows(found)[0][2].endswith("(2 never)")


@pytest.mark.parametrize("status", ["crashed", "diverged"])
def test_failed_runs_are_left_out_marked_and_no_expectation_is_judged(status: str) -> None:
    plain: list[Any] = [*LOW[:5], record(9.0, 9.0, status=status)]
    met, text = judged(BETTER, plain, HIGH)
    assert met is None and "not judged, as runs are missing (plain, seed 6)" in text
    found = summarize(recipe(metric()), records(plain, HIGH))
    assert not found["complete"]
    assert found["arms"]["plain"]["failed"] == [{"seed": 6, "status": status, "error": "reason"}]
    (content,) = found["metrics"]
    assert list(content["values"]["plain"]) == ["1", "2", "3", "4", "5"]
    assert content["comparisons"][0]["seeds"] == 5 and content["comparisons"][0]["verdict"] == "better"
    assert rows(found)[0][2].endswith("(1 failed)")
    assert f"{status}: plain, seed 6: reason" in sentences(found)


@pytest.mark.parametrize("expectation", [BETTER, expect("identical")])
def test_a_run_that_logged_no_number_is_told_and_nothing_is_judged(expectation: Expectation) -> None:
    silent = record(math.nan, math.nan)
    met, text = judged(expectation, [*LOW[:5], silent], HIGH)
    assert met is None and "not judged, as runs have logged no number (plain, seed 6)" in text
    assert judged(expectation, [silent] * 6, [silent] * 6)[0] is None


def test_an_arm_without_any_finished_run() -> None:
    lost = [record(status="crashed")] * 6
    found = summarize(recipe(metric(expect=[BETTER])), records(LOW, lost))
    assert rows(found)[1] == ["", "ours", "none (6 failed)", "", "too few seeds"]
    assert not found["met"]


def test_one_seed_has_no_intervals_and_says_so() -> None:
    found = summarize(recipe(metric(expect=[BETTER]), seeds=(3,)), records([1.0], [2.0], seeds=(3,)))
    (content,) = found["metrics"]
    assert content["estimates"]["ours"] == {"mean": 2.0, "low": None, "high": None}
    assert content["comparisons"][0]["verdict"] == "too few seeds"
    assert content["expectations"][0]["met"] is None and not found["met"]
    assert rows(found)[1] == ["", "ours", "2", "", "too few seeds"]
    assert found["notes"] == ["one seed: there are no intervals and no verdicts. Give two seeds or more."]


def test_few_seeds_are_noted() -> None:
    few = (1, 2, 3)
    found = summarize(recipe(metric(), seeds=few), records(LOW[:3], HIGH[:3], seeds=few))
    assert found["notes"][0].startswith("3 seeds are few: arms that do not differ would get a verdict in 25%")


def test_steps_to_the_end_of_an_arm() -> None:
    """Every seed has its own level, and a seed of which that arm failed has none."""
    reduce = {"steps_to": "plain", "window": 1}
    plain = [record(0.1, 0.2, 0.3 + seed, status="crashed" if seed == 6 else "finished") for seed in SEEDS]
    ours = [record(0.2, 0.3 + seed, 9.0) for seed in SEEDS]
    asked = metric(reduce=reduce, better="lower", expect=[expect(by=0.3)])
    (content,) = summarize(recipe(asked), records(plain, ours))["metrics"]
    assert content["label"] == "reward: steps to the end of plain" and content["level"] is None
    assert set(content["values"]["plain"].values()) == {3.0} and set(content["values"]["ours"].values()) == {2.0}
    assert len(content["values"]["ours"]) == 5 and not any(content["censored"].values())
    assert content["expectations"][0]["met"] is None and "plain, seed 6" in content["expectations"][0]["detail"]
    plain[5] = record(0.1, 0.2, 6.3)
    (content,) = summarize(recipe(asked), records(plain, ours))["metrics"]
    assert content["expectations"][0]["met"] and "by 33%" in content["expectations"][0]["detail"]


def titled(plain: list[Any], ours: list[Any], claim: str = "ours is faster", **changes: Any) -> str:
    asked = dataclasses.replace(recipe(metric(**changes)), claim=claim)
    found = summarize(asked, records(plain, ours))
    assert ("claimed, and not shown by these runs" in "".join(sentences(found))) == (found["headline"] != claim)
    return str(found["headline"])


def test_a_claim_is_the_title_only_if_the_runs_bear_it_out() -> None:
    assert titled(LOW, HIGH, expect=[BETTER]) == "ours is faster"
    assert titled(HIGH, LOW, expect=[BETTER]) == "ours worse than plain (reward, mean); 1 not met of 1 expectations"
    assert titled(LOW, LOW, expect=[BETTER]).startswith("ours not distinguishable from plain (reward, mean); 1 not met")
    failing = [record(1.0, status="crashed"), *HIGH[1:]]
    assert "; 1 not judged of 1 expectations" in titled(LOW, failing, expect=[BETTER])
    both = [BETTER, expect(by=5.0)]
    assert titled(LOW, HIGH, expect=both) == "ours better than plain (reward, mean); 1 not met of 2 expectations"


def test_what_a_recipe_states_as_not_met_is_told_with_its_reason() -> None:
    stated = expect(met=False, reason="both learn it")
    found = summarize(recipe(metric(expect=[stated])), records(LOW, LOW))
    assert not found["met"] and as_stated(found)
    assert found["headline"].endswith("; 1 not met of 1 expectations (both learn it)")
    (line, *_) = sentences(found)
    assert line.endswith("better than plain: NO (not distinguishable), recorded as not met: both learn it")
    unstated = summarize(recipe(metric(expect=[stated, BETTER])), records(LOW, LOW))
    assert not as_stated(unstated) and unstated["headline"].endswith("2 not met of 2 expectations (both learn it)")
    met = summarize(recipe(metric(expect=[stated])), records(LOW, HIGH))
    assert met["met"] and as_stated(met) and met["headline"] == "ours better than plain (reward, mean)"
    assert sentences(met)[0].endswith("yes (better), recorded as not met, but it is")


def test_a_claim_that_nothing_tests_is_no_title() -> None:
    assert titled(LOW, HIGH) == "ours better than plain (reward, mean)"
