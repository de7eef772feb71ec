"""Bad plugins and bad requests: each is refused before a trainer exists, with a text that says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import trl_ext
from trl_ext import ConfigError, OptionError, PluginError, UnknownPluginError, api
from trl_ext.catalog import find
from trl_ext.catalog.options import parse_set
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl, option


@contextlib.contextmanager
def refused(kind: type[Exception], *texts: str) -> Iterator[None]:
    """The block raises exactly this error with these texts, and leaves nothing enabled."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert api._active is None


class Good(Plugin):
    name = "good"
    trainers = ("grpo", "rloo")


# --- names ------------------------------------------------------------------------------------------------------------


def test_unknown_plugin_with_near_names() -> None:
    with refused(UnknownPluginError, "no plugin is called 'gdop'. Did you mean 'gdpo'", "gdpo"):
        trl_ext.enable("gdop")


def test_nothing_asked_for() -> None:
    with refused(ConfigError, "name at least one plugin, for example trl_ext.enable('gdpo')"):
        trl_ext.enable()


def test_asked_for_twice(plugin: Callable[[type], str]) -> None:
    with refused(ConfigError, "plugin 'good' is asked for twice"):
        trl_ext.enable(plugin(Good), plugin(Good))


def test_no_such_module_and_no_such_attribute(plugin: Callable[[type], str]) -> None:
    with refused(PluginError, "importing 'no_such_module' failed: ModuleNotFoundError"):
        trl_ext.enable("no_such_module:Thing")
    module = plugin(Good).partition(":")[0]
    with refused(PluginError, f"{module} has no attribute 'Mode'"):
        trl_ext.enable(f"{module}:Mode")


def test_something_else_than_a_plugin(plugin: Callable[[type], str]) -> None:
    with refused(PluginError, "is not a subclass of trl_ext_hooks.Plugin"):
        trl_ext.enable(plugin(dict))


# --- files ------------------------------------------------------------------------------------------------------------

HEAD = "from trl_ext_hooks import Plugin\n"
ONE = "class {0}(Plugin):\n    name = '{1}'\n    trainers = ('grpo',)\n"


def test_a_missing_file(tmp_path: Path) -> None:
    with refused(UnknownPluginError, "method.py' does not exist (looked in "):
        trl_ext.enable(str(tmp_path / "method.py"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "must define one plugin class, found 0 (none)"),
        (HEAD, "must define one plugin class, found 0 (none)"),
        (HEAD + ONE.format("A", "a") + ONE.format("B", "b"), "found 2 (A, B). Choose: "),
        ("import nowhere_at_all\n", "failed: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def broken(:\n", "failed: SyntaxError"),
    ],
)
def test_a_file_without_one_plugin(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text(text)
    before = set(sys.modules)
    with refused(PluginError, str(tmp_path / "method.py"), expected):
        trl_ext.enable(str(tmp_path / "method.py"))
    if "failed" in expected:
        assert not {name for name in set(sys.modules) - before if name.startswith("trl_ext_file_")}


def test_a_class_of_a_file_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(HEAD + ONE.format("A", "a") + ONE.format("B", "b"))
    cls, origin, version = find.find(f"{file}:B")
    assert (cls.name, origin, version) == ("b", str(file), "file")
    with refused(PluginError, "has no attribute 'C'", "Known: A, B"):
        trl_ext.enable(f"{file}:C")


# --- declarations -----------------------------------------------------------------------------------------------------


def bad(**attributes: Any) -> type[Plugin]:
    return type("Bad", (Good,), {"name": "bad", **attributes})


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"name": "Bad_Name"}, "`name` must be lower-case words joined by hyphens"),
        ({"trainers": ()}, "`trainers` must be a tuple with some of grpo, rloo, dpo; got ()"),
        ({"trainers": "grpo"}, "`trainers` must be a tuple with some of grpo, rloo, dpo; got 'grpo'"),
        ({"trainers": ("ppo",)}, "`trainers` must be a tuple with some of grpo, rloo, dpo; got ('ppo',)"),
        ({"Options": dict}, "`Options` must be a dataclass"),
        ({"needs": ("whole_group",)}, "`needs` holds 'whole_group'. Did you mean 'whole_groups'"),
        ({"needs": ("colum:x",)}, "`needs` holds 'colum:x'"),
        ({"needs": "old_logps"}, "`needs` must be a tuple of strings; got 'old_logps'"),
        ({"claims": ("estimtor",)}, "`claims` holds 'estimtor'. Did you mean 'estimator'?"),
        ({"fields": ["x"]}, "`fields` must be a tuple of strings; got ['x']"),
        ({"honours": "beta"}, "`honours` must be a tuple of strings; got 'beta'"),
    ],
)
def test_wrong_declarations(attributes: dict[str, Any], expected: str, plugin: Callable[[type], str]) -> None:
    with refused(PluginError, expected):
        trl_ext.enable(plugin(bad(**attributes)))


class Misspelt(Good):
    name = "misspelt"

    @hookimpl
    def advantage(self, round: Any) -> None:
        return None


class Unmarked(Good):
    name = "unmarked"

    def advantages(self, round: Any) -> None:
        return None


class WrongArgument(Good):
    name = "wrong-argument"

    @hookimpl
    def advantages(self, rond: Any) -> None:
        return None


class HalfState(Good):
    name = "half-state"

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Misspelt, ["plugin 'misspelt'", "'advantage' is marked with @hookimpl and no hook", "mean 'advantages'?"]),
        (Unmarked, ["plugin 'unmarked'", "the method 'advantages' is named like a hook and lacks @hookimpl"]),
        (WrongArgument, ["plugin 'wrong-argument'", "a hook does not fit its specification", "rond"]),
        (HalfState, ["plugin 'half-state'", "`state_dict` and `load_state_dict` belong together; implement both"]),
    ],
)
def test_wrong_hooks(cls: type[Plugin], expected: list[str], plugin: Callable[[type], str]) -> None:
    with refused(PluginError, *expected):
        trl_ext.enable(plugin(cls))


# --- combinations -----------------------------------------------------------------------------------------------------


def claiming(title: str, base: type[Plugin] = Good, **attributes: Any) -> type[Plugin]:
    return type(title, (base,), {"name": title, **attributes})


class OwnsLoss(Good):
    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(loss.per_token_logps)


class OwnsForward(Good):
    @hookimpl
    def logps(self, call: Any, compute: Any) -> Any:
        return compute()


class Scorer(Good):
    @hookimpl
    def rewards(self, scored: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("base", "attributes", "what"),
    [
        (Good, {"claims": ("estimator",)}, "estimator"),
        (Good, {"fields": ("same",)}, "field 'same'"),
        (OwnsLoss, {}, "policy_loss"),
        (OwnsForward, {}, "logps"),
    ],
)
def test_two_owners_of_one_thing(
    base: type[Plugin], attributes: dict[str, Any], what: str, plugin: Callable[[type], str]
) -> None:
    references = [plugin(claiming(name, base, **attributes)) for name in ("one", "two")]
    expected = f"plugins 'one' and 'two' cannot be combined: both claim {what}. Leave one out."
    for enable in (trl_ext.enable, lambda *names: trl_ext.extend(_grpo(), *names)):
        with refused(ConfigError, expected):
            enable(*references)


def _grpo() -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer


def test_two_estimators_built_in_and_own(plugin: Callable[[type], str]) -> None:
    with refused(ConfigError, "plugins 'gdpo' and 'mine' cannot be combined: both claim estimator"):
        trl_ext.enable("gdpo", plugin(claiming("mine", claims=("estimator",))))


def test_advantages_that_a_loss_would_not_use(plugin: Callable[[type], str]) -> None:
    class Adjusts(Good):
        @hookimpl
        def advantages(self, round: Any) -> None:
            return None

    loss = plugin(claiming("loss", OwnsLoss, claims=("no_advantages",)))
    expected = "cannot be combined: {!r} makes advantages, and the loss of 'loss' uses none. Leave one out."
    for other, name in (("gdpo", "gdpo"), (plugin(claiming("adjusts", Adjusts)), "adjusts")):
        with refused(ConfigError, f"plugins 'loss' and {name!r} " + expected.format(name)):
            trl_ext.enable(other, loss)
    with trl_ext.enable(loss, plugin(claiming("scorer", Scorer))):
        pass


def test_no_trainer_is_served_by_all(plugin: Callable[[type], str]) -> None:
    pairs = plugin(claiming("pairs", trainers=("dpo",)))
    with refused(ConfigError, "no trainer is served by all plugins (gdpo: grpo; pairs: dpo). Leave one out."):
        trl_ext.enable("gdpo", pairs)


def test_a_trainer_that_calls_none_of_the_hooks(plugin: Callable[[type], str]) -> None:
    from trl import DPOTrainer

    scorer = plugin(claiming("scorer", Scorer, trainers=("grpo", "dpo")))
    with refused(PluginError, "plugin 'scorer' declares the DPO trainer, which calls none of its hooks (rewards)"):
        trl_ext.extend(DPOTrainer, scorer)


# --- options ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inner:
    target: str = option(help="a name")
    weight: float = option(1.0, help="a number")


@dataclasses.dataclass(frozen=True)
class Many:
    needed: int = option(help="no default")
    rate: float = option(0.5, help="a number")
    count: int = option(3, help="a whole number")
    flag: bool = option(False, help="yes or no")
    mode: Literal["a", "b"] = option("a", help="a choice")
    limit: float | None = option(None, help="a number or nothing")
    names: tuple[str, ...] = option((), help="names")
    table: dict[str, float] = option({}, help="numbers by name")
    inner: list[Inner] = option([], help="nested")

    def __post_init__(self) -> None:
        if self.rate > 10:
            raise ValueError("rate must be at most 10")


class WithOptions(Good):
    name = "with-options"
    Options = Many


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"group_epsilon": 1}, "plugin 'gdpo' has no option 'group_epsilon'. Did you mean 'group_eps'"),
        ({"group_eps": "much"}, "gdpo.group_eps: expected float, > 0, got 'much'"),
        ({"group_eps": True}, "gdpo.group_eps: expected float, > 0, got True"),
        ({"group_eps": None}, "gdpo.group_eps: expected float, > 0, got None"),
        ({"batch_norm": "yes"}, "gdpo.batch_norm: expected bool, got 'yes'"),
        ({"batch_norm": 1}, "gdpo.batch_norm: expected bool, got 1"),
        ({"whiten": "rows"}, "gdpo.whiten: expected 'sequence' or 'token', got 'rows'"),
        (
            {"conditions": {"target": "a"}},
            "gdpo.conditions: expected a list of a mapping with target, given, threshold",
        ),
        ({"conditions": [{"target": "a", "gven": "b"}]}, "has no option 'gven'. Did you mean 'given'?"),
        ({"conditions": [{"target": "a"}]}, "needs a value for 'given'"),
    ],
)
def test_wrong_options_of_gdpo(values: dict[str, Any], expected: str) -> None:
    with refused(OptionError, expected):
        trl_ext.enable("gdpo", gdpo=values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "plugin 'with-options' needs a value for 'needed': --set with-options.needed=VALUE, or `plugins:"),
        ({"needed": 1.5}, "with-options.needed: expected int, got 1.5"),
        ({"needed": True}, "with-options.needed: expected int, got True"),
        ({"needed": "3"}, "with-options.needed: expected int, got '3'"),
        ({"needed": 1, "rate": 11}, "plugin 'with-options': rate must be at most 10"),
        ({"needed": 1, "limit": "x"}, "with-options.limit: expected float or null, got 'x'"),
        ({"needed": 1, "names": "abc"}, "with-options.names: expected a list of str, got 'abc'"),
        ({"needed": 1, "names": [1]}, "with-options.names: expected a list of str, got [1]"),
        ({"needed": 1, "table": [1]}, "with-options.table: expected dict"),
    ],
)
def test_wrong_options_of_every_type(values: dict[str, Any], expected: str, plugin: Callable[[type], str]) -> None:
    with refused(OptionError, expected):
        trl_ext.enable({plugin(WithOptions): values})


def test_right_options_of_every_type(plugin: Callable[[type], str]) -> None:
    values = {"needed": 2.0, "rate": "1e-3", "count": 4, "flag": True, "mode": "b", "limit": 2, "names": ["x"]}
    values |= {"table": {"a": 1.0}, "inner": [{"target": "t"}, Inner("u", 2.0)]}
    (spec,) = find.resolve({plugin(WithOptions): values})
    expected = Many(2, 1e-3, 4, True, "b", 2.0, ("x",), {"a": 1.0}, [Inner("t"), Inner("u", 2.0)])
    assert spec.options == expected and type(spec.options.needed) is int


def test_defaults_are_not_shared(plugin: Callable[[type], str]) -> None:
    reference = plugin(WithOptions)
    one, other = (find.resolve({reference: {"needed": 1}})[0].options for _ in range(2))
    assert one.table is not other.table and one.inner is not other.inner


def test_options_that_are_no_mapping() -> None:
    with refused(OptionError, "options of plugin 'gdpo' must be a mapping, got 0.1"):
        trl_ext.enable({"gdpo": 0.1})  # type: ignore[dict-item]


@pytest.mark.parametrize("text", ["gdpo=1", "gdpo.x", ".x=1", "gdpo.=1", "x=1.5"])
def test_a_malformed_assignment(text: str) -> None:
    with refused(OptionError, f"--set {text}: expected PLUGIN.OPTION=VALUE, for example gdpo.group_eps=1e-4"):
        parse_set([text])


def test_assignments() -> None:
    assert parse_set(["a.x=1", "a.y=[1, two]", "b.z={k: 0.5}", "a.t=p=q"]) == {
        "a": {"x": 1, "y": [1, "two"], "t": "p=q"},
        "b": {"z": {"k": 0.5}},
    }
    with refused(OptionError, "--set a.x=[1: the value is not valid YAML"):
        parse_set(["a.x=[1"])


def test_an_option_of_a_plugin_that_is_not_enabled() -> None:
    expected = "--set otc.rate: plugin 'otc' is not enabled. Known: gdpo. Add it: --plugin otc"
    with refused(OptionError, expected):
        find.merge(["gdpo"], None, {"otc": {"rate": 1}})


def test_merging_prefers_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + ONE.format("Mine", "my-own"))
    block = {"GDPO": {"group_eps": 1e-3, "batch_eps": 1e-3}, str(file): None}
    merged = find.merge(["gdpo"], block, {"gdpo": {"group_eps": 1e-2}, "my-own": {"x": 1}})
    assert merged == {"gdpo": {"group_eps": 1e-2, "batch_eps": 1e-3}, str(file): {"x": 1}}
    with refused(OptionError, "`plugins:` must be a mapping of plugin names to options, got ['gdpo']"):
        find.merge([], ["gdpo"], {})  # type: ignore[arg-type]
    with refused(OptionError, "options of plugin 'gdpo' must be a mapping, got 3"):
        find.merge([], {"gdpo": 3}, {})


# --- entry points -----------------------------------------------------------------------------------------------------


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
        "plugin name 'gdpo' is built in and also provided by acme 1.2. Ask for the other one as --plugin acme_gdpo:"
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
