"""Public names change by decision only, and the page of promises says how stable each part is."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.contract import public_api

PAGE = (Path(__file__).parents[2] / "trl_ext" / "GUARANTEES.md").read_text()


def test_the_public_names_and_signatures_are_those_of_the_snapshot() -> None:
    expected, found = public_api.FILE.read_text(), public_api.snapshot()
    changes = [line for line in difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm="", n=0)]
    assert not changes, (
        "\n".join(changes) + "\nIf others may rely on this from now on, run `python -m tests.contract.public_api` and "
        "name the change in CHANGELOG.md."
    )


def test_the_snapshot_sees_a_changed_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl_ext_hooks

    def option(default: object, surprise: int = 0) -> object:
        return default

    monkeypatch.setattr(trl_ext_hooks, "option", option)
    assert public_api.snapshot() != public_api.FILE.read_text()


@pytest.mark.parametrize("package", [*public_api.PACKAGES, "trl_ext_hooks.toolkit"])
def test_the_page_says_how_stable_a_package_is(package: str) -> None:
    table = PAGE.partition("## What is stable")[2].partition("\n## ")[0]
    assert f"`{package}`" in table
