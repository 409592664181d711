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


def test_every_step_has_a_rate_and_every_promised_ratio_is_written(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "usable_cores", lambda: 2)
    monkeypatch.setattr(bench, "_in_memory", lambda: {(step, n): lambda: 5.0 for step, n in IN_MEMORY})
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho warming up\necho 100.5\n")
    fake.chmod(0o755)
    run(monkeypatch, quick, "--size", 16, "--tensorflow", fake, "--record", tmp_path / "bench.json")
    output = capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    rates = {(rate["step"], rate["cores"]): rate for rate in written["rates"]}
    assert len(rates) == len(written["rates"]) == 10 + 3 + 2 * 4 + 1
    assert all(
        0 <= rate["least"] <= rate["median"] <= rate["greatest"] and rate["rounds"] == 2 for rate in rates.values()
    )
    assert rates[bench.TENSORFLOW["autoaugment"], 2]["median"] == 100.5
    assert written["ratios"] == bench.ratios([bench.Rate(**rate) for rate in written["rates"]])
    assert written["ratios"].keys() >= {
        "in_memory_over_per_image", "over_tf_data_per_core", "over_tf_data_per_core_autoaugment", "two_workers_over_one",
        "main_process_lock_share",
    }  # fmt: skip
    assert written["images_per_core"].keys() == {"inception", "autoaugment", "randaugment"}
    assert "two_workers_over_one: " in output and "left out" not in output and written["environment"]["host"]


IN_MEMORY = ((bench.IN_MEMORY, 1), (bench.IN_MEMORY, 2), (bench.PER_IMAGE, 1))


def test_a_batch_at_a_time_is_what_one_image_after_another_was():
    for (step, threads), rate in bench._in_memory(batch=8).items():
        assert (step, threads) in IN_MEMORY and rate() > 0


def test_without_tensorflow_the_rest_is_measured(quick, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    run(monkeypatch, quick, "--size", 16)
    output = capsys.readouterr().out
    assert "tf.data is left out: TensorFlow is not there" in output and "over_tf_data" not in output


def test_a_python_that_only_pretends_to_have_tensorflow(quick, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho No module named tensorflow >&2\nexit 1\n")
    fake.chmod(0o755)
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
