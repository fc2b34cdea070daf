from __future__ import annotations

import logging
import sys
import threading

import pytest
from core.fake_packages import ARRAYS_CLASS, HOOKIMPL, LAKE, LAKE_CLAIMS, STORAGE_CLASS, Site
from milepost.errors import PluginBrokenError, PluginConflictError, PluginNotFoundError, PluginWarning
from milepost.hookspecs import CheckpointEvent
from milepost.plugins import GROUPS, HINTS, OURS, installed, missing_members
from milepost.protocols import Storage

STORAGE, COMMIT, ARRAYS, LAYOUTS, PLUGINS = GROUPS

WRAPPER = f"""
{HOOKIMPL}
class Metered:
    def __init__(self, inner): self.inner, self.reads = inner, 0
    def read(self, key, start=0, stop=None):
        self.reads += 1
        return self.inner.read(key, start, stop)
    def __getattr__(self, name): return getattr(self.inner, name)
@hookimpl(wrapper=True)
def open_storage(url):
    return Metered((yield))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    site = Site(tmp_path / "site")
    site.folder.mkdir()
    monkeypatch.syspath_prepend(str(site.folder))
    yield site
    site.forget()


@pytest.fixture
def lake(site):
    site.install("lake-package", LAKE_CLAIMS, {"lake_module": LAKE})
    return site


def install_one(site, source, *, group=STORAGE, name="odd", distribution="odd-package"):
    site.install(distribution, {group: {name: "odd_module"}}, {"odd_module": source})
    return site.plugins()


def notes(error):
    return " ".join(getattr(error.value, "__notes__", ()))


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_claimed_module_is_not_imported_before_its_name_is_asked_for(lake):
    plugins = lake.plugins()
    assert [claim.name for claim in plugins.claims(STORAGE)] == ["lake"]
    assert "lake_module" not in sys.modules
    plugins.storage("lake")
    assert "lake_module" in sys.modules


def test_a_claim_tells_who_makes_it(lake):
    (claim,) = lake.plugins().claims(ARRAYS)
    assert (claim.group, claim.name, claim.value) == (ARRAYS, "packed", "lake_module")
    assert (claim.distribution, claim.version) == ("lake-package", "1.0")


def test_what_is_registered_is_what_is_used(lake):
    plugins = lake.plugins()
    storage = plugins.storage("lake")("lake://a", region="there")
    assert (storage.url, storage.region, storage.read("x")) == ("lake://a", "there", b"from the lake")
    assert plugins.commit("create")().promise == "nothing is promised"
    assert type(plugins.arrays("packed")()).__name__ == "Writer"


def test_one_distribution_found_twice_is_no_conflict(lake, tmp_path):
    twin = Site(tmp_path / "twin")
    twin.install("Lake_Package", {STORAGE: {"lake": "elsewhere"}}, version="0.9")
    plugins = lake.plugins(None, twin)
    assert [(claim.value, claim.version) for claim in plugins.claims(STORAGE)] == [("lake_module", "1.0")]


def test_broken_metadata_of_one_package_warns_and_hides_no_other(lake):
    info = lake.folder / "torn-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_bytes(b"[milepost.storage]\n\xff\xfe = torn\n")
    with pytest.warns(PluginWarning, match="entry points"):
        plugins = lake.plugins()
    assert plugins.storage("lake")


def test_the_process_sees_its_own_packages_once():
    assert installed() is installed()
    assert {claim.distribution for claim in installed().claims(COMMIT)} >= {"milepost-core"}


# --- bad plugins -----------------------------------------------------------------------------------------------------


def test_a_name_that_nobody_offers_lists_what_is_offered(lake):
    with pytest.raises(PluginNotFoundError, match=r"'lak'.*'lake'") as error:
        lake.plugins().storage("lak")
    assert "did you mean 'lake'?" in notes(error)
    assert isinstance(error.value, LookupError)


@pytest.mark.parametrize(("group", "name"), HINTS)
def test_a_missing_package_of_this_project_is_named(lake, group, name):
    ask = {STORAGE: "storage", COMMIT: "commit", ARRAYS: "arrays", LAYOUTS: "layout"}[group]
    with pytest.raises(PluginNotFoundError) as error:
        getattr(lake.plugins(), ask)(name)
    assert notes(error) == f"pip install {HINTS[group, name]}"


def test_hints_name_packages_of_this_project():
    assert set(HINTS.values()) <= OURS


@pytest.mark.parametrize("failure", ["import no_such_dependency", "1 / 0", "raise SystemExit(3)", "def ("])
def test_a_failing_import_is_an_error_for_who_asks_and_nobody_else(lake, failure):
    plugins = install_one(lake, failure)
    assert plugins.storage("lake")
    with pytest.raises(PluginBrokenError, match=r"'odd' of odd-package 1\.0 cannot be imported") as error:
        plugins.storage("odd")
    assert error.value.__cause__ is not None
    assert "odd-package" in notes(error)
    assert plugins.storage("lake")


def test_a_module_that_is_not_there_is_a_broken_plugin(site):
    site.install("odd-package", {STORAGE: {"odd": "no_such_module"}})
    with pytest.raises(PluginBrokenError, match="no_such_module"):
        site.plugins().storage("odd")


def test_one_name_of_two_distributions_names_both_when_asked(lake):
    lake.install("other-lake", {STORAGE: {"lake": "other_lake"}}, {"other_lake": LAKE}, version="2.0")
    plugins = lake.plugins()
    assert plugins.arrays("packed")
    with pytest.raises(PluginConflictError, match=r"lake-package 1\.0.*other-lake 2\.0") as error:
        plugins.storage("lake")
    assert "MILEPOST_DISABLE_PLUGINS" in notes(error)
    assert lake.plugins(["other-lake"]).storage("lake")


def test_a_module_without_hooks_is_broken(site):
    with pytest.raises(PluginBrokenError, match=r"no function marked with milepost\.hookspecs\.hookimpl in odd_module"):
        install_one(site, "def register_storage(register): pass").storage("odd")


def test_a_module_that_does_not_register_what_it_claims_is_broken(site):
    with pytest.raises(PluginBrokenError, match="does not register it: register_storage registers 'lake'"):
        install_one(site, LAKE).storage("odd")


def test_a_factory_that_cannot_be_called_is_broken(site):
    source = f"{HOOKIMPL}@hookimpl\ndef register_storage(register): register('odd', 7)"
    with pytest.raises(PluginBrokenError, match="registers 7, which cannot be called"):
        install_one(site, source).storage("odd")


def test_a_hook_that_raises_is_broken_from_its_cause(site):
    source = f"{HOOKIMPL}@hookimpl\ndef register_storage(register): raise KeyError('lost')"
    with pytest.raises(PluginBrokenError, match="fails in register_storage") as error:
        install_one(site, source).storage("odd")
    assert isinstance(error.value.__cause__, KeyError)


def test_an_object_that_misses_members_is_broken_and_they_are_listed(site):
    source = f"""
{HOOKIMPL}
class Half:
    url, commit = "", ""
    read = write = None
    def size(self, key): pass
    def delete(self, key): pass
@hookimpl
def register_storage(register): register("odd", lambda url: Half())
"""
    with pytest.raises(PluginBrokenError, match="made Half, which lacks 'children', 'read', 'write'"):
        install_one(site, source).storage("odd")("odd://a")


def test_a_hook_that_wants_an_argument_of_another_version_is_broken(lake):
    source = f"{HOOKIMPL}@hookimpl\ndef register_storage(register, colour): register('odd', dict)"
    plugins = install_one(lake, source)
    with pytest.raises(PluginBrokenError, match="colour") as error:
        plugins.storage("odd")
    assert "default value" in notes(error)
    with pytest.raises(PluginBrokenError, match="colour"):
        plugins.storage("odd")
    assert plugins.storage("lake")


def test_a_wrapper_that_is_no_generator_is_broken(site):
    source = f"{HOOKIMPL}@hookimpl(wrapper=True)\ndef open_storage(url): return None"
    with pytest.raises(PluginBrokenError, match="generator"):
        install_one(site, source, group=PLUGINS).load_all()


def test_a_hook_from_the_future_is_left_out_with_one_warning(site):
    source = f"{LAKE}\n@hookimpl\ndef register_teleport(register): pass"
    plugins = install_one(site, source, name="lake")
    with pytest.warns(PluginWarning, match=r"odd-package 1\.0 implements 'register_teleport'.*left out"):
        assert plugins.storage("lake")
    assert plugins.storage("lake")


def test_an_optional_hook_from_the_future_is_left_out_quietly(site):
    source = f"{LAKE}\n@hookimpl(optionalhook=True)\ndef register_teleport(register): pass"
    assert install_one(site, source, name="lake").storage("lake")


def test_an_import_that_failed_can_be_mended_without_a_new_process(site, monkeypatch):
    plugins = install_one(site, LAKE.replace("lake", "odd") + "\nimport not_yet_there")
    with pytest.raises(PluginBrokenError):
        plugins.storage("odd")
    site.install("mending", {}, {"not_yet_there": ""})
    assert plugins.storage("odd")


# --- switching off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["lake", "lake-package", "all", "something, lake-package"])
def test_plugins_are_switched_off_by_name_by_distribution_or_all(lake, monkeypatch, named):
    monkeypatch.setenv("MILEPOST_DISABLE_PLUGINS", named)
    plugins = lake.plugins()
    with pytest.raises(PluginNotFoundError, match=r"lake-package 1\.0 cannot be used: it is switched off") as error:
        plugins.storage("lake")
    assert "MILEPOST_DISABLE_PLUGINS" in notes(error)
    assert "lake_module" not in sys.modules
    assert "lake" in [claim.name for claim in plugins.switched_off()]


def test_all_spares_the_packages_of_this_project(site):
    site.install("milepost-posix", LAKE_CLAIMS, {"lake_module": LAKE})
    assert site.plugins(["all"]).storage("lake")


# --- the group milepost.plugins --------------------------------------------------------------------------------------


def test_a_broken_package_among_the_plugins_stops_every_open(lake):
    plugins = install_one(lake, "import no_such_dependency", group=PLUGINS)
    factory = plugins.storage("lake")
    for _ in range(2):
        with pytest.raises(PluginBrokenError, match="'odd' of odd-package") as error:
            plugins.open_storage(factory, "lake://a", {})
        assert "MILEPOST_DISABLE_PLUGINS=odd" in notes(error)
        assert isinstance(error.value.__cause__, ImportError)
    with pytest.raises(PluginBrokenError):
        plugins.leaf_handlers()
    off = lake.plugins(["odd"])
    assert off.open_storage(off.storage("lake"), "lake://a", {}).size("x") == 13


def test_options_reach_the_storage(lake):
    plugins = lake.plugins()
    assert plugins.open_storage(plugins.storage("lake"), "lake://a", {"timeout": 5}).timeout == 5


def test_a_wrapper_decorates_every_storage(lake):
    plugins = install_one(lake, WRAPPER, group=PLUGINS)
    storage = plugins.open_storage(plugins.storage("lake"), "lake://a", {})
    assert storage.read("x") == b"from the lake"
    assert (storage.reads, storage.url) == (1, "lake://a")


def test_a_plugin_may_open_a_storage_in_the_factorys_place(lake):
    source = f"{HOOKIMPL}{STORAGE_CLASS}@hookimpl\ndef open_storage(url): return Lake(url, region='instead')"
    plugins = install_one(lake, source, group=PLUGINS)
    assert plugins.open_storage(plugins.storage("lake"), "lake://a", {}).region == "instead"


@pytest.mark.parametrize("made", ["None", "object()"])
def test_a_wrapper_that_loses_the_storage_is_named(lake, made):
    source = f"{HOOKIMPL}@hookimpl(wrapper=True)\ndef open_storage():\n    yield\n    return {made}"
    plugins = install_one(lake, source, group=PLUGINS)
    with pytest.raises(PluginBrokenError, match=r"lacks 'children'.*implemented by 'odd_module'"):
        plugins.open_storage(plugins.storage("lake"), "lake://a", {})


HANDLER = """
class {cls}:
    name, types = "{name}", (complex,)
    def take_apart(self, leaf): pass
    def put_together(self, json, arrays): pass
@hookimpl
def register_leaf_handlers(register): register({cls}())
"""


def test_leaf_handlers_of_this_project_come_first(site):
    site.install("a-first", {PLUGINS: {"a": "a_module"}}, {"a_module": HOOKIMPL + HANDLER.format(cls="A", name="a")})
    site.install(
        "milepost-core", {PLUGINS: {"z": "z_module"}}, {"z_module": HOOKIMPL + HANDLER.format(cls="Z", name="z")}
    )
    assert [handler.name for handler in site.plugins().leaf_handlers()] == ["z", "a"]


def test_two_leaf_handlers_of_one_name_are_a_conflict(site):
    site.install("a-first", {PLUGINS: {"a": "a_module"}}, {"a_module": HOOKIMPL + HANDLER.format(cls="A", name="same")})
    site.install("b-next", {PLUGINS: {"b": "b_module"}}, {"b_module": HOOKIMPL + HANDLER.format(cls="B", name="same")})
    plugins = site.plugins()
    with pytest.raises(PluginConflictError, match=r"leaf handler 'same'.*a-first.*b-next"):
        plugins.leaf_handlers()
    assert [problem.claim for problem in plugins.problems()] == [None]


def test_a_leaf_handler_that_misses_members_is_broken(site):
    source = f"{HOOKIMPL}@hookimpl\ndef register_leaf_handlers(register): register(object())"
    with pytest.raises(PluginBrokenError, match="lacks 'name', 'put_together', 'take_apart', 'types'"):
        install_one(site, source, group=PLUGINS).leaf_handlers()


def test_name_formats_are_offered_by_name(site):
    source = f"{HOOKIMPL}@hookimpl\ndef register_name_formats(register): register('even', list)"
    assert install_one(site, source, group=PLUGINS).name_formats() == {"even": list}


def test_a_name_format_that_cannot_be_called_is_broken(site):
    source = f"{HOOKIMPL}@hookimpl\ndef register_name_formats(register): register('even', 2)"
    with pytest.raises(PluginBrokenError, match="registers 2 for the name format 'even'"):
        install_one(site, source, group=PLUGINS).name_formats()


# --- observers -------------------------------------------------------------------------------------------------------

OBSERVER = f"""
{HOOKIMPL}
heard = []
@hookimpl
def save_committed(event):
    heard.append(event.url)
    FAIL
"""


def test_an_observer_that_raises_is_logged_and_the_others_still_hear(site, caplog):
    for name, then in [("a_module", "pass"), ("b_module", "raise OSError('deaf')"), ("c_module", "pass")]:
        site.install(name, {PLUGINS: {name: name}}, {name: OBSERVER.replace("FAIL", then)})
    with caplog.at_level(logging.ERROR, logger="milepost"):
        site.plugins().tell("save_committed", CheckpointEvent("lake://a/7"))
    assert [sys.modules[name].heard for name in ("a_module", "b_module", "c_module")] == [["lake://a/7"]] * 3
    (record,) = caplog.records
    assert "b_module failed in save_committed of lake://a/7" in record.getMessage()
    assert record.exc_info[0] is OSError


def test_telling_never_raises_because_a_plugin_is_broken(site, caplog):
    plugins = install_one(site, "import no_such_dependency", group=PLUGINS)
    with caplog.at_level(logging.ERROR, logger="milepost"):
        plugins.tell("save_failed", CheckpointEvent("lake://a/7"))
    assert "not every plugin could be told" in caplog.text


def test_an_observer_may_ask_to_be_stopped(site):
    plugins = install_one(site, OBSERVER.replace("FAIL", "raise KeyboardInterrupt"), group=PLUGINS)
    with pytest.raises(KeyboardInterrupt):
        plugins.tell("save_committed", CheckpointEvent("lake://a/7"))


# --- problems and threads --------------------------------------------------------------------------------------------


def test_problems_lists_everything_that_is_broken_and_why(lake):
    lake.install("no-import", {ARRAYS: {"torn": "torn_module"}}, {"torn_module": "1 / 0"})
    lake.install("no-name", {ARRAYS: {"mute": "mute_module"}}, {"mute_module": HOOKIMPL + ARRAYS_CLASS})
    lake.install("two-lakes", {STORAGE: {"lake": "two_lakes"}}, {"two_lakes": LAKE})
    future = f"{HOOKIMPL}@hookimpl\ndef teleport(): pass"
    lake.install("future", {PLUGINS: {"future": "future_module"}}, {"future_module": future})
    found = {(problem.claim.distribution, type(problem.error)) for problem in lake.plugins().problems()}
    assert found == {
        ("no-import", PluginBrokenError),
        ("no-name", PluginBrokenError),
        ("lake-package", PluginConflictError),
        ("two-lakes", PluginConflictError),
        ("future", PluginWarning),
    }


def test_nothing_is_wrong_with_packages_in_order(lake):
    install_one(lake, WRAPPER, group=PLUGINS)
    assert lake.plugins().problems() == ()


def test_a_module_asked_for_by_many_threads_is_registered_once(site):
    source = f"import threading\ncount = []\n{LAKE}".replace(
        'register("lake", Lake)', 'count.append(1); register("lake", Lake)'
    )
    site.install("lake-package", LAKE_CLAIMS, {"lake_module": source})
    plugins = site.plugins()
    start, failures = threading.Barrier(8), []

    def ask():
        start.wait()
        try:
            plugins.storage("lake")("lake://a")
            plugins.commit("create")()
        except BaseException as error:  # noqa: BLE001 (whatever a thread dies of is what the test is about)
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sys.modules["lake_module"].count == [1]


def test_missing_members_looks_at_the_whole_protocol():
    whole = {}
    exec(STORAGE_CLASS, whole)  # noqa: S102 (the same text that the fake package holds)
    assert missing_members(whole["Lake"]("lake://a"), Storage) == ()
    assert missing_members(object(), Storage) == ("children", "commit", "delete", "read", "size", "url", "write")
