"""The code in the README runs, its commands exist, and its YAML is TRL's."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trl_ext
from trl_ext.catalog import find
from trl_ext.cli.main import COMMANDS
from trl_ext.plan import compose

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [README, (ROOT / "hooks/README.md").read_text(), (ROOT / "plugins/README.md").read_text()]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, model, tmp_path, monkeypatch):
    """As printed, but with a model that is on this disk and on a CPU."""
    monkeypatch.chdir(tmp_path)
    script = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", model)
    script = script.replace('GRPOConfig("run",', 'GRPOConfig("run", use_cpu=True, bf16=False, report_to="none",')
    assert "GRPOTrainer(" not in code or script.count(model) == 1
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if "trainer.train()" in code:
        assert "advantages" in done.stderr and "gdpo" in done.stderr  # the printed plan


def test_commands_exist():
    for page in PAGES:
        for command in re.findall(r"^(?:  )?trl_ext ([a-z]+)", page, re.MULTILINE):
            assert command in COMMANDS, f"the docs name `trl_ext {command}`"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_yaml_blocks_are_trl_files_plus_plugins():

    recipes = [file.read_text() for file in sorted((ROOT / "recipes").glob("*.yaml"))]
    assert recipes
    for block in [*re.findall(r"```yaml\n(.*?)```", README, re.DOTALL), *recipes]:
        settings = yaml.safe_load(block)
        specs = find.resolve(settings.pop("plugins"))
        _trl_accepts(settings, compose.common_trainers(specs)[0])


def _trl_accepts(settings, kind):
    parser = importlib.import_module(f"trl.scripts.{kind}").make_parser()
    assert parser.set_defaults_with_config(**settings) == [], "TRL does not know these keys"


def test_links_lead_somewhere():
    for page, folder in ((README, ROOT), (PAGES[1], ROOT / "hooks"), (PAGES[2], ROOT / "plugins")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (folder / target).exists(), target


def test_every_public_name_is_documented():
    for name in trl_ext.__all__:
        if name not in ("__version__", "Handle"):
            assert getattr(trl_ext, name).__doc__, name
