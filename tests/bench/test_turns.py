"""Trainers that take turns."""

from trl_ext.bench.turns import step_times


def test_trainers_take_turns(build):
    seen = []
    trainers = {name: build("grpo", max_steps=3) for name in ("a", "b")}
    ticks = iter(range(1000))

    def clock():
        seen.append(next(ticks))
        return float(seen[-1])

    times = step_times(trainers, clock=clock)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}, "a step of one trainer was interrupted by another"
