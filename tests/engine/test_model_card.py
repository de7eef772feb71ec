"""The card of a run names its plugins, their options and what to cite, and is TRL's own again without them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import trl_ext
from trl_ext import __version__
from trl_ext.catalog import find
from trl_ext.engine import model_card
from trl_ext.plan.compose import Plan
from trl_ext_hooks import Plugin, hookimpl, option


class Outside(Plugin):
    """A plugin of somebody else, for every trainer."""

    name = "outside"
    paper = "arXiv 2001.00001"
    summary = "does nothing"
    bibtex = """@misc{outside,
      title = {{A {Title}}},
      eprint = {2001.00001},
    }"""
    trainers = ("grpo", "rloo", "dpo")

    @dataclass(frozen=True)
    class Options:
        kept: float = option(1.0, help="stays")
        sizes: tuple[int, ...] = option((), help="is set")
        function: Any = field(default=None)

    @hookimpl
    def setup(self, trainer: Any) -> None:
        return None


CITATION = "Cite outside as:\n\n```bibtex\n@misc{outside,\n  title = {{A {Title}}},\n  eprint = {2001.00001},\n}\n```"


def body(trainer: Any) -> str:
    """The card without its metadata, in which TRL lists tags in no order."""
    return (Path(trainer.args.output_dir) / "README.md").read_text().split("\n---\n", 1)[1]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo"])
def test_plain_script_of_every_trainer(kind: str, build: Any, plugin: Any) -> None:
    stock = build(kind)
    stock.create_model_card("mine")
    with trl_ext.enable(plugin(Outside), outside={"sizes": [1, 2]}):
        trainer = build(kind)
        trainer.create_model_card("mine")
        card = body(trainer)
    assert f"trl_ext {__version__} added to TRL's {kind.upper()} trainer" in card
    assert "- **outside**" in card and "[arXiv 2001.00001](https://arxiv.org/abs/2001.00001)): does nothing\n" in card
    (options,) = [block.split("```")[0] for block in card.split("```yaml\n")[1:]]
    assert yaml.safe_load(options) == {"plugins": {"outside": {"sizes": [1, 2]}}}
    assert card.index("### Framework versions") < card.index("## Plugins") < card.index("## Citations")
    assert card.index("Cite TRL as:") < card.index(CITATION)
    assert card.count("```") % 2 == 0
    # what TRL wrote is all there, and undo gives TRL's own card
    before, after = card.split("## Plugins")[0], card.split("## Citations")[1].split("Cite outside as:")[0]
    assert body(stock) == f"{before}## Citations{after}".rstrip() + "\n" * (body(stock).endswith("\n"))
    trainer.create_model_card("mine")
    assert body(trainer) == body(stock)


def test_a_run_with_lora_keeps_the_plugins_in_its_card(train: Any) -> None:
    from peft import LoraConfig

    with trl_ext.enable("gdpo", gdpo={"batch_norm": False}):
        trainer = train(trainer={"peft_config": LoraConfig(r=2)}, max_steps=1, save_strategy="steps")
        trainer.save_model()  # PEFT rewrites the card
        card = body(trainer)
    assert "- PEFT " in card
    paper = "[arXiv 2601.05242](https://arxiv.org/abs/2601.05242)"
    assert f"- **gdpo** {__version__} (built in, {paper}): normalises" in card
    assert "plugins:\n  gdpo:\n    batch_norm: false\n" in card
    for entry in ("Cite TRL as:", "eprint = {2601.05242},", "@article{shao2024deepseekmath"):
        assert entry in card


def card_of(text: str, *names: str, **options: Any) -> str:
    specs = find.resolve({name: options.get(name) for name in names})
    return model_card.completed(text, Plan("grpo", specs, {}, {}, ()))


def test_cards_that_are_not_from_the_template() -> None:
    card = card_of("# Mine\n", "tools", "gdpo")
    assert card.startswith("# Mine\n\n## Plugins\n") and card.count("## Citations") == 1
    assert card_of(card, "gdpo") == card, "a second time adds nothing"
    assert "All their options have the default values." in card_of("# Mine\n", "gdpo")
    assert "## Citations" not in card_of("# Mine\n", "tools")  # which cites nothing


def test_values_that_yaml_cannot_hold_and_files(tmp_path: Path, plugin: Any) -> None:
    reference = plugin(Outside)
    card = card_of("", reference, **{reference: {"function": functools.partial(print, "```")}})
    assert "````yaml" in card and "functools.partial" in card and "0x" not in card
    file = tmp_path / "secret_folder_name" / "mine.py"
    file.parent.mkdir()
    declaration = "class Mine(Plugin):\n    name = 'mine'\n    trainers = ('grpo',)\n"
    file.write_text(f"from trl_ext_hooks import Plugin\n\n\n{declaration}")
    card = card_of("", str(file))
    assert "- **mine** (mine.py)" in card and "secret_folder_name" not in card


def test_no_card_no_plugins_no_change(tmp_path: Path) -> None:
    specs = find.resolve({"gdpo": None})
    model_card.complete(tmp_path, Plan("grpo", specs, {}, {}, ()))
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("stock")
    model_card.complete(tmp_path, Plan("grpo", (), {}, {}, ()))
    assert (tmp_path / "README.md").read_text() == "stock"
