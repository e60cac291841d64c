"""Tests of plugins, with temporary distributions that the interpreter finds like installed ones."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest
from unit.throwaway import Install, install

from phicore.backend import BackendOptions
from phicore.errors import BackendError, PhicoreError, SourceError
from phicore.plugins import BackendInfo, Plugins, choose_backend, manager
from phicore.sources import SCHEMES

__all__ = ["install"]

GOOD = """
    from phicore import hookimpl

    def create(options):
        from phicore_numpy.backend import NumpyBackend

        made = NumpyBackend()
        made.given = options
        return made

    @hookimpl
    def phicore_register_backends(register):
        register({name!r}, create=create, devices=lambda: ["cpu"], protocol={protocol})
"""


@pytest.fixture
def only_throwaways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the entry points of all distributions except the temporary ones."""

    found = manager.entry_points

    def ours(**arguments: str) -> list[object]:
        return [p for p in found(**arguments) if p.module.startswith("throwaway_")]

    monkeypatch.setattr(manager, "entry_points", ours)


def refusal(name: str | None, plugins: Plugins) -> str:
    with pytest.raises(BackendError) as caught:
        choose_backend(name, plugins)
    return str(caught.value)


def test_backends_installed_distribution_is_found(install: Install):
    before = list(Plugins().backends())
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=2), version="3.1")
    plugins = Plugins()
    backends = plugins.backends()
    assert set(backends) == {*before, "abacus"}
    assert next(iter(backends)) == before[0]  # preferred backends come first
    info = choose_backend("abacus", plugins)
    assert (info.name, info.distribution, info.version) == ("abacus", "phicore-abacus", "3.1")
    assert info.devices() == ["cpu"]
    options = BackendOptions(threads=3)
    assert vars(info.create(options))["given"] is options
    assert plugins.broken == []


def test_backends_one_distribution_may_register_several(install: Install):
    install(
        "phicore-pair",
        "pair",
        """
        from phicore import hookimpl

        @hookimpl
        def phicore_register_backends(register):
            for name in ("zig", "zag"):
                register(name, create=lambda options: name, devices=list, protocol=2)
        """,
    )
    assert list(Plugins().backends())[-2:] == ["zag", "zig"]


def test_plugins_two_of_them_share_nothing(install: Install):
    before = Plugins()
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=2))
    assert "abacus" not in before.backends()
    assert "abacus" in Plugins().backends()


def test_backends_one_name_from_two_distributions_is_neither_s_and_both_are_named(
    install: Install,
):
    before = list(Plugins().backends())
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=2))
    install("quipu", "knots", GOOD.format(name="abacus", protocol=2))
    install("slide", "rule", GOOD.format(name="rule", protocol=2))
    plugins = Plugins()
    for _ in range(2):  # a second call must not report the conflict again
        assert list(plugins.backends()) == [*before, "rule"]
    reason = "claimed by two distributions, phicore-abacus and quipu; uninstall one"
    assert [(b.name, b.distribution, b.reason) for b in plugins.broken] == [
        ("abacus", "phicore-abacus", reason),
        ("abacus", "quipu", reason),
    ]
    assert refusal("abacus", plugins).endswith(f"is not usable: {reason}")


def test_backends_for_another_protocol_is_listed_and_stops_nothing(install: Install):
    before = list(Plugins().backends())
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=1))
    install("slide", "rule", GOOD.format(name="rule", protocol=2))
    plugins = Plugins()
    assert list(plugins.backends()) == [*before, "rule"]
    assert refusal("abacus", plugins) == (
        "backend 'abacus': phicore-abacus is not usable: made for version 1 of the protocol, "
        "phicore has 2; install a phicore-abacus that fits"
    )


def test_backends_without_a_protocol_is_broken(install: Install):
    install("phicore-abacus", "abacus", GOOD.replace(", protocol={protocol}", "").format(name="a"))
    plugins = Plugins()
    plugins.backends()
    assert "protocol" in plugins.broken[0].reason


def test_installed_says_what_each_plugin_provides(install: Install):
    install("phicore-abacus", "beads", GOOD.format(name="abacus", protocol=2), version="3.1")
    found = {info.name: info for info in Plugins().installed()}
    assert found["beads"].distribution == "phicore-abacus"
    assert (found["beads"].version, found["beads"].provides) == ("3.1", ("backend abacus",))
    assert found["numpy"].provides == ("backend numpy",)


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("beads", {"numpy", "rule"}),
        ("phicore-abacus, rule", {"numpy"}),
        ("*", {"numpy"}),
        ("phicore-numpy", {"abacus", "rule"}),
        ("", {"abacus", "numpy", "rule"}),
    ],
)
def test_plugins_can_be_switched_off(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str, left: set[str]
):
    install("phicore-abacus", "beads", GOOD.format(name="abacus", protocol=2))
    install("slide", "rule", GOOD.format(name="rule", protocol=2))
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", value)
    plugins = Plugins()
    assert set(plugins.backends()) & {"abacus", "numpy", "rule"} == left
    off = {name for name, _ in plugins.disabled} - {"array-api-strict"}
    assert len(off) == len({"abacus", "numpy", "rule"} - left)
    assert plugins.broken == []


def test_backends_plugin_that_fails_to_import_is_listed_and_stops_nothing(install: Install):
    before = list(Plugins().backends())
    install("phicore-abacus", "abacus", "import beads_and_wire\n")
    plugins = Plugins()
    assert list(plugins.backends()) == before
    [broken] = plugins.broken
    assert (broken.name, broken.distribution) == ("abacus", "phicore-abacus")
    assert broken.reason == "ModuleNotFoundError: No module named 'beads_and_wire'"
    assert refusal("abacus", plugins) == (
        "backend 'abacus': phicore-abacus is not usable: "
        "ModuleNotFoundError: No module named 'beads_and_wire'"
    )


def test_backends_misspelt_hook_is_broken_and_stops_nothing(install: Install):
    install(
        "phicore-abacus",
        "abacus",
        GOOD.format(name="abacus", protocol=2).replace("_backends", "_backend"),
    )
    # a plugin that is loaded after the broken one
    install("phicore-zither", "zither", GOOD.format(name="zither", protocol=2))
    plugins = Plugins()
    assert "zither" in plugins.backends()
    [broken] = plugins.broken
    assert broken.name == "abacus"
    assert "unknown hook 'phicore_register_backend'" in broken.reason
    assert "phicore-abacus is not usable" in refusal("abacus", plugins)


def test_backends_hook_with_an_unknown_argument_is_broken(install: Install):
    install(
        "phicore-abacus",
        "abacus",
        GOOD.format(name="abacus", protocol=2).replace("(register)", "(reg)"),
    )
    plugins = Plugins()
    assert "abacus" not in plugins.backends()
    [broken] = plugins.broken
    assert "PluginValidationError" in broken.reason


def test_backends_hook_that_raises_is_broken_and_stops_nothing(install: Install):
    before = list(Plugins().backends())
    install(
        "phicore-abacus",
        "abacus",
        """
        from phicore import hookimpl

        @hookimpl
        def phicore_register_backends(register):
            raise RuntimeError("no beads\\nand no wire")
        """,
    )
    plugins = Plugins()
    assert list(plugins.backends()) == before
    assert [b.reason for b in plugins.broken] == ["RuntimeError: no beads"]
    assert "is not usable: RuntimeError: no beads" in refusal("abacus", plugins)


def test_backend_whose_library_is_missing_is_listed_and_says_why_when_used(install: Install):
    install(
        "phicore-abacus",
        "abacus",
        """
        from phicore import hookimpl

        @hookimpl
        def phicore_register_backends(register):
            def library(device=None):
                import beads_and_wire

            register("abacus", create=library, devices=library, protocol=2)
        """,
    )
    info = choose_backend("abacus", Plugins())
    expected = "backend abacus: not usable: ModuleNotFoundError: No module named 'beads_and_wire'"
    for use in (info.create, info.devices):
        with pytest.raises(BackendError) as caught:
            use()
        assert str(caught.value) == expected


def test_backend_own_error_is_passed_on_as_it_is(install: Install):
    install(
        "phicore-abacus",
        "abacus",
        """
        from phicore import BackendError, hookimpl

        @hookimpl
        def phicore_register_backends(register):
            def create(options):
                raise BackendError("backend abacus: no device 'x' (available: cpu)")

            register("abacus", create=create, devices=list, protocol=2)
        """,
    )
    with pytest.raises(BackendError, match=r"^backend abacus: no device 'x' \(available: cpu\)$"):
        choose_backend("abacus", Plugins()).create()


def test_choose_backend_unknown_name_lists_those_installed():
    plugins = Plugins()
    assert refusal("mxl", plugins) == (
        f"no backend 'mxl'; installed: {', '.join(plugins.backends())}"
    )
    assert refusal("cuda", plugins).endswith("; cuda is a device: --device cuda")


def test_choose_backend_nothing_installed_says_what_to_install():
    plugins = Plugins([])
    assert refusal(None, plugins).startswith("no backend is installed; install one with: pip ")
    assert refusal("jax", plugins) == (
        "no backend 'jax'; installed: none; install it with: pip install 'phicore[jax]'"
    )


def test_choose_backend_switched_off_says_so(monkeypatch):
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", "numpy")
    assert refusal("numpy", Plugins()).endswith(
        "; numpy is switched off by PHICORE_DISABLE_PLUGINS"
    )


@pytest.mark.usefixtures("only_throwaways")
def test_choose_backend_no_name_takes_the_first_usable_one(install: Install):
    broken = GOOD.format(name="abacus", protocol=2).replace('lambda: ["cpu"]', "lambda: 1 / 0")
    install("phicore-abacus", "abacus", broken)
    assert refusal(None, Plugins()) == (
        "no usable backend: backend abacus: not usable: ZeroDivisionError: division by zero"
    )
    install("phicore-zither", "zither", GOOD.format(name="zither", protocol=2))
    assert choose_backend(None, Plugins()).name == "zither"


@pytest.mark.usefixtures("only_throwaways")
def test_backends_preferred_ones_come_first(install: Install):
    for name in ("abacus", "numpy", "jax"):
        install(f"throwaway-{name}", name, GOOD.format(name=name, protocol=2))
    assert list(Plugins().backends()) == ["jax", "numpy", "abacus"]


def test_backend_info_shows_no_functions():
    info = BackendInfo("n", "d", "1", lambda device: device, list)  # type: ignore[arg-type]
    assert repr(info) == "BackendInfo(name='n', distribution='d', version='1')"


def test_import_and_listing_backends_load_no_tensor_library():
    code = """
        import sys
        import phicore, phicore.plugins
        names = [info.name for info in phicore.backends()]
        assert names == list(phicore.plugins.Plugins().backends())
        loaded = {"jax", "jaxlib", "mlx", "torch", "tinygrad"} & set(sys.modules)
        assert not loaded, loaded
        print(*names)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(Plugins().backends())


BOX = """
    from phicore import hookimpl, PhicoreError

    def resolve(reference):
        {body}

    @hookimpl
    def phicore_register_sources(register):
        register("box", resolve=resolve)
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "box:m: phicore-box failed: ZeroDivisionError: division by zero"),
        (
            "return reference",
            "box:m: phicore-box failed: TypeError: result: expected ModelFiles, got str",
        ),
    ],
)
def test_sources_function_that_fails_is_an_error_naming_its_distribution(
    install: Install, body: str, message: str
):
    install("phicore-box", "box", BOX.format(body=body))
    with pytest.raises(SourceError) as caught:
        Plugins().sources()["box"]("box:m")
    assert str(caught.value) == message


def test_sources_own_error_is_passed_on_as_it_is(install: Install):
    install("phicore-box", "box", BOX.format(body="raise PhicoreError('no box m')"))
    with pytest.raises(PhicoreError, match=r"^no box m$"):
        Plugins().sources()["box"]("box:m")


def test_sources_that_exist_already_are_told_and_stop_nothing(install: Install):
    code = """
        from phicore import hookimpl

        @hookimpl
        def phicore_register_sources(register):
            for scheme in ("hf", "shelf"):
                register(scheme, resolve=print)
    """
    install("shelf-a", "a", code)
    install("shelf-b", "b", code)
    plugins = Plugins()
    found = plugins.sources()
    assert found["hf"] is SCHEMES["hf"]
    assert "shelf" in found
    assert {b.reason for b in plugins.broken if b.name == "a"} == {
        "the model source 'hf' exists already"
    }
    assert len([b for b in plugins.broken if b.name == "b"]) == 2
    assert [p.provides for p in plugins.installed() if p.name == "a"] == [("source shelf",)]


def test_sources_without_plugins_are_the_built_in_ones():
    assert Plugins([]).sources() == SCHEMES


def test_plugins_two_entry_points_of_one_module_say_so(install: Install):
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=2))
    [point] = [p for p in manager.entry_points(group="phicore") if p.name == "abacus"]
    loaded = Plugins([point, EntryPoint("zither", point.value, "phicore")])
    assert list(loaded.backends()) == ["abacus"]
    [broken] = loaded.broken
    assert broken.name == "zither"
    assert broken.reason == (
        "throwaway_phicore_abacus is loaded already, as abacus of phicore-abacus; remove one"
    )


HOOK = """
    import sys
    from phicore import ArgumentError, hookimpl

    @hookimpl
    def phicore_register_{hook}(register):
        {body}
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        (HOOK.format(hook="backends", body="sys.exit(3)"), "SystemExit: 3"),
        (
            HOOK.format(hook="sources", body="raise ArgumentError('seed: oops')"),
            "ArgumentErr",
        ),
        (HOOK.format(hook="commands", body="register('x', 5)"), "TypeError: command 'x'"),
        (
            HOOK.format(hook="commands", body="register(None, lambda: None)"),
            "TypeError: the name",
        ),
        (
            HOOK.format(hook="sources", body="register(5, resolve=print)"),
            "TypeError: the name",
        ),
        (
            HOOK.format(hook="architectures", body="")
            + "        from phicore.network.architectures import Architecture as A; register(A())",
            "AttributeError: ",
        ),
    ],
)
def test_plugins_fault_of_any_kind_is_that_plugin_s(install: Install, code: str, reason: str):
    install("slide", "rule", code)
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=2))
    plugins = Plugins()
    assert "abacus" in [info.name for info in plugins.installed()]
    assert [b.distribution for b in plugins.broken] == ["slide"]
    assert plugins.broken[0].reason.startswith(reason)
    assert "abacus" in plugins.backends()


def test_plugins_two_entry_points_of_one_name_leave_the_first(install: Install):
    install("phicore-abacus", "abacus", GOOD.format(name="abacus", protocol=2))
    install("slide", "rule", GOOD.format(name="rule", protocol=2))
    points = {p.name: p for p in manager.entry_points(group="phicore")}
    twin = EntryPoint("abacus", points["rule"].value, "phicore")
    vars(twin).update(dist=points["abacus"].dist)
    loaded = Plugins([points["abacus"], twin])
    assert list(loaded.backends()) == ["abacus"]
    assert len(loaded.broken) == 1


def test_blame_is_for_the_plugin_whose_code_it_was(install: Install):
    # phicore has a module of this name too
    install("model", "model", GOOD.format(name="model", protocol=2))
    install("slide", "rule", HOOK.format(hook="sources", body="pass") + "    def fail(): 1 / 0")
    loaded = Plugins()
    with pytest.raises(PhicoreError) as own:
        choose_backend("nothing", loaded)
    assert loaded.blame(own.value) is None
    with pytest.raises(ZeroDivisionError) as theirs:
        sys.modules["throwaway_slide"].fail()
    assert loaded.blame(theirs.value).startswith("slide failed: ZeroDivisionError: division by ze")
