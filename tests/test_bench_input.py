"""The bench measures what it says; how fast that is is for people to read, not for a test to judge."""

import json
import sys

import pytest
from bench import input as bench
from test_prepare import by_class

from effnetlib import EffnetlibError


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    by_class(tmp_path / "in")
    return str(tmp_path / "in")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    bench.main()


def test_every_step_has_a_rate_on_one_core_and_on_all(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "usable_cores", lambda: 2)
    run(monkeypatch, quick, "--size", 16, "--record", tmp_path / "bench.json")
    output = capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert len(written["rates"]) == 10 * 2 and {rate["threads"] for rate in written["rates"]} == {1, 2}
    assert all(
        0 < rate["least"] <= rate["median"] <= rate["greatest"] and rate["rounds"] == 2 for rate in written["rates"]
    )
    assert written["ratios"].keys() == bench.ratios([bench.Rate(**rate) for rate in written["rates"]]).keys()
    assert "ours over plain Pillow doing the same, one core" in output and "2 threads over one" in output
    assert written["environment"]["host"]


def test_a_python_that_pretends_to_have_tensorflow(quick, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho warming up\necho 100.5\n")
    fake.chmod(0o755)
    rates = bench.bench(quick, images=3, size=16, tensorflow=fake)
    assert [rate.median for rate in rates if rate.step == bench.TENSORFLOW][0] == 100.5
    fake.write_text("#!/bin/sh\necho No module named tensorflow >&2\nexit 1\n")
    with pytest.raises(EffnetlibError, match="cannot measure tf.data: No module named tensorflow"):
        bench.bench(quick, images=3, size=16, tensorflow=fake)


def test_sets_in_memory_are_refused():
    with pytest.raises(EffnetlibError, match="digits is in memory already"):
        bench.bench("digits")


@pytest.mark.parametrize(
    "arguments", [["--images", 0], ["--size", -1], ["--tensorflow", "/nope"], ["--record", "/nope/x.json"]]
)
def test_bad_usage_is_found_before_anything_is_measured(quick, monkeypatch, arguments):
    with pytest.raises(SystemExit):
        run(monkeypatch, quick, *arguments)
