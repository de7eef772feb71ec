"""The pages about one topic each: their plugins train, their tests pass, and a subclass equals the plugin beside it."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import trl_ext
from trl_ext.catalog import builtins
from trl_ext.cli.new import scaffold
from trl_ext.testing import conformance, digits, tiny_data, tiny_trainer
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.judges import Question, ask, make_judge

HOOKS = Path(__file__).parents[2] / "hooks"
PAGES = {page.name: page.read_text() for page in sorted((HOOKS / "docs").glob("*.md"))}
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for name, text in PAGES.items()}
MIGRATION = "migration.md"
"""The page with several plugins, each beside a subclass."""
PAIRS = [(BLOCKS[MIGRATION][place], BLOCKS[MIGRATION][place + 1]) for place in range(0, len(BLOCKS[MIGRATION]), 2)]
COMPLETE = [
    next(code for code in blocks if "(Plugin):" in code) for name, blocks in BLOCKS.items() if name != MIGRATION
]
PLUGINS = {code.partition("\n")[0].removeprefix("# "): code for code in COMPLETE}
"""The one complete plugin of each other page, by the name of its file."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """`folder(page)` writes the files of a page, under the names in their first lines, where they can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)

    def write(page: str) -> Path:
        for code in BLOCKS[page]:
            name = code.partition("\n")[0].removeprefix("# ")
            assert re.fullmatch(r"\w+\.py", name), f"{page}: a block begins with a comment that names its file"
            (tmp_path / name).write_text(code)
        return tmp_path

    yield write
    for path in tmp_path.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_the_guide_names_every_page() -> None:
    topics = (HOOKS / "README.md").read_text().partition("\n## Topics\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)\)", topics)) == set(PAGES)


# --- plugins ----------------------------------------------------------------------------------------------------------


# long enough that the untrained model writes an answer now and then
LONG = {"max_completion_length": 24}


@pytest.fixture(scope="module")
def stock(model: str, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights after two steps of plain TRL, in which the two prompts of the data come twice."""
    trainer = tiny_trainer("grpo", model, tmp_path_factory.mktemp("stock"), data=tiny_data(rows=2), **LONG)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("file", PLUGINS)
def test_the_plugin_of_a_page_trains(file: str, tmp_path: Path, train: Any, stock: torch.Tensor) -> None:
    assert 20 <= len([line for line in PLUGINS[file].splitlines() if line]) <= 40
    (tmp_path / file).write_text(PLUGINS[file])
    with trl_ext.enable(str(tmp_path / file)) as handle:
        trainer = train("grpo", data=tiny_data(rows=2), **LONG)
    prefix = f"{handle.specs[0].name}/"
    assert all(any(name.startswith(prefix) for name in entry) for entry in trainer.state.log_history[:2])
    assert weights(trainer).isfinite().all() and not torch.equal(weights(trainer), stock)


def test_the_critic_adds_a_row_to_every_prompt(tmp_path: Path, train: Any) -> None:
    """The second plugin of the page about groups."""
    (code,) = (code for code in BLOCKS["groups.md"] if code.startswith("# critic.py"))
    (tmp_path / "critic.py").write_text(code)
    asked: list[list[Any]] = []

    def length(prompts: list[Any], completions: list[Any], agent: list[str], **columns: Any) -> list[float]:
        asked.append([who for prompt, who in zip(prompts, agent, strict=True) if "wrong with" in prompt[-1]["content"]])
        assert len(prompts) == 16
        return [float(len(completion[0]["content"])) for completion in completions]

    with trl_ext.enable(str(tmp_path / "critic.py")):
        train("grpo", rewards=[length], max_steps=1)
    assert asked == [["critic"] * 8]


def test_a_forward_in_setup_leaves_no_trace(train: Any, plugin: Any, stock: torch.Tensor) -> None:
    """As the page about state says."""
    logits = []

    class LooksFirst(Plugin):
        name = "looks-first"
        trainers = ("grpo",)
        needs = ("whole_parameters",)

        @hookimpl
        def setup(self, trainer: Any) -> None:
            policy = trainer.unwrapped_model
            mode = policy.training
            policy.eval()
            with torch.no_grad():
                logits.append(policy(torch.tensor([[5, 6]], device=trainer.device)).logits)
            policy.train(mode)

    with trl_ext.enable(plugin(LooksFirst)):
        trainer = train("grpo", data=tiny_data(rows=2), **LONG)
    assert logits[0].isfinite().all() and torch.equal(weights(trainer), stock)


def test_the_greedy_baseline_is_the_reward_of_the_greedy_completion(model: str, tmp_path: Path) -> None:
    file = tmp_path / "greedy_baseline.py"
    file.write_text(PLUGINS[file.name])
    assert not [check for check in conformance(str(file), tmp_path / "runs") if not check.passed]
    with trl_ext.enable(str(file)):
        trainer = tiny_trainer("grpo", model, tmp_path / "run", max_steps=1, generation_kwargs={"temperature": 1e-4})
        trainer.train()
    # nearly no temperature, so that sampled completions are greedy ones
    logged = trainer.state.log_history[0]
    assert logged["greedy-baseline/baseline"] == pytest.approx(logged["reward"], abs=1e-5)
    assert list(trainer._logs["advantages"]) == [pytest.approx(0.0, abs=1e-6)] * 8


def test_the_judge_of_the_page_judges(folder: Any) -> None:
    folder("judges.md")
    questions = [Question("1+1=", " 2", "2"), Question("1+1=", "3", "2"), Question("1+1=", "3", "")]
    assert ask(make_judge("my_judges:judge"), questions) == ([True, False, None], 3)


def test_the_tests_of_the_page_pass(folder: Any, tmp_path: Path) -> None:
    tests = importlib.import_module(next(folder("testing.md").glob("test_*.py")).stem)
    tests.test_the_formula()
    tests.test_known_rewards(tmp_path / "known")
    tests.test_conformance(tmp_path / "conformance")
    assert len([name for name in vars(tests) if name.startswith("test_")]) == 3


def test_the_package_of_the_page_is_the_one_that_is_written(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGES["publishing.md"], re.DOTALL)
    printed = tomllib.loads(block)["project"]
    package = scaffold("entropy-target", tmp_path / "package")
    written = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert {name: written[name] for name in ("name", "entry-points")} == {
        name: printed[name] for name in ("name", "entry-points")
    }
    assert set(printed["entry-points"]) == {builtins.GROUP}
    (ours, theirs) = (Requirement(project["dependencies"][0]) for project in (printed, written))
    assert ours.name == theirs.name and trl_ext.__version__ in ours.specifier


# --- from a subclass to a plugin --------------------------------------------------------------------------------------


def uneven(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
    """Rewards digits, and all answers to the first prompt alike."""
    return [1.0 if row == 0 else value for row, value in zip(index, digits(completions), strict=True)]


SETTINGS: dict[str, Any] = {
    # without Adam, which makes a step of full size of a difference in rounding
    "optim": "sgd",
    "learning_rate": 1.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "rewards": [uneven],
}


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights that plain TRL has under these settings."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = tiny_trainer("grpo", model, folder, data=tiny_data(rows=2), **SETTINGS)
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize("pair", PAIRS, ids=["advantages", "loss", "rows"])
def test_a_subclass_and_its_plugin_give_the_same_numbers(
    pair: tuple[str, str], tmp_path: Path, train: Any, plain: torch.Tensor
) -> None:
    for name, code in zip(("subclass.py", "plugin.py"), pair, strict=True):
        (tmp_path / name).write_text(code)
    (subclass,) = [
        value
        for name, value in runpy.run_path(str(tmp_path / "subclass.py")).items()
        if re.match(r"\w+Trainer$", name) and name != "GRPOTrainer"
    ]
    theirs = weights(train("grpo", cls=subclass, data=tiny_data(rows=2), **SETTINGS))
    with trl_ext.enable(str(tmp_path / "plugin.py")):
        ours = weights(train("grpo", data=tiny_data(rows=2), **SETTINGS))
    change = (theirs - plain).abs().max()
    assert change > 1e-3
    assert (ours - theirs).abs().max() < 1e-4 * change
