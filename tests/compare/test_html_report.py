"""The report: everything in one file, with curves that hold the numbers of the JSON, for Python and for a browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from trl_ext.compare import html_report, plots, store

from .pages import CONTENT, Reader, check_curves


@pytest.fixture(scope="module")
def text() -> str:
    return html_report.render(CONTENT)


def test_curves_and_bands_hold_the_numbers(text: str) -> None:
    check_curves(text, CONTENT["curves"])


def test_the_check_above_sees_a_wrong_curve() -> None:
    wrong = copy.deepcopy(CONTENT)
    wrong["curves"]["rewards/r/mean"]["ours"]["mean"][7] += 0.01
    with pytest.raises(AssertionError):
        check_curves(html_report.render(wrong), CONTENT["curves"])


def test_the_data_is_inside_and_the_page_asks_for_nothing_else(text: str) -> None:
    reader = Reader(text)
    assert json.loads(reader.data) == store.plain(CONTENT)
    assert text.count("</script>") == 2 and "<!-- " not in text.replace(reader.data, "")
    loading = ("src", "srcset", "action", "data", "href")
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "img", "image", "object", "embed", "foreignobject")
        assert not set(attributes) & {*loading} and not [name for name in attributes if name.startswith("on")]
        assert attributes.get("xlink:href", "#").startswith("#")  # shapes that the same chart defines
    assert not re.search(r"url\((?!#)|@import|https?://|fetch\(|XMLHttpRequest", text)


def test_only_its_own_script_may_run_and_nothing_may_load(text: str) -> None:
    (policy,) = [a["content"] for _, a in Reader(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"><b>{{ 7 * 7 }}"


def spoiled(value: Any) -> Any:
    """Every text inside a value with markup in it, but for names that the page looks up."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [spoiled(entry) for entry in value]
    if isinstance(value, dict):
        return {
            key: entry if key in ("estimates", "values", "censored") else spoiled(entry) for key, entry in value.items()
        }
    return value


def test_no_text_can_bring_markup_or_script_into_the_page(text: str) -> None:
    evil = spoiled(CONTENT)
    evil["curves"] = {name + EVIL: arms for name, arms in CONTENT["curves"].items()}
    evil["settings"] = {EVIL: EVIL}
    evil["completions"]["plain/1"]["last"][0]["rewards"] = {EVIL: 1.0}
    page = html_report.render(evil)
    tags = [tag for tag, _ in Reader(page).tags]
    assert page.count("</script>") == 2 and "img" not in tags
    assert (
        tags.count("b") == [tag for tag, _ in Reader(text).tags].count("b")
        and "49" not in page.partition("alert")[2][:200]
    )
    assert json.loads(Reader(page).data) == store.plain(evil)


def test_an_arm_cannot_either() -> None:
    """Names of arms are checked in recipes, and escaped all the same, in charts too."""
    evil = json.loads(json.dumps(CONTENT).replace("plain", "<i>plain"))
    page = html_report.render(evil)
    assert "i" not in [tag for tag, _ in Reader(page).tags] and page.count("&lt;i&gt;plain") > 5


def test_everything_that_belongs_into_a_report(text: str) -> None:
    words = " ".join(" ".join(Reader(text).texts).split())
    for expected in (
        "ours against plain: too few seeds (rewards/r/mean, steps to 0.9); 1 not judged of 1 expectations",
        "claimed, and not shown by these runs: ours is <better> & faster",
        "In the paper: a figure",
        "GRPO on task tiny, a model of 89 thousand parameters; 2 arms, 2 seeds",
        "unknown rewards/r/mean: steps to 0.9: ours better than plain (not judged)",
        "40 [30, 50] (1 never)",
        "12 (1 failed)",
        "diverged: ours, seed 2: loss was nan at step 3",
        "note: 2 seeds are few",
        "trl_ext compare typed.yaml",
        "gdpo 1.2 (group_eps=0.1)",
        "beta=0.5",
        "learning_rate 0.001",
        "trl 1.16.0",
        "<say> &",
        "<b>three</b>",
        "r -; advantage +0.50",
        "1:01",
    ):
        assert expected in words, expected


def test_completions_stand_side_by_side(text: str) -> None:
    blocks = dict(re.findall(r'data-rows="([^"]+)"( hidden)?', text))
    assert blocks == {"1/last": "", "1/first": " hidden", "2/last": " hidden", "2/first": " hidden"}
    first = text.partition('data-rows="1/last"')[2].partition("data-rows")[0]
    (heads, both, alone) = re.findall(r"<tr>(.*?)</tr>", first, re.DOTALL)
    assert heads.index("plain") < heads.index("ours")
    assert both.index("&lt;say&gt;") < both.index("two\nlines") < both.index("four") and both.count("&lt;say&gt;") == 1
    assert alone.count("<td>") == 3 and "five" in alone


def test_without_completions_and_without_finished_runs() -> None:
    empty = CONTENT | {"curves": {}, "completions": {"plain/1": {"first": [], "last": []}}, "parameters": None}
    text = html_report.render(empty)
    assert "side by side" not in text and "No run has finished." in text
    assert plots.picture(empty).startswith(b"\x89PNG")


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH; the tests above read the same page in Python")
def test_a_browser_shows_the_curves_and_runs_the_script(text: str, tmp_path: Path) -> None:
    probe = """<script>
      const point = (chart, x, y) => {
        const box = chart.getBoundingClientRect();
        const place = { clientX: box.left + box.width * x, clientY: box.top + box.height * y };
        chart.dispatchEvent(new MouseEvent("mousemove", place));
        document.body.dataset.width = box.width;
      };
      point(document.querySelector("svg.seeds"), 0.99, 0.3);
      point(document.querySelector("svg.curves"), 0.99, 0.5);
      const [seed, round] = document.querySelectorAll(".choose select");
      seed.value = "2"; round.value = "first"; round.dispatchEvent(new Event("change"));
      addEventListener("error", event => { document.body.dataset.error = event.message; });
    </script></body>"""
    file = tmp_path / "page.html"
    policy = re.search(r"<meta http-equiv[^>]*>", text)
    assert policy  # it would not let the probe run
    file.write_text(text.replace(policy[0], "").replace("</body>", probe))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = processes.run([*command, "--dump-dom", file.as_uri()], timeout=120)
    shown = done.stdout
    assert done.returncode == 0 and "data-error" not in shown, done.stderr[-2000:]
    check_curves(shown, CONTENT["curves"])
    assert json.loads(Reader(shown).data) == store.plain(CONTENT)
    assert float(re.findall(r'data-width="([\d.]+)"', shown)[0]) > 200  # it has a size on the screen
    seeds, tip = re.findall(r'<div class="tip"[^>]*>(.*?)</figure>', shown, re.DOTALL)[:2]
    assert "plain, seed 2: 50.0" in seeds
    values = CONTENT["curves"]["rewards/r/mean"]
    assert "step 20" in tip and f"ours: {values['ours']['mean'][-1]:.3f}"[:10] in tip
    assert f"[{values['plain']['low'][-1]:.3f}"[:5] in tip
    assert re.findall(r'data-rows="([^"]+)"(?! hidden)', shown) == ["2/first"]
