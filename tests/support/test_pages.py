"""Pages from templates: texts are escaped, data stays data, and hashes allow exactly the style and the script."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from trl_ext.support import pages

PAGE = """<meta content="{{ style_source }} {{ script_source }}"><style>{{ style | safe }}</style><h1>{{ title }}</h1>
<script type="application/json">{{ data | tojson }}</script><script>{{ script | safe }}</script>
"""


@pytest.fixture
def template(tmp_path: Path) -> Path:
    for ending, text in ((".html", PAGE), (".css", "h1 > b { color: red }"), (".js", 'if (1 < 2 && "a") {}')):
        (tmp_path / "page").with_suffix(ending).write_text(text)
    return tmp_path / "page.html"


def test_texts_are_escaped_and_the_own_files_are_not(template: Path) -> None:
    page = pages.render(template, data=None, title="<b>bold</b> & {{ title }}")
    assert "<h1>&lt;b&gt;bold&lt;/b&gt; &amp; {{ title }}</h1>" in page
    assert "<style>h1 > b { color: red }</style>" in page and '<script>if (1 < 2 && "a") {}</script>' in page


def test_data_cannot_end_its_element_and_keeps_its_order(template: Path) -> None:
    data = {"b": "</script><script>alert(1)</script>", "a": ["<!--", "&amp;", "'", "\ud800", "ü"]}
    page = pages.render(template, data=data, title="")
    text = page.partition('json">')[2].partition("</script>")[0]
    assert not set("<>&") & set(text) and page.count("</script>") == 2
    assert json.loads(text) == data and list(json.loads(text)) == ["b", "a"]
    page.encode()  # a lone surrogate would fail here


def test_numbers_that_a_browser_refuses_are_refused_here(template: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        pages.render(template, data=[float("nan")], title="")


def test_a_value_that_is_missing_is_an_error(template: Path) -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        pages.render(template, data=None)


def test_the_hashes_are_those_of_a_content_security_policy(template: Path) -> None:
    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    page = pages.render(template, data=None, title="")
    sources = page.partition('content="')[2].partition('"')[0]
    style, script = "h1 > b { color: red }", 'if (1 < 2 && "a") {}'
    assert sources == f"{digest(style)} {digest(script)}"
