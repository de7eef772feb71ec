"""Passes of a rollout on one, two and three processes, which are threads here; TRL's generation is a stand-in."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.engine.stages.ranks import Ranks, RankView
from trl_ext.catalog.declaration import PluginSpec
from trl_ext.engine.context import Context
from trl_ext.engine.stages import rollout as stage
from trl_ext.errors import PluginError
from trl_ext.plan.compose import Plan
from trl_ext_hooks import Generation, Plugin, hookimpl

EOS, PAD, GROUP, ROWS = 1, 0, 2, 4


class FakeTrainer:
    """What a pass uses of TRL's trainer, and its generation: a prompt `aaa` gives three tokens and an end."""

    def __init__(self, ranks: Ranks, rank: int, **changes: Any) -> None:
        self.view = RankView(ranks, rank)
        self.model = SimpleNamespace(training=True)
        self.num_generations, self.num_generations_eval = GROUP, 1
        self.state = SimpleNamespace(global_step=3, num_input_tokens_seen=0)
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
        self.accelerator = SimpleNamespace(gather=self.view.gather, device=torch.device("cpu"))
        self.use_vllm, self.vllm_mode = False, "colocate"
        self.generation_kwargs: dict[str, Any] = {"temperature": 0.7, "do_sample": True}
        self.generation_config = GenerationConfig(do_sample=True, temperature=0.7, num_beams=4, top_p=0.9)
        self.vllm_generation = SimpleNamespace(temperature=0.7, generation_kwargs={"n": 2, "temperature": 1.0, "a": 1})
        self._sync_tool_dicts: list[Any] = []
        self.tools: list[Any] = []
        self.passes: list[SimpleNamespace] = []
        vars(self).update(changes)

    def generate(self, prompts: list[str]) -> Generation:
        engine = self.vllm_generation
        seen = {"sample": self.generation_config.do_sample, "beams": self.generation_config.num_beams}
        seen |= {"temperature": engine.temperature, "kwargs": engine.generation_kwargs, "n": self.num_generations}
        self.passes.append(SimpleNamespace(prompts=list(prompts), tools=len(self._sync_tool_dicts), **seen))
        random.random()
        assert len(set(self.view._ranks.gather(self.view.process_index, len(prompts)))) == 1, "unequal passes hang"
        self.state.num_input_tokens_seen += 100
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        self._metrics["train"]["completions/mean_length"].append(float(len(self.passes)))
        self._metrics["train"]["tools/call_frequency"].append(0.5)
        ids = [[*map(ord, prompt), EOS] for prompt in prompts]
        images = [f"image of {prompt}" for prompt in prompts]
        return Generation([[5] for _ in prompts], ids, list(prompts), extra={"images": images, "more": {"x": ids}})


def made(work: Callable[..., Any], name: str = "mine") -> type[Plugin]:
    class Made(Plugin):
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: Any, generate: Any, trainer: Any, context: Any) -> Any:
            return work(prompts, generate, trainer, context)

    Made.name = name
    return Made


def run(count: int, *plugins: type[Plugin], **changes: Any) -> list[Any]:
    """Returns for every process its trainer and the generation of a round of 4 rows, or the error."""
    ranks = Ranks(count)

    def work(rank: int) -> Any:
        trainer = FakeTrainer(ranks, rank, **changes)
        specs = tuple(PluginSpec(cls, None, "here", "file", cls.name) for cls in plugins)
        context = Context(trainer, Plan("grpo", specs, {cls.name: cls() for cls in plugins}, {}, ()))
        context.view = trainer.view  # type: ignore[assignment]
        prompts = [f"{'abcdefgh'[(rank * ROWS + row) // GROUP]}" for row in range(ROWS)]
        with context.new_round() as state:
            state.data_rows = [{"row": rank * ROWS + row} for row in range(ROWS)]
            result = stage.generate(context, prompts, trainer.generate)
        return SimpleNamespace(trainer=trainer, result=result, logged=state.log.values)

    return ranks.run(work)


def plain(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
    return generate(prompts)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_prompts_on_each_process(count: int) -> None:
    kept: dict[int, Any] = {}

    def unequal(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        rank = trainer.process_index
        state = random.getstate()
        first = generate(["z" * (3 + i) for i in range(rank)], greedy=True)  # none on process 0
        assert random.getstate() == state or count > 1  # threads share the generator
        nothing = generate([], rows=[])
        kept[rank] = first
        assert nothing == Generation([], [], []) and len(first.extra.get("images", [])) == rank
        return generate(prompts)

    for rank, done in enumerate(run(count, made(unequal), _sync_tool_dicts=[{"f": 1}] * ROWS)):
        assert done.result.completions == done.trainer.passes[-1].prompts
        assert kept[rank].completions == ["z" * (3 + i) for i in range(rank)]
        side = [seen for seen in done.trainer.passes if not seen.sample]
        assert [len(seen.prompts) for seen in side] == [count - 1] * (count > 1)  # nothing runs where nobody asks
        assert all(seen.tools == count - 1 and seen.beams == 1 for seen in side)
        assert len(done.trainer._sync_tool_dicts) == ROWS
        assert done.trainer.generation_config.num_beams == 4 and done.trainer.generation_kwargs["do_sample"]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_recorded_is_that_of_the_result(count: int) -> None:
    def discards(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        generate(prompts)
        generate(["z"] * trainer.process_index, greedy=True)
        result = generate([prompt + "!" for prompt in prompts])
        generate(prompts)
        return result

    def mixes(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        result = generate(prompts)
        where = [1, 3][: trainer.process_index + 1]
        longer = result.replaced(where, generate([prompts[row] + "bcd" for row in where], rows=where))
        assert longer.extra["images"][1] == f"image of {prompts[1]}bcd" and longer.extra["images"][0] != "image of abcd"
        assert longer.extra["more"]["x"] == longer.completion_ids
        return longer

    for done in run(count, made(discards)):
        recorded = done.trainer._metrics["train"]
        number = 2.0 if count == 1 else 3.0  # the greedy pass of one process alone has no prompt
        assert recorded["completions/mean_length"] == [number] and recorded["tools/call_frequency"] == [0.5]
        assert recorded["num_tokens"] == [100] == [done.trainer.state.num_input_tokens_seen]
    for done in run(count, made(mixes)):
        recorded = done.trainer._metrics["train"]
        longer, rows = (1 if count == 1 else 3), ROWS * count
        assert recorded["completions/mean_length"] == [pytest.approx(2 + 3 * longer / rows)]
        assert recorded["completions/max_terminated_length"] == [5] and recorded["completions/clipped_ratio"] == [0]
        assert "tools/call_frequency" not in recorded
        assert recorded["num_tokens"] == [rows + 2 * rows + 3 * longer]


def test_inner_plugins_know_the_rows_of_a_part() -> None:
    seen: list[Any] = []

    def part(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        result = generate(prompts)
        where = [[3, 0], [2]][trainer.process_index]
        return result.replaced(where, generate([prompts[row] for row in where], rows=where, greedy=True))

    def look(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        seen.append((trainer.process_index, context, list(prompts)))
        context.log("seen", len(prompts))
        return generate(prompts)

    done = run(2, made(part), made(look, "look"))
    whole = {rank: context for rank, context, _ in seen[:2]}
    parts = {rank: (context, prompts) for rank, context, prompts in seen[2:]}
    for rank in range(2):
        assert [row["row"] for row in whole[rank].rows] == list(range(4 * rank, 4 * rank + 4))
        assert whole[rank].group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and not whole[rank].greedy
        assert (whole[rank].mode, whole[rank].step, whole[rank].num_generations) == ("train", 3, GROUP)
        assert done[rank].logged == {"look/seen": (4.0 + (2, 1)[rank], 2.0)}
    first, second = parts[0][0], parts[1][0]
    assert [row["row"] for row in first.rows] == first.row_numbers == [3, 0] and second.row_numbers == [6]
    assert first.group_ids.tolist() == second.group_ids.tolist() == [1, 0, 3]
    assert (first.offset, second.offset, second.local) == (0, 2, slice(2, 3)) and first.greedy
    assert parts[0][1] == ["b", "a"] and parts[1][1] == ["d"]
    # what an outer plugin asks for holds further inside
    assert [seen.sample for seen in done[0].trainer.passes] == [True, False]


def test_an_inner_plugin_that_has_to_know_rows_is_not_left_in_the_dark() -> None:
    def beside(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        generate(prompts[:1], greedy=True)
        return generate(prompts)

    class Editor(Plugin):
        name = "editor"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: Any, generate: Any) -> Any:
            return generate([prompt + "?" for prompt in prompts])

    (done,) = run(1, made(beside), Editor)
    assert done.trainer.passes[0].prompts == ["a?"]
    for error in run(2, made(beside), made(plain, "inner")):
        assert isinstance(error, PluginError)
        assert "generate in 'rollout' of plugin 'mine' got [1, 1] prompts per process without `rows`" in str(error)
        assert "plugin 'inner' further inside" in str(error) and "Pass rows=[...]" in str(error)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda generate, prompts: generate("abc"), "`prompts` is a str, expected a list of prompts"),
        (lambda generate, prompts: generate([1]), "a prompt is 1, expected a text or a list of messages"),
        (lambda generate, prompts: generate(["a", [{}]]), "some prompts are text and some are messages"),
        (lambda generate, prompts: generate(["a"], rows=[0, 1]), "`rows` has 2 entries for 1 prompts"),
        (lambda generate, prompts: generate(["a"], rows=torch.tensor([0])), "`rows` is a Tensor, expected a list"),
        (lambda generate, prompts: generate(["a"], rows=[4]), "`rows` is [4], expected indices of the 4 prompts"),
    ],
)
def test_one_process_with_a_wrong_call_stops_all(ask: Any, expected: str) -> None:
    def work(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        return ask(generate, prompts) if trainer.process_index == 1 else generate(prompts)

    for error in run(2, made(work)):
        assert isinstance(error, PluginError)
        assert f"generate in 'rollout' of plugin 'mine' on process 1: {expected}" in str(error)


def test_processes_that_do_not_agree() -> None:
    def more(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        for _ in range(trainer.process_index):
            generate(prompts)
        return generate(prompts)

    def mixed(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        return generate(prompts, greedy=trainer.process_index == 0)

    for error in run(2, made(more)):
        assert isinstance(error, PluginError)
        assert "the end of 'rollout' of plugin 'mine' is under way on process 0" in str(error)
        assert "and generate in 'rollout' of plugin 'mine' on process 1" in str(error)
    for error in run(2, made(mixed)):
        assert isinstance(error, PluginError) and "got greedy=True on some processes" in str(error)


def test_a_call_after_the_hook() -> None:
    later: list[Any] = []

    def keep(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        later.append(generate)
        return generate(prompts)

    run(1, made(keep))
    with pytest.raises(PluginError, match="plugin 'mine' called generate when its hook 'rollout' had returned"):
        later[0](["a"])


def test_what_cannot_be_done() -> None:
    def greedy(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        return generate(prompts, greedy=True)

    def part(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        return generate(prompts[:2])

    for error in run(2, made(greedy), rollout_func=print):
        assert isinstance(error, PluginError) and "cannot make the `rollout_func` of this trainer greedy" in str(error)

    def turned(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        rows = [3, 2, 1, 0] if trainer.process_index else [0, 1, 2, 3]
        return generate([prompts[row] for row in rows], rows=rows)

    for error in run(2, made(turned), environments=[object()] * ROWS):
        assert isinstance(error, PluginError) and "for the 4 prompts that the hook got, in their order" in str(error)
    for error in run(2, made(part), environments=[object()] * ROWS):
        assert isinstance(error, PluginError) and "ran for [2, 2] prompts per process, as pass 1" in str(error)
    (done,) = run(1, made(greedy), environments=[object()] * ROWS)
    assert not done.trainer.passes[0].sample


def test_vllm() -> None:
    """A server samples G completions of every G-th prompt, which is wrong for prompts that differ."""

    def work(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        generate(prompts[:: GROUP + 1], greedy=True)
        generate([f"{prompt}{row}" for row, prompt in enumerate(prompts)])
        return generate([prompt + "!" for prompt in prompts])

    for done in run(2, made(work), use_vllm=True, vllm_mode="server"):
        greedy, different, alike = done.trainer.passes
        assert (greedy.temperature, greedy.kwargs, greedy.n) == (0.0, {"a": 1}, 1)
        assert (different.temperature, different.n) == (0.7, 1) and (alike.temperature, alike.n) == (0.7, GROUP)
        trainer = done.trainer
        assert (trainer.num_generations, trainer.num_generations_eval) == (GROUP, 1)
        assert (trainer.vllm_generation.temperature, trainer.vllm_generation.generation_kwargs["n"]) == (0.7, 2)


def test_settings_come_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(prompts: Any, generate: Any, trainer: Any, context: Any) -> Generation:
        with contextlib.suppress(ZeroDivisionError):
            generate(["fail"], greedy=True)
        return generate(prompts)

    before = FakeTrainer.generate

    def fail(self: Any, prompts: list[str]) -> Generation:
        if prompts == ["fail"]:
            raise ZeroDivisionError
        return before(self, prompts)

    monkeypatch.setattr(FakeTrainer, "generate", fail)
    (done,) = run(1, made(work))
    assert done.trainer.passes[0].sample and done.trainer.generation_config.do_sample
