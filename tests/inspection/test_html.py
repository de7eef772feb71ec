"""The page: self-contained, safe against what models write, and drawn by a real browser where there is one."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html as markup
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import processes
from trl_ext import ConfigError
from trl_ext.inspection import file_format, formatting, html, page_data
from trl_ext.inspection.file_format import Recording

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Elements(HTMLParser):
    """Every element with its attributes, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inside.append(data)


@pytest.fixture(scope="module")
def recordings(folder: Path) -> list[Recording]:
    return [file_format.read(path) for path in file_format.find(str(folder))]


@pytest.fixture(scope="module")
def text(recordings: list[Recording]) -> str:
    return html.page(recordings)


def test_what_models_write_cannot_leave_the_data(text: str, recordings: list[Recording]) -> None:
    assert "<script>document.title" in "".join(recordings[0].rows[0].tokens)  # the completions try
    parsed = Elements(text)
    tags = [tag for tag, _ in parsed.found]
    assert tags.count("script") == 2 and "img" not in tags and "b" not in tags
    data = parsed.inside[1]
    assert "<" not in data and json.loads(data) == [page_data.describe(recording) for recording in recordings]
    assert text.count("</script>") == 2


def test_names_cannot_either(recordings: list[Recording]) -> None:
    evil = "</script><script>alert(1)</script>"
    spans = [{"by": evil, "start": 0, "end": 1, "label": evil, "value": None}]
    rows = [dataclasses.replace(recordings[0].rows[0], fields={evil: evil}, columns={evil: evil}, spans=spans)]
    changed = dataclasses.replace(recordings[0], model=evil, rows=rows)
    assert html.page([changed]).count("</script>") == 2


def test_it_asks_for_nothing(text: str) -> None:
    parsed = Elements(text)
    for tag, attributes in parsed.found:
        assert not {"src", "href", "action", "srcset"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    style, _, script = parsed.inside
    assert not re.search(r"url\(|@import", style)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(", script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert re.findall(r"https?://[^\"']+", style + script) == ["http://www.w3.org/2000/svg"]  # a name, not a request


def test_only_its_own_script_may_run(text: str) -> None:
    style, _, script = Elements(text).inside
    (policy,) = [a["content"] for _, a in Elements(text).found if a.get("http-equiv") == "Content-Security-Policy"]

    def source(content: str) -> str:
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    assert policy == (f"default-src 'none'; style-src 'sha256-{source(style)}'; script-src 'sha256-{source(script)}'")


def test_both_schemes_have_every_colour(text: str) -> None:
    style = Elements(text).inside[0]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    names = [set(re.findall(r"(--\w+):", block)) for block in (light, dark)]
    assert names[0] == names[1] and {"--plus", "--minus", "--page", "--ink", "--s0"} <= names[0]
    assert "prefers-color-scheme: dark" in style


def luminance(colour: tuple[float, ...]) -> float:
    parts = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_is_legible_on_the_strongest_colours(text: str, scheme: int) -> None:
    """A contrast of at least 4.5 (WCAG AA) between ink and a token whose advantage is the largest."""
    style = Elements(text).inside[0]
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    opacity = float(re.search(r"\.plus \{ background: rgb\(var\(--plus\) / calc\(var\(--a\) \* (\.\d+)\)\)", style)[1])

    def hexadecimal(name: str) -> tuple[float, ...]:
        found = re.search(rf"--{name}: #(\w\w)(\w\w)(\w\w)", block)
        return tuple(int(part, 16) for part in found.groups())

    ink, card = hexadecimal("ink"), hexadecimal("card")
    for name in ("plus", "minus", "other"):
        colour = [float(part) for part in re.search(rf"--{name}: (\d+) (\d+) (\d+)", block).groups()]
        mixed = tuple(opacity * c + (1 - opacity) * under for c, under in zip(colour, card, strict=True))
        high, low = sorted((luminance(mixed), luminance(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_a_page_that_cannot_be_written(recordings: list[Recording], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written to .*none/x.html: No such file.*--html PATH"):
        html.write(recordings, tmp_path / "none" / "x.html")


# --- in a browser -----------------------------------------------------------------------------------------------------


def drawn(path: Path, profile: Path) -> str:
    """The page after its script ran, as HTML."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    done = processes.run([BROWSER, *options, path.as_uri()], timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; the checks above ran without it")
def test_a_browser_draws_it(recordings: list[Recording], tmp_path: Path) -> None:
    tools = [{"name": "<b>add</b>", "arguments": {"a": 1}, "result": "<script>2</script>"}]
    first = recordings[0]
    rows = [dataclasses.replace(row, calls=tools if row.row == 0 else []) for row in first.rows]
    path = tmp_path / "page.html"
    html.write([dataclasses.replace(first, rows=rows, left_out=3), recordings[1]], path)
    dom = drawn(path, tmp_path / "profile")
    assert "<title>round 1: GRPO → gdpo → steps</title>" in dom  # and not "owned"
    parsed = Elements(dom)
    tags = [tag for tag, _ in parsed.found]
    assert tags.count("script") == 2 and "img" not in tags

    def count(name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in parsed.found)

    group = first.groups()[first.telling_group()]
    assert count("t") == sum(len(row.ids) for row in group)  # one element per token of the open group
    assert count("row") == 4 and count("group") == 3
    assert count("label") == 8 and count("slope") == 12
    assert count("curve") + count("point") >= 8  # a gap in the middle leaves single points
    assert count("plus") and count("minus")
    plain = markup.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(script|style).*?</\1>", "", dom, flags=re.DOTALL)))
    for row in group:
        shown = "".join(row.tokens).replace("\n", "⏎\n")
        assert shown in re.sub(r"half \d(?: \d+)?", "", plain), shown
    assert "not recorded: 3 further rows of the round." in plain
    assert '<b>add</b>({"a": 1}) → <script>2</script>' in plain
    for name in ("numbers", "brief", "bonus ×0.5", "advantage: TRL", "advantage: steps", "letters", "doubt"):
        assert name in plain, name


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; the checks above ran without it")
def test_pointing_and_choosing(recordings: list[Recording], tmp_path: Path) -> None:
    """The tip of the first token, then another layer, then another round."""
    probe = """<script>
      addEventListener("error", (event) => { document.body.dataset.error = event.message; });
      const press = (name) => [...document.querySelectorAll("button")].find((b) => b.textContent === name).click();
      const pressed = () => [...document.querySelectorAll("[aria-pressed=true]")].map((b) => b.textContent).join(" ");
      const token = document.querySelector(".t");
      token.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 5, clientY: 5 }));
      document.body.dataset.tip = document.querySelector("#tip").textContent;
      document.body.dataset.here = document.querySelectorAll(".t.here").length;
      press("doubt");
      document.body.dataset.other = document.querySelectorAll(".t.other").length;
      press("2");
      document.body.dataset.pressed = pressed();
    </script></body>"""
    text = html.page(recordings)
    policy = re.search(r"<meta http-equiv[^>]*>", text)
    assert policy  # it would not let the probe run
    path = tmp_path / "page.html"
    path.write_text(text.replace(policy[0], "").replace("</body>", probe))
    dom = drawn(path, tmp_path / "profile")
    (body,) = [attributes for tag, attributes in Elements(dom).found if tag == "body"]
    assert "data-error" not in body, body
    row = recordings[0].rows[0]
    first = formatting.signed(row.token_advantages(2)[0])
    tip = body["data-tip"] or ""
    assert tip.startswith(f'"{row.tokens[0]}"token 0, id {row.ids[0]}') and f"advantage: steps{first}" in tip
    assert f"doubt{formatting.number(row.values['doubt'][0])}" in tip and "stepshalf 1" in tip
    assert body["data-here"] == "1"
    group = recordings[0].groups()[recordings[0].telling_group()]
    assert body["data-other"] == str(sum(len(row.ids) for row in group))
    assert body["data-pressed"] == "2 doubt" and "<title>round 2: GRPO → gdpo → steps</title>" in dom
