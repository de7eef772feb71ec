"""The report: everything in one file, with curves that hold the numbers of the JSON, for Python and for a browser."""

from __future__ import annotations

import copy
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trl_ext.experiments import charts, page, picture, records

STEPS = list(range(1, 21))


def curve(offset: float, runs: int = 2) -> dict[str, Any]:
    mean = [offset + 0.5 * math.sin(step / 4) for step in STEPS]
    band = {"low": [value - 0.1 for value in mean], "high": [value + 0.2 for value in mean]} if runs > 1 else {}
    return {"steps": STEPS, "mean": mean, **band, "runs": {str(seed): mean for seed in range(1, runs + 1)}}


def row(text: str, reward: float | None) -> dict[str, Any]:
    return {"prompt": "<say> &", "completion": text, "rewards": {"r": reward}, "advantage": 0.5}


FOUND: dict[str, Any] = {
    "recipe": "typed",
    "claim": "ours is <better> & faster",
    "paper": "a figure",
    "command": "trl_ext compare typed.yaml",
    "trainer": "grpo",
    "task": "tiny",
    "sizes": {"train_size": 8},
    "model": "m",
    "parameters": 89_000,
    "seeds": [1, 2],
    "settings": {"learning_rate": 0.001, "odd": "</script><!-- data -->"},
    "arms": {
        "plain": {"finished": 2, "failed": [], "seconds_per_run": 61.0, "plugins": [], "settings": {}},
        "ours": {
            "finished": 1,
            "failed": [{"seed": 2, "status": "diverged", "error": "loss was nan at step 3"}],
            "seconds_per_run": 3.0,
            "plugins": [{"name": "gdpo", "version": "1.2", "origin": "built in", "options": {"group_eps": 0.1}}],
            "settings": {"beta": 0.5},
        },
    },
    "metrics": [
        {
            "name": "rewards/r/mean",
            "measure": "steps to 0.9",
            "label": "rewards/r/mean: steps to 0.9",
            "better": "lower",
            "level": 0.9,
            "values": {"plain": {"1": 30.0, "2": 50.0}, "ours": {"1": 12.0}},
            "censored": {"plain": [2], "ours": []},
            "estimates": {
                "plain": {"mean": 40.0, "low": 30.0, "high": 50.0},
                "ours": {"mean": 12.0, "low": None, "high": None},
            },
            "comparisons": [
                {"arm": "ours", "against": "plain", "seeds": 1, "difference": None, "verdict": "too few seeds"}
            ],
            "expectations": [{"text": "ours better than plain", "met": None, "detail": "not judged"}],
        }
    ],
    "notes": ["2 seeds are few"],
    "complete": False,
    "met": False,
    "versions": {"trl": "1.16.0", "peft": None},
    "seconds": 9.0,
    "at_once": 2,
    "curves": {
        "rewards/r/mean": {"plain": curve(0.6), "ours": curve(1.4, runs=1)},
        "completions/mean_length": {"plain": curve(-250.0), "ours": curve(1000.0)},
    },
    "completions": {
        "plain/1": {"first": [row("one", 0.0)], "last": [row("two\nlines", 1.0)]},
        "ours/1": {"first": [row("<b>three</b>", None)], "last": [row("four", 1.0), row("five", 0.0)]},
        "plain/2": {"first": [row("six", 0.0)], "last": [row("seven", 1.0)]},
    },
}


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.data = ""
        self.texts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = f"{tag}#{dict(attrs).get('id')}"

    def handle_data(self, data: str) -> None:
        if self.inside == "script#data":
            self.data += data
        elif not self.inside.startswith(("script", "style")):
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def drawn(text: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Metric -> arm (with `band` before it for bands) -> points, as numbers of the metric, read from the drawing."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for tag, attributes in Reader(text).tags:
        if tag == "svg" and attributes.get("class") == "panel":
            x, y = ([float(n) for n in attributes[f"data-{axis}"].split()] for axis in "xy")
            points_of = found.setdefault(attributes["data-metric"], {})
        if tag in ("polyline", "polygon"):
            pixels = [tuple(map(float, point.split(","))) for point in attributes["points"].split()]
            name = attributes["data-arm"] if tag == "polyline" else f"band {attributes['data-arm']}"
            points_of[name] = [(_number(a, x), _number(b, y)) for a, b in pixels]
    return found


def _number(pixel: float, scale: list[float]) -> float:
    low, high, start, end = scale
    return low + (pixel - start) / (end - start) * (high - low)


def check_curves(text: str, expected: dict[str, Any]) -> None:
    """Every curve and band of the page goes through the numbers of the JSON, up to a hundredth of a pixel."""
    found = drawn(text)
    assert list(found) == list(expected)
    for metric, arms in expected.items():
        numbers = [value for arm in arms.values() for key in ("mean", "low", "high") for value in arm.get(key, [])]
        close = 1e-4 * max(1.0, max(numbers) - min(numbers))
        for arm, numbers_of in arms.items():
            lines = {arm: [*zip(numbers_of["steps"], numbers_of["mean"], strict=True)]}
            if "low" in numbers_of:
                edge = [*zip(numbers_of["steps"], numbers_of["low"], strict=True)]
                edge += reversed([*zip(numbers_of["steps"], numbers_of["high"], strict=True)])
                lines[f"band {arm}"] = edge
            for name, points in lines.items():
                assert len(found[metric][name]) == len(points)
                for (step, value), (expected_step, expected_value) in zip(found[metric][name], points, strict=True):
                    assert step == pytest.approx(expected_step, abs=0.01)
                    assert value == pytest.approx(expected_value, abs=close)
        assert {name for name in found[metric] if not name.startswith("band ")} == set(arms)


@pytest.fixture(scope="module")
def text() -> str:
    return page.render(FOUND)


def test_curves_and_bands_hold_the_numbers(text: str) -> None:
    check_curves(text, FOUND["curves"])


def test_the_check_above_sees_a_wrong_curve() -> None:
    wrong = copy.deepcopy(FOUND)
    wrong["curves"]["rewards/r/mean"]["ours"]["mean"][7] += 0.01
    with pytest.raises(AssertionError):
        check_curves(page.render(wrong), FOUND["curves"])


def test_the_data_is_inside_and_the_page_asks_for_nothing_else(text: str) -> None:
    reader = Reader(text)
    assert json.loads(reader.data) == records.plain(FOUND)
    assert text.count("</script>") == 2 and "<!-- " not in text.replace(reader.data, "")
    loading = ("src", "href", "srcset", "action", "data")
    assert not [
        tag for tag, attributes in reader.tags if tag in ("link", "iframe", "img") or set(attributes) & {*loading}
    ]
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", text)


def test_everything_that_belongs_into_a_report(text: str) -> None:
    words = " ".join(" ".join(Reader(text).texts).split())
    for expected in (
        "ours is <better> & faster",
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


def test_without_completions_and_without_finished_runs(tmp_path: Path) -> None:
    empty = FOUND | {"curves": {}, "completions": {"plain/1": {"first": [], "last": []}}, "parameters": None}
    text = page.render(empty)
    assert "side by side" not in text and "No run has finished." in text
    picture.draw(empty, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture(tmp_path: Path) -> None:
    picture.draw(FOUND, tmp_path / "found.png")
    content = (tmp_path / "found.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [(0.0, 1.0, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1, 250, 6, [50, 100, 150, 200, 250]), (-3.2, 3.1, 5, [-2, 0, 2])],
)
def test_ticks_are_round(low: float, high: float, about: int, expected: list[float]) -> None:
    assert charts.Scale(low, high, 0, 100).ticks(about) == pytest.approx(expected)


def test_a_curve_of_one_value_can_be_drawn() -> None:
    flat = {"a": {"steps": [5], "mean": [2.0], "runs": {"1": [2.0]}}}
    check_curves(charts.curves("m", flat, {"a": "arm0"}), {"m": flat})


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH; the tests above read the same page in Python")
def test_a_browser_shows_the_curves_and_runs_the_script(text: str, tmp_path: Path) -> None:
    probe = """<script>
      const panel = document.querySelector("svg.panel"), box = panel.getBoundingClientRect();
      panel.dispatchEvent(new MouseEvent("mousemove", { clientX: box.left + box.width * 0.99, clientY: box.top + 9 }));
      const [seed, round] = document.querySelectorAll(".choose select");
      seed.value = "2"; round.value = "first"; round.dispatchEvent(new Event("change"));
      document.body.dataset.width = box.width;
      addEventListener("error", event => { document.body.dataset.error = event.message; });
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", probe))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    shown = done.stdout
    assert done.returncode == 0 and "data-error" not in shown, done.stderr[-2000:]
    check_curves(shown, FOUND["curves"])
    assert json.loads(Reader(shown).data) == records.plain(FOUND)
    assert float(re.findall(r'data-width="([\d.]+)"', shown)[0]) > 200  # it has a size on the screen
    tip = re.findall(r'<div class="tip"[^>]*>(.*?)</figure>', shown, re.DOTALL)[0]
    values = FOUND["curves"]["rewards/r/mean"]
    assert "step 20" in tip and f"ours: {values['ours']['mean'][-1]:.3f}"[:10] in tip
    assert f"[{values['plain']['low'][-1]:.3f}"[:5] in tip
    assert re.findall(r'data-rows="([^"]+)"(?! hidden)', shown) == ["2/first"]
