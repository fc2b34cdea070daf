from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
import warnings

import pytest
from core.fake_packages import HOOKIMPL, LAKE, LAKE_CLAIMS, STORAGE_CLASS, STRATEGY_CLASS, Site
from milepost.config import BUILT_IN, configured
from milepost.errors import (
    ConfigError,
    PluginBrokenError,
    PluginNotFoundError,
    RequestError,
    WeakGuaranteeWarning,
)
from milepost.routes import explain, open_route, resolve

GENERIC = f"""
{HOOKIMPL}{STORAGE_CLASS}
def open_any(url, **options):
    return Lake(url)
@hookimpl
def register_storage(register): register("fsspec", open_any)
"""

PICKY = f"""
from milepost.protocols import RenamesPrefixes, SyncsPrefixes
{HOOKIMPL}{STRATEGY_CLASS}
class Picky(Strategy):
    needs = (RenamesPrefixes, SyncsPrefixes)
    def __init__(self, wait=1): self.wait = wait
@hookimpl
def register_commit(register): register("picky", Picky)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    for name in ("MILEPOST_CONFIG", "MILEPOST_TOML", "MILEPOST_DISABLE_PLUGINS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    site = Site(tmp_path / "site")
    site.folder.mkdir()
    monkeypatch.syspath_prepend(str(site.folder))
    site.install("lake-package", LAKE_CLAIMS, {"lake_module": LAKE})
    site.install("generic-package", {"milepost.storage": {"fsspec": "generic_module"}}, {"generic_module": GENERIC})
    site.install("picky-package", {"milepost.commit": {"picky": "picky_module"}}, {"picky_module": PICKY})
    yield site
    site.forget()


@pytest.fixture
def plugins(site):
    return site.plugins()


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


def resolve_writing(url, plugins):
    with configured({"default": {"arrays": "packed"}}):
        return resolve(url, plugins, writing=True)


# --- resolving -------------------------------------------------------------------------------------------------------


def test_a_claimed_scheme_is_served_by_who_claims_it(plugins):
    route = resolve("lake://a//runs/7/", plugins)
    assert (route.url, route.root, route.name) == ("lake://a/runs/7", "lake://a/runs", "7")
    assert (route.storage, route.commit, route.arrays) == ("lake", None, "safetensors")
    assert (route.verify, route.mapped, route.save_budget, route.load_budget) == (True, False, None, None)
    assert route.threads >= 1
    assert route.origins["verify"] == BUILT_IN
    assert "lake" in route.origins["storage"]


def test_settings_reach_the_route_with_their_origin(plugins):
    settings = {"threads": 3, "save_budget": "1MiB", "verify": False, "storage_options": {"timeout": 9}}
    with configured({"url": {"lake://a": settings}}):
        route = resolve("lake://a/7", plugins)
    assert (route.threads, route.save_budget, route.verify) == (3, 2**20, False)
    assert route.storage_options == {"timeout": 9}
    assert route.origins["threads"] == 'milepost.configured [url."lake://a"]'


def test_a_route_is_a_value(plugins):
    route = resolve("lake://a/7", plugins)
    assert pickle.loads(pickle.dumps(route)) == copy.deepcopy(route) == resolve("lake://a/7", plugins)  # noqa: S301
    with pytest.raises(dataclasses.FrozenInstanceError):
        route.threads = 7


def test_credentials_do_not_show_in_a_route(plugins):
    with configured({"default": {"storage_options": {"region": "hush-hush"}}}):
        assert "hush-hush" not in repr(resolve("lake://a/7", plugins))


@pytest.mark.parametrize("url", ["", "lake://a", "lake://", "/"])
def test_what_cannot_be_a_checkpoint_is_refused(plugins, url):
    with pytest.raises(RequestError):
        resolve(url, plugins)


def test_a_storage_may_be_chosen_by_name(plugins):
    with configured({"url": {"fish://": {"storage": "lake"}}}):
        assert resolve("fish://a/7", plugins).storage == "lake"


def test_a_chosen_storage_that_is_not_there_is_named(plugins):
    with (
        configured({"default": {"storage": "lak"}}),
        pytest.raises(PluginNotFoundError, match="'lak'") as error,
    ):
        resolve("lake://a/7", plugins)
    assert "did you mean 'lake'?" in notes(error)


def test_reading_never_needs_the_configured_array_writer(plugins):
    with configured({"default": {"arrays": "gone", "arrays_options": {"nothing": 1}}}):
        assert resolve("lake://a/7", plugins).arrays == "gone"
        with pytest.raises(PluginNotFoundError, match="array writer 'gone'"):
            resolve("lake://a/7", plugins, writing=True)


def test_resolving_imports_only_what_serves_the_url(plugins):
    resolve("lake://a/7", plugins)
    assert "lake_module" in sys.modules
    assert not {"generic_module", "picky_module"} & set(sys.modules)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"storage_options": {"timeot": 1}}, "unknown option 'timeot' in storage_options of milepost", "'timeout'"),
        ({"storage_options": {"url": "x"}}, "unknown option 'url'", ""),
        ({"commit": "picky", "commit_options": {"wai": 1}}, "'wai' in commit_options.*'picky'", "'wait'"),
        ({"arrays": "packed", "arrays_options": {"levl": 1}}, "'levl' in arrays_options.*'packed'", "'level'"),
    ],
)
def test_options_are_checked_against_what_they_configure(plugins, settings, said, hint):
    with configured({"default": settings}), pytest.raises(ConfigError, match=said) as error:
        resolve("lake://a/7", plugins, writing=True)
    assert hint in notes(error)


def test_options_of_the_storages_own_strategy_are_checked_before_anything_is_written(plugins):
    with configured({"default": {"commit_options": {"wait": 1}}}):
        route = resolve("lake://a/7", plugins)
    with pytest.raises(ConfigError, match=r"unknown option 'wait' in commit_options of milepost\.configured"):
        open_route(route, plugins)


def test_an_option_that_is_needed_is_asked_for(site):
    source = LAKE.replace('region="here"', "region").replace("lake", "pond")
    site.install("pond-package", {"milepost.storage": {"pond": "pond_module"}}, {"pond_module": source})
    plugins = site.plugins()
    with pytest.raises(ConfigError, match="needs the option 'region'"):
        resolve("pond://a/7", plugins)
    with configured({"default": {"storage_options": {"region": "x"}}}):
        assert resolve("pond://a/7", plugins).storage_options == {"region": "x"}


def test_a_factory_that_takes_any_option_gets_any(plugins):
    with configured({"default": {"storage_options": {"whatever": 1}}}):
        assert resolve("memory://a/7", plugins).storage_options == {"whatever": 1}


# --- what nobody claims ----------------------------------------------------------------------------------------------


def test_what_only_fsspec_knows_goes_through_the_generic_storage(plugins):
    route = resolve("memory://a/7", plugins)
    assert (route.storage, route.origins["storage"]) == ("fsspec", "the scheme of memory://a/7")


def test_what_fsspec_knows_but_cannot_import_names_the_package(plugins):
    with pytest.raises(PluginNotFoundError, match="boxfs") as error:
        resolve("box://a/7", plugins)
    assert "pip install boxfs" in notes(error)


def test_a_scheme_that_nobody_knows_lists_what_is_offered(plugins):
    with pytest.raises(PluginNotFoundError, match="'laake'") as error:
        resolve("laake://a/7", plugins)
    assert "did you mean 'lake'?" in notes(error)
    assert "milepost.storage" in notes(error)
    with pytest.raises(PluginNotFoundError) as error:
        resolve("qqqqqq://a/7", plugins)
    assert "there are: 'fsspec', 'lake'" in notes(error)


def test_a_missing_package_of_this_project_is_not_replaced_by_fsspec(plugins):
    with pytest.raises(PluginNotFoundError) as error:
        resolve("/data/7", plugins)
    assert "pip install milepost-posix" in notes(error)


def test_a_storage_that_is_switched_off_is_not_replaced_by_fsspec(site):
    site.install("mem-package", {"milepost.storage": {"memory": "lake_module"}})
    with pytest.raises(PluginNotFoundError, match="switched off"):
        resolve("memory://a/7", site.plugins(["mem-package"]))


def test_the_weaker_guarantee_is_said_once_and_only_to_who_writes(plugins):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_route(resolve("memory://a/7", plugins), plugins)
    with pytest.warns(WeakGuaranteeWarning, match="memory:// .*nothing is promised"):
        open_route(resolve_writing("memory://a/7", plugins), plugins)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_route(resolve_writing("memory://b/8", plugins), plugins)


def test_a_storage_of_its_own_warns_of_nothing(plugins):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_route(resolve_writing("lake://a/7", plugins), plugins)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_the_storage_is_opened_at_the_root_with_its_best_strategy(plugins):
    with configured({"default": {"storage_options": {"region": "there"}}}):
        opened = open_route(resolve("lake://a/runs/7", plugins), plugins)
    assert (opened.storage.url, opened.storage.region) == ("lake://a/runs", "there")
    assert type(opened.commit).__name__ == "Strategy"
    assert opened.route.name == "7"


def test_a_strategy_that_the_storage_cannot_keep_is_refused(plugins):
    with configured({"default": {"commit": "picky"}}):
        route = resolve("lake://a/7", plugins)
    with pytest.raises(ConfigError, match=r"'picky' cannot be kept by Lake.*RenamesPrefixes, SyncsPrefixes") as error:
        open_route(route, plugins)
    assert notes(error) == "what fits: 'create'"


def test_a_strategy_that_the_storage_can_keep_is_made_with_its_options(site):
    more = "def rename(self, source, target): pass\n    def sync(self, prefix): pass\n    def size"
    source = LAKE.replace("def size", more).replace("lake", "pond")
    site.install("pond-package", {"milepost.storage": {"pond": "pond_module"}}, {"pond_module": source})
    plugins = site.plugins()
    with configured({"default": {"commit": "picky", "commit_options": {"wait": 5}}}):
        opened = open_route(resolve("pond://a/7", plugins), plugins)
    assert (type(opened.commit).__name__, opened.commit.wait) == ("Picky", 5)


# --- explaining ------------------------------------------------------------------------------------------------------


def test_an_explanation_gives_every_setting_its_origin(plugins):
    with configured({"default": {"threads": 3, "arrays": "packed"}}):
        told = explain("lake://a/7", plugins)
    choices = {choice.setting: (choice.value, choice.origin) for choice in told.choices}
    assert choices["threads"] == (3, "milepost.configured [default]")
    assert choices["save_budget"] == ("automatic", BUILT_IN)
    assert choices["commit"] == ("create", "what fits Lake best")
    assert choices["storage"][0] == "lake"
    assert (told.root, told.name) == ("lake://a", "7")
    assert told.storage_class == "lake_module.Lake"
    assert told.commit_promise == "nothing is promised"
    assert told.problems == ()


def test_an_explanation_hides_credentials(plugins):
    options = {"secret": "s1", "api_key": "s2", "client": {"token": "s3"}, "keyring": "shown"}
    with configured({"default": {"storage_options": options}}):
        told = explain("memory://a/7", plugins)
    shown = {choice.setting: choice.value for choice in told.choices}["storage_options"]
    assert shown == {"secret": "***", "api_key": "***", "client": {"token": "***"}, "keyring": "shown"}


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("lake://a/7", {}, "array writer 'safetensors'.*pip install milepost-safetensors"),
        ("lake://a/7", {"storage_options": {"timeot": 1}}, "timeot.*did you mean 'timeout'"),
        ("lake://a/7", {"commit": "picky"}, "picky"),
        ("qqqqqq://a/7", {}, "qqqqqq"),
        ("/data/7", {}, "pip install milepost-posix"),
        ("lake://a", {}, "it is a root"),
    ],
)
def test_an_explanation_tells_what_is_wrong_and_does_not_raise(plugins, url, settings, said):
    with configured({"default": settings}):
        told = explain(url, plugins)
    assert any(re.search(said, problem) for problem in told.problems), told.problems
    assert {choice.setting for choice in told.choices} >= {"storage", "threads"}


def test_an_explanation_survives_a_storage_that_cannot_be_opened(site):
    source = LAKE.replace("self.url,", "1 / 0; self.url,").replace("lake", "pond")
    site.install("pond-package", {"milepost.storage": {"pond": "pond_module"}}, {"pond_module": source})
    told = explain("pond://a/7", site.plugins())
    assert told.storage_class is None
    assert any("ZeroDivisionError" in problem for problem in told.problems)


def test_a_broken_plugin_stops_the_opening_and_is_told_by_the_explanation(site):
    site.install("odd-package", {"milepost.plugins": {"odd": "odd_module"}}, {"odd_module": "1 / 0"})
    plugins = site.plugins()
    with pytest.raises(PluginBrokenError, match="odd-package"):
        open_route(resolve("lake://a/7", plugins), plugins)
    assert any("MILEPOST_DISABLE_PLUGINS=odd" in problem for problem in explain("lake://a/7", plugins).problems)
