"""The site: every page is there, every link leads somewhere, and `llms.txt` names all of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import trl_ext
import trl_ext.testing
import website
from tests import processes

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = website.pages()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert website.build(folder) == []
    return folder


def body(text: str, tmp_path: Path, path: str = "one.md") -> str:
    pages = {path: website.Page(path, text), "two/README.md": website.Page("two/README.md", "# Two\n\n## A part\n")}
    return website.Site(tmp_path, pages).body(pages[path])


def test_every_page_is_shown(site: Path) -> None:
    written = {file for file in ROOT.rglob("*.md") if not {"build", "dist", "runs"} & set(file.parts)}
    names = {str(file.relative_to(ROOT)) for file in written}
    names = {name for name in names if not name.startswith(".")} | {"API.md", "recipes/first-steps.ipynb"}
    assert set(PAGES) == names
    for page in PAGES.values():
        assert f"<title>{page.title}" in (site / page.url).read_text(), page.path
        assert (site / page.markdown).read_text() == page.text
    assert (site / "recipes" / "tiny" / "results" / "gdpo.png").is_file()
    assert "GRPOTrainer" in (site / "trl_ext" / "api.py.html").read_text()  # the map of the code links to it


def test_links_anchors_and_tables(tmp_path: Path) -> None:
    html = body(
        "# One `x_y`, z\n\n# Two\n\n# Two\n\n[a](two/README.md#a-part) [b](two) [c](https://x.y/z.md) ", tmp_path
    )
    assert re.findall('id="(.*?)"', html) == ["one-x_y-z", "two", "two-1"]
    assert re.findall('href="(.*?)"', html) == ["two/index.html#a-part", "two/index.html", "https://x.y/z.md"]
    html = body('# x\n\n| a |\n|---|\n| b |\n\n<img src="../recipes/tiny/gdpo.png">\n', tmp_path, "hooks/one.md")
    assert '<div class="wide"><table>' in html
    html = body("[code](../trl_ext/api.py)\n\n```python\nimport a  # <b>\n```\n", tmp_path, "hooks/one.md")
    assert 'href="../trl_ext/api.py.html"' in html and "&lt;b&gt;" in html


def test_a_broken_link_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# One\n\n[a](gone.md) [b](#none) [c](two.md#none) [d](../../outside.md) [e](two.md#two) ![f](gone.png)\n"
    pages = {name: website.Page(name, text) for name, text in {"README.md": text, "two.md": "# Two\n"}.items()}
    monkeypatch.setattr(website, "pages", lambda: pages)
    broken = website.build(tmp_path)
    expected = ["gone.md", "#none", "two.html#none", "../../outside.md", "gone.png"]
    assert broken == [f"index.html: {link}" for link in expected]


@pytest.mark.parametrize("package", [trl_ext, trl_ext.testing])
def test_the_api_is_complete(package: Any) -> None:
    _, section = PAGES["API.md"].text.split(f"## `{package.__name__}`\n", 1)
    section = section.partition("\n## ")[0]
    for name in package.__all__:
        if not name.startswith("_"):
            heading = f"### class `{name}`" if isinstance(getattr(package, name), type) else f"### `{name}`"
            _, described = section.split(f"\n{heading}\n", 1)
            assert len(re.sub(r"```.*?```", "", described.partition("\n### ")[0], flags=re.DOTALL).split()) > 3, name


def test_llms_txt_names_every_page(site: Path) -> None:
    text = (site / "llms.txt").read_text()
    assert text.startswith("# trl_ext\n\n> Adds ")
    links = dict(re.findall(r"^- \[.+?\]\((.+?)\)(?:: (.+))?$", text, re.MULTILINE))
    assert set(links) == {page.markdown for page in PAGES.values()}
    assert {name for name, summary in links.items() if len(summary) < 25} <= {"CHANGELOG.md"}
    assert all((site / name).is_file() for name in links)
    full = (site / "llms-full.txt").read_text()
    assert all(page.text in full for page in PAGES.values())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; the checks above ran without it")
@pytest.mark.parametrize("width", [420, 1280])
def test_no_page_scrolls_sideways(site: Path, width: int, tmp_path: Path) -> None:
    frames = "".join(f'<iframe width="{width}" height="900" src="{page.url}"></iframe>' for page in PAGES.values())
    probe = """<script>addEventListener("load", () => {
      const pages = [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument);
      document.body.dataset.seen = pages.filter((page) => page.querySelector("main h1")).length;
      document.body.dataset.wide = pages.map((page) => page.documentElement)
        .filter((root) => root.scrollWidth > root.clientWidth).map((root) => root.baseURI).join(" ");
    });</script>"""
    (site / f"probe-{width}.html").write_text(f"<body>{frames}{probe}</body>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    page = (site / f"probe-{width}.html").as_uri()
    done = processes.run([BROWSER or "", *options, "--allow-file-access-from-files", page], timeout=120)
    assert f'data-seen="{len(PAGES)}"' in done.stdout and 'data-wide=""' in done.stdout, done.stdout[-500:]
