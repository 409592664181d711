"""What the machine and the shell decide; that a run's numbers do not depend on it is in test_invariance."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from effnetlib.runs.machine import PINNED, keep_compiled, pinned, usable_cores
from effnetlib.runs.paths import outputs_folder


def test_settings_are_pinned_while_a_block_runs_and_named_and_then_as_they_were(monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = dict(jax.config.values)
    with jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow"):  # of this thread alone
        jax.config.update("jax_random_seed_offset", 3)
        jax.config.update("jax_enable_x64", True)
        try:
            with pinned() as found:
                assert all(getattr(jax.config, name, value) in (value, None) for name, value in PINNED.items())
                assert jax.jit(lambda x: x + 1)(1).dtype == "int32"
                with pinned() as inside:
                    assert not inside.keys() & PINNED.keys()
            assert jax.config.jax_enable_x64 and jax.config.jax_numpy_rank_promotion == "raise"
        finally:
            jax.config.update("jax_random_seed_offset", 0)
            jax.config.update("jax_enable_x64", False)
    assert dict(jax.config.values) == before
    assert found.items() >= {
        "jax_log_compiles": "1", "jax_enable_x64": "True", "jax_random_seed_offset": "3", "jax_transfer_guard": "disallow",
        "jax_numpy_rank_promotion": "raise",
    }.items()  # fmt: skip
    assert "jax_platforms" not in found


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 7),
        ("4:cpu,cpuacct:/host/path\n3:memory:/",
         {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 7),
        ("", {}, 7),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_control_group(own, files, cores, tmp_path, monkeypatch):
    for name in ("process_cpu_count", "cpu_count"):
        monkeypatch.setattr(os, name, lambda: 7, raising=False)
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert usable_cores(tmp_path, tmp_path / "own") == cores


@pytest.fixture
def no_cache():
    """jax without a folder for compiled programs, until the test ends."""
    before = {name: jax.config.values[name] for name in CACHE}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def test_a_restart_finds_the_programs_that_were_compiled_before(no_cache):
    hits, jump = [], jax.jit(lambda x: 3.0 * x + 41.0)
    jax.monitoring.register_event_listener(lambda event, **_: "cache_hits" in event and hits.append(event))
    jump(1.0)  # before, as a notebook may
    keep_compiled()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for wanted in (0, 1):
        jax.clear_caches()
        assert float(jump(1.0)) == 44.0 and len(hits) == wanted
    assert jax.config.jax_compilation_cache_dir == str(outputs_folder() / ".compiled")


def test_the_users_folder_for_programs_stays_and_one_that_cannot_be_written_is_said(no_cache, monkeypatch, capsys):
    outputs_folder().mkdir()
    (outputs_folder() / ".compiled").write_text("a file")
    keep_compiled()
    assert "a run that starts again compiles its programs again" in capsys.readouterr().out
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == "/mine"
