"""Every Markdown page: links lead somewhere, code runs, commands and options exist, generated tables are current."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import trl_ext
from tests import processes
from trl_ext.catalog import builtins, find, recipes
from trl_ext.cli.main import COMMANDS
from trl_ext.cli.show import declaration
from trl_ext.plan import compose

ROOT = Path(__file__).parents[2]
GENERATED = {"build", "dist", "runs"}
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in GENERATED for part in path.relative_to(ROOT).parts)
}
OTHER_TESTS = {"hooks/README.md", "hooks/REFERENCE.md", "trl_ext/lab/README.md", "trl_ext/environments/README.md"}
OTHER_TESTS |= {str(path.relative_to(ROOT)) for path in (ROOT / "hooks" / "docs").glob("*.md")}
"""Pages whose code has tests of its own."""
METHODS = {name: f"plugins/docs/{name}.md" for name in builtins.BUILTINS}
FENCE = re.compile(r"^(```+)[^\n]*\n.*?^\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(language: str) -> list[Any]:
    """Returns the code blocks of a language as cases of a test, without pages that have tests of their own."""
    return [
        pytest.param(code, id=f"{page}-{number}")
        for page, text in PAGES.items()
        if page not in OTHER_TESTS
        for number, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    ]


def script(file: str) -> ModuleType:
    """Imports a script that writes parts of pages."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    slugs: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


def broken_links(page: Path, text: str) -> list[str]:
    """Returns the relative links of a page whose file or heading does not exist."""
    # links inside code are examples
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    broken = []
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    assert broken_links(ROOT / page, PAGES[page]) == []


def test_a_wrong_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n\n```\n# no heading\n[no link](gone.md)\n```\n\n`[no](link)` [a](page.md) "
        "[b](#one-two-three) [c](gone.md) [d](#no-heading) [e](page.md#four) [f](https://example.org/x)\n"
    )
    assert broken_links(page, page.read_text()) == ["gone.md", "#no-heading", "page.md#four"]


def test_every_page_can_be_reached_from_the_front_page() -> None:
    reached, ahead = set[str](), ["README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        for link in LINK.findall(FENCE.sub("", PAGES[page])):
            target = (ROOT / page).parent / link.partition("#")[0]
            name = str(target.resolve().relative_to(ROOT)) if not re.match(r"[a-z]+:", link) else ""
            if name in PAGES and name not in reached:
                ahead.append(name)
    assert reached == set(PAGES)


# --- code -------------------------------------------------------------------------------------------------------------

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-1.5B-Instruct")
ON_CPU = 'use_cpu=True, bf16=False, report_to="none"'
SHORT = f'args=__import__("trl").GRPOConfig("run", {ON_CPU}, max_steps=2, max_completion_length=16)'


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with models and data of the hub as folders of their names, on a CPU and with few steps."""
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(model)
    data = tmp_path / "trl-lib" / "DeepMath-103K"
    data.mkdir(parents=True)
    row = {"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "solution": "2"}
    (data / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code = code.replace('GRPOConfig("run",', f'GRPOConfig("run", {ON_CPU},')
    code = code.replace("train_dataset=data)", f"train_dataset=data, {SHORT})")
    assert code.count(ON_CPU) == (".train()" in code)
    done = processes.run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    if ".train()" in code:
        assert "advantages" in done.stderr and "gdpo" in done.stderr  # the printed plan


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for command in re.findall(r"^(?:  )?trl_ext ([a-z]+)", text, re.MULTILINE) + re.findall(
            r"`trl_ext ([a-z]+)", text
        ):
            assert command in COMMANDS, f"{page} names `trl_ext {command}`"
        for target in re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", text, re.MULTILINE):
            assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), f"{page} names `make {''.join(target)}`"


def test_recipes_on_command_lines_exist() -> None:
    known = set(recipes.recipes())
    seen = set()
    for page, text in PAGES.items():
        for name in re.findall(r"trl_ext (?:compare|train --config|train --trainer dpo --config) ([\w./=-]+)", text):
            if name.endswith(".yaml") or name.startswith("runs/") or "=" in name or name == "NAME":
                assert not name.startswith("recipes/"), f"{page} names {name}, which only a checkout has"
            else:
                assert name in known, f"{page} names the recipe {name}"
                seen.add(name)
    assert len(seen) > 10


def test_options_on_command_lines_exist() -> None:
    seen = 0
    for page, text in PAGES.items():
        for words in re.findall(r"--set ((?:[\w-]+\.\w+=\S+ ?)+)", text):
            for method, option in re.findall(r"([\w-]+)\.(\w+)=", words):
                if method in builtins.BUILTINS:
                    known = [entry["name"] for entry in declaration(method)["options"]]
                    assert option in known, f"{page} sets {method}.{option}; there are {', '.join(known)}"
                    seen += 1
    assert seen > 2


def test_yaml_blocks_and_recipes_are_trl_files_plus_plugins() -> None:
    recipes = [file.read_text() for file in sorted((ROOT / "recipes").glob("*.yaml"))]
    pages = [block.values[0] for block in blocks("yaml")]
    assert recipes and pages
    for text in [*recipes, *pages]:
        settings = yaml.safe_load(text)
        if set(settings.pop("experiment", {})) - {"about"}:
            continue  # a recipe of `trl_ext compare`, which has tests of its own
        specs = find.resolve(settings.pop("plugins"))
        parser = importlib.import_module(f"trl.scripts.{compose.common_trainers(specs)[0]}").make_parser()
        assert parser.set_defaults_with_config(**settings) == [], "TRL does not know these keys"


def test_every_public_name_is_documented() -> None:
    for name in trl_ext.__all__:
        if name not in ("__version__", "Handle"):
            assert getattr(trl_ext, name).__doc__, name


# --- pages of methods -------------------------------------------------------------------------------------------------


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    pages = {page for page in PAGES if page.startswith("plugins/docs/")}
    assert pages == set(METHODS.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_page_of_a_method_is_complete(method: str) -> None:
    text, shown = PAGES[METHODS[method]], declaration(method)
    for part in ("**What it changes.**", "**When to use it.**", "\n## Options\n", "\ntrl_ext train --"):
        assert part in text, part
    if shown["paper"].startswith("arXiv"):
        title = re.findall(r"title = \{\{(.*?)\}\}", shown["bibtex"], re.DOTALL)[0]
        assert f"eprint = {{{shown['paper'].removeprefix('arXiv ')}}}" in shown["bibtex"]
        assert title.split()[0] in text.partition("**What it changes.**")[0]
        assert f"[{shown['paper']}](" in text and "\n## Metrics\n" in text and "\n## Results\n" in text
    for kind in shown["trainers"]:
        assert kind.upper() in text.partition("**What it changes.**")[0], kind
    assert f"docs/{method}.md" in PAGES["plugins/README.md"]


@pytest.mark.parametrize("method", METHODS)
def test_the_options_on_a_page_are_those_of_the_method(method: str) -> None:
    options = script("plugins/options.py")
    assert options.BEGIN + options.table(method) + options.END in PAGES[METHODS[method]], "run `make docs`"


def test_results_on_all_pages_are_the_committed_ones() -> None:
    table = script("recipes/table.py")
    blocks = table.pages(table.load())
    assert len(blocks) > 10
    for page, block in blocks.items():
        assert table.BEGIN + block + table.END in page.read_text(), "run `python recipes/table.py`"


# --- the map of the code ----------------------------------------------------------------------------------------------

MAP = PAGES["trl_ext/README.md"]
NOT_ROOMS = {"__init__", "__main__", "_version", "__pycache__"}


def rooms_on_disk() -> set[str]:
    paths = [path for path in (ROOT / "trl_ext").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return {path.stem for path in paths} - NOT_ROOMS


def test_the_map_names_every_room_on_disk_and_no_other() -> None:
    assert set(re.findall(r"^\| \[(\w+)\]", MAP, re.MULTILINE)) == rooms_on_disk()


def test_the_import_rule_names_every_room() -> None:
    (rule,) = [block for block in re.findall(r"^```\n(.*?)^```", MAP, re.DOTALL | re.MULTILINE) if " > " in block]
    names = re.split(r"[\s,>]+", rule.strip())
    assert len(names) == len(set(names))
    assert set(names) == rooms_on_disk() | {"trl_ext_hooks"}
