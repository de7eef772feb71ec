"""Plugins of installed packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trl_ext
from tests.refusals import refused
from trl_ext import PluginError, UnknownPluginError
from trl_ext.catalog import find


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A folder on `sys.path` that looks like an installed package with entry points."""

    def make(name: str, entry_points: dict[str, str], **modules: str) -> None:
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{key} = {value}\n" for key, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[trl_ext]\n{lines}")
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        for module in modules:
            monkeypatch.delitem(sys.modules, module, raising=False)

    return make


METHOD = "from trl_ext_hooks import Plugin\n\nclass Method(Plugin):\n    name = 'outsider'\n    trainers = ('grpo',)\n"


def test_an_entry_point_is_found_by_name(distribution: Any) -> None:
    distribution("acme", {"outsider": "acme_method:Method"}, acme_method=METHOD)
    (spec,) = find.resolve({"Outsider": None})
    assert (spec.name, spec.origin, spec.version) == ("outsider", "acme", "1.2")
    with trl_ext.enable("outsider") as handle:
        assert repr(handle) == "<trl_ext: outsider on grpo>"


def test_an_entry_point_may_name_only_the_module(distribution: Any) -> None:
    distribution("acme", {"outsider": "acme_module"}, acme_module=METHOD)
    assert find.find("outsider")[0].__name__ == "Method"


def test_a_broken_entry_point_disturbs_only_those_who_ask(distribution: Any, build: Any) -> None:
    distribution("broken", {"wreck": "wrecked_module:Method"}, wrecked_module="raise RuntimeError('boom')\n")
    distribution("gone", {"lost": "module_that_is_gone:Method"})
    with trl_ext.enable("gdpo"):
        build()
    assert "wrecked_module" not in sys.modules
    expected = "plugin wreck (entry point of broken 1.2): importing 'wrecked_module' failed: RuntimeError: boom"
    with refused(PluginError, expected):
        trl_ext.enable("wreck")
    with refused(PluginError, "plugin lost (entry point of gone 1.2): importing 'module_that_is_gone' failed"):
        trl_ext.enable("lost")
    with refused(UnknownPluginError, "no plugin is called 'wrek'. Did you mean 'wreck'?", "lost"):
        trl_ext.enable("wrek")


def test_two_packages_with_one_name(distribution: Any) -> None:
    distribution("acme", {"outsider": "acme_one:Method"}, acme_one=METHOD)
    distribution("rival", {"Outsider": "rival_one:Method"}, rival_one=METHOD)
    with pytest.raises(PluginError) as caught:
        trl_ext.enable("outsider")
    text = str(caught.value)
    assert "plugin name 'outsider' is provided by " in text and "acme 1.2" in text and "rival 1.2" in text
    assert "Uninstall one, or choose: --plugin " in text
    cls, _, _ = find.find("acme_one:Method")
    assert cls.__module__ == "acme_one"
    trl_ext.enable("gdpo").disable()


def test_a_name_of_a_built_in(distribution: Any) -> None:
    distribution("acme", {"gdpo": "acme_gdpo:Method"}, acme_gdpo=METHOD)
    expected = (
        "plugin name 'gdpo' is built in and also provided by acme 1.2. "
        "Name the other one by its module, --plugin acme_gdpo:Method, or uninstall it."
    )
    with refused(PluginError, expected):
        trl_ext.enable("gdpo")


def test_an_entry_point_that_leads_to_another_name(distribution: Any) -> None:
    distribution("acme", {"insider": "acme_other:Method"}, acme_other=METHOD)
    with refused(PluginError, "entry point 'insider' of acme 1.2 leads to a plugin that calls itself 'outsider'"):
        trl_ext.enable("insider")


def test_an_entry_point_without_its_attribute(distribution: Any) -> None:
    distribution("acme", {"outsider": "acme_missing:Methd"}, acme_missing=METHOD)
    with refused(PluginError, "acme_missing has no attribute 'Methd'. Did you mean 'Method'?"):
        trl_ext.enable("outsider")
