"""What `make bench` makes of its rounds; how fast anything is, is for people to read."""

import json
import sys
from pathlib import Path

import pytest
from bench import __main__ as bench
from bench import peers
from bench.contestant import Contestant, ContestantError
from bench.measurement import Measurement, ratio, table
from bench.ours import Training

from effnetlib import Recipe

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "outputs/published/bench.json"

STUB = """
import json, sys
from tests.bench.contestant import serve

def do_round(steps):
    print("a library says something")
    if steps > 100:
        raise SystemExit("out of memory")
    return 10.0 * steps

serve(lambda: ({"step_seconds": 0.5, "versions": {"stub": "1"}, "device": "CPU", "arguments": sys.argv[1:]}, do_round))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The module of a contestant that pretends."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stub"


def test_a_ratio_is_taken_round_by_round():
    ours = Measurement("ours", "images/s", [30.0, 10.0, 24.0])
    theirs = Measurement("theirs", "images/s", [20.0, 10.0, 12.0])
    found = ratio("ours over theirs", ours, theirs, at_least=1.5).to_dict()
    assert found["values"] == [1.5, 1.0, 2.0]
    assert (found["median"], found["min"], found["max"], found["rounds"], found["met"]) == (1.5, 1.0, 2.0, 3, True)


def test_aims_are_of_the_median_and_need_a_value():
    assert Measurement("", "", [1.0, 1.0, 9.0], at_least=2.0).met is False
    assert Measurement("", "", [1.01, 1.02, 9.0], at_most=1.02).met is True
    assert Measurement("", "", [1.0]).met is None and Measurement("", "", at_least=2.0).met is None


def test_the_table_has_a_line_a_measurement():
    measurements = [
        Measurement("ours over theirs", "times", [1.0, 1234.6, 2.0], at_least=1.2, note="beware"),
        Measurement("on GPU", "images/s", note=peers.NO_GPU),
        Measurement("again", "s", [0.5], at_most=0.1, note="beware"),
    ]
    _, _, *lines = table([each.to_dict() for each in measurements]).splitlines()
    assert lines[0].split("  ")[0] == "ours over theirs (1)" and lines[0].endswith("at least 1.2  met")
    assert "1 to 1,235" in lines[0] and "not run" in lines[1] and lines[2].endswith("at most 0.1   missed")
    assert lines[3:] == ["(1) beware", "(2) no GPU that jax and torch can use here: see make bench-gpu"]


def test_a_contestant_does_rounds_until_it_is_closed(stub):
    with Contestant("stub", sys.executable, [stub, "--size", "32"]) as contestant:
        assert contestant.facts["arguments"] == ["--size", "32"]
        assert [contestant.round(steps) for steps in (1, 3)] == [10.0, 30.0]
    assert contestant._process.returncode == 0


def test_a_contestant_that_ends_says_why_in_one_sentence(stub):
    with Contestant("stub", sys.executable, [stub]) as contestant:
        with pytest.raises(ContestantError, match="^stub ended with code 1: out of memory$"):
            contestant.round(1000)
    with pytest.raises(ContestantError, match="^nobody ended with code 1: .*No module named no_such_module$"):
        Contestant("nobody", sys.executable, ["no_such_module"])


def test_comparisons_have_all_their_lines(stub, tmp_path):
    started = []

    class Stubs(peers.Peers):
        def start(self, library, size, batch, gpu=False):
            assert not gpu
            started.append(library)
            return Contestant(library, sys.executable, [stub])

        def _python(self, library):
            return sys.executable  # whose jax has no CUDA, and which has no torch

    on_cpu = peers.on_cpu(
        Stubs(print, tmp_path), 32, 128, {"pytorch": 1.2, "keras": 5.0}, starts=2, rounds=2, seconds=1.0
    )
    assert started == ["effnetlib", "pytorch", "keras", "pytorch", "keras", "effnetlib"]
    assert [each.values for each in on_cpu] == [[20.0] * 4] * 3 + [[1.0] * 4] * 2
    assert [each.at_least for each in on_cpu] == [None, None, None, 1.2, 5.0]
    on_gpu = list(peers.on_gpu(Stubs(print, tmp_path), 224, [256], starts=2, rounds=3))
    assert len(on_gpu) == 3 and all(each.values == [] and each.note == peers.NO_GPU for each in on_gpu)


def test_a_library_that_does_not_fit_beside_the_other_runs_by_itself(stub, tmp_path):
    running = []

    class Stubs(peers.Peers):
        blind = []

        def start(self, library, size, batch, gpu=False):
            if batch > 256 and (library == "timm" or running):
                raise ContestantError("out of memory")
            self.device = "a GPU"
            contestant = Contestant(library, sys.executable, [stub])
            running.append(library)
            close = contestant.close
            contestant.close = lambda: (running.remove(library), close())
            return contestant

    ours, theirs, both = peers.on_gpu(Stubs(print, tmp_path), 224, [256], starts=2, rounds=3)
    assert ours.values == theirs.values == [40.0] * 6 and both.values == [1.0] * 6 and both.note == "a GPU"
    ours, theirs, both = peers.on_gpu(Stubs(print, tmp_path), 224, [1024], starts=2, rounds=3)
    assert ours.values == [40.0] * 6 and theirs.values == both.values == [] and not running
    assert theirs.note == "does not run at this batch" and "batch 1,024" in theirs.name


def test_a_rehearsal_that_fails_stops_the_bench(tmp_path):
    class Stubs(peers.Peers):
        blind = ["effnetlib"]

        def start(self, library, size, batch, gpu=False):
            raise ContestantError("no such library")

    with pytest.raises(ContestantError, match="^the GPU's part could not be rehearsed on CPU$"):
        list(peers.on_gpu(Stubs(print, tmp_path), 224, [256], starts=2, rounds=3))


def test_a_machine_without_a_gpu_overwrites_no_record_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.Peers, "blind", ["effnetlib", "timm"])
    record = tmp_path / "bench-gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "gpu", "--record", str(record)])
    with pytest.raises(
        SystemExit, match="the bench stopped: no GPU for effnetlib and timm, so there is nothing to record"
    ):
        bench.main()
    assert not record.exists()


def test_what_was_measured_outlasts_what_stops_the_rest(tmp_path, monkeypatch):
    def measure(*_):
        yield Measurement("done", "s", [1.0])
        raise ContestantError("nobody is here")

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench", "--record", str(tmp_path / "new/bench.json")])
    with pytest.raises(SystemExit, match="^the bench stopped: nobody is here$"):
        bench.main()
    record = json.loads((tmp_path / "new/bench.json").read_text())
    assert [each["name"] for each in record["measurements"]] == ["done"] and record["environment"]["jax"]


def test_libraries_are_called_with_what_the_command_line_says(tmp_path, monkeypatch):
    (tmp_path / "pretend.py").write_text(
        "import time\nfrom tests.bench import steps\n"
        "steps.LIBRARIES['keras'] = lambda *given: print(given) or (lambda number: time.sleep(0.01 * number))\n"
        "assert set(steps.LIBRARIES) == {'effnetlib', 'pytorch', 'timm', 'keras'}\nsteps.main()"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Contestant("keras", sys.executable, ["pretend", "keras", "--size", "32", "--batch", "2"]) as contestant:
        assert contestant.facts["step_seconds"] > 0.01 and contestant.facts["versions"]["jax"]
        assert 0 < contestant.round(3) < 200


def test_our_side_takes_the_steps_of_a_recipe():
    bench = Training(
        Recipe.preset("digits-64-rmsprop").replace(global_batch_size=8, batch_norm_batch_size=8), devices=1
    )
    bench.run(2)
    assert int(bench.state.step) == 2


def test_the_published_record_of_a_gpu_measures_every_line():
    record = json.loads((PUBLISHED.parent / "bench-gpu.json").read_text())
    ratios = [each for each in record["measurements"] if each["unit"] == "times"]
    assert [each["name"].split(",")[2] for each in ratios] == [" batch 256", " batch 1"]
    assert all(each["at_least"] == 1.0 for each in ratios)
    (rounds,) = {len(each["values"]) for each in record["measurements"]}
    (card,) = {each["note"] for each in record["measurements"]}
    assert rounds >= 7 and card.startswith("NVIDIA ") and f"one {card}" in (ROOT / "outputs/README.md").read_text()
    assert not record["environment"]["git_commit"].endswith("+changes")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="make bench has not been run")
def test_the_published_record_has_every_line():
    record = json.loads(PUBLISHED.read_text())
    found = {each["name"]: each for each in record["measurements"]}
    aims = {name: (each["at_least"], each["at_most"]) for name, each in found.items()}
    small, large = (
        f"B0, {where}, float32 on CPU: effnetlib over" for where in ("32 px, batch 128", "224 px, batch 16")
    )
    assert aims[f"{small} pytorch"] == (1.2, None) and aims[f"{small} keras"] == (5.0, None)
    assert aims[f"{large} pytorch"] == (1.0, None)
    assert aims["nano step of a whole run: papermill over plain"] == (None, 1.02)
    assert aims["import of effnetlib with its model, norm and optimizers"] == (None, 2.0)
    for start in ("B0, 224 px, batch 256, bfloat16 on GPU", "B0, 224 px, batch 1,024, bfloat16 on GPU", "nano on 8 devices",
                  "evaluation's share", "nano step: in the loop", "checkpoint of B0", "B0 until its first step is done"):  # fmt: skip
        assert any(name.startswith(start) for name in found), start
    assert all(each["values"] or each["note"] == peers.NO_GPU for each in found.values())
    assert {"pytorch", "keras", "timm"} <= record["environment"]["peers"].keys()
    assert not record["environment"]["git_commit"].endswith("+changes")
