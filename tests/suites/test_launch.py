"""The launchers, with processes on this machine in place of hosts and stand-ins for papermill, ssh and gcloud; that the real
papermill then trains over several hosts is in test_invariance."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from orbax.checkpoint._src.path.atomicity_types import TMP_DIR_SUFFIX
from PIL import Image

from effnetlib.data import load, shards
from effnetlib.data.prepare import check, prepare
from effnetlib.runs import checkpoints

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "notebooks/launch"
COPIES = LAUNCH / "copies.py"
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
JOBSET = (LAUNCH / "jobset.yaml").read_text()
FILLED = {"IMAGE": "an/image", "BUCKET": "mine", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "HOSTS": "4"}

# PLAN has a word a host: the code to end with, "wait" for a signal, or "again": 75 at first, and 0 once there is something to
# resume. Host $WRITER is the one that writes: it counts how often it ran. None ends before GANG have begun.
PAPERMILL = """#!/bin/bash
trap 'kill $!; exit 75' TERM
run=$EFFNETLIB_OUTPUTS/run
times=$(cat "$run/times" 2>/dev/null)
echo "data in $EFFNETLIB_DATA"
printf '<%s>' "$EFFNETLIB_COORDINATOR" "$EFFNETLIB_PROCESSES" "$EFFNETLIB_PROCESS" "${times:-0}" "${@:8}"
if [[ $EFFNETLIB_PROCESS == "${WRITER:-0}" ]]; then
    mkdir -p "$run"
    sleep 0.1
    echo $((times + 1)) | tee "$run/run.json" >"$run/times"
fi
touch "$STARTED/$EFFNETLIB_PROCESS"
until (($(ls "$STARTED" | wc -l) >= GANG)); do sleep 0.05; done
plan=($PLAN)
what=${plan[EFFNETLIB_PROCESS]}
[[ $what != again ]] || what=$((times ? 0 : 75))
if [[ $what == wait ]]; then sleep 600 & wait; fi
sleep 0.3
exit "$what"
"""
# A folder under $MACHINES is a host, 0 is the one at 34.0.0.2. Nothing of the launcher's environment comes through. Whoever
# comes first to the file `refuses` finds no connection.
SSH = """#!/bin/bash
echo "ssh $*" >>"$MACHINES/calls"
while [[ $1 == -* ]]; do shift; done
if rm "$MACHINES/refuses" 2>/dev/null; then exit 255; fi
cd "$MACHINES/$((${1##*.} - 2))" || exit 255
exec env -i PATH="$PATH" HOME="$PWD" STARTED="$STARTED" PLAN="$PLAN" WRITER="$WRITER" GANG="$GANG" GS="$GS" \\
    MACHINES="$MACHINES" sh -c "${*:2}"
"""
# gs:// is the folder $GS.
GCLOUD = """#!/bin/bash
echo "gcloud $*" >>"$MACHINES/calls"
flags=() places=()
for argument in "${@:3}"; do
    case $argument in
        --delete-unmatched-destination-objects) flags=(--delete) ;;
        --*) ;;
        *) places+=("${argument/gs:\\/\\//$GS/}") ;;
    esac
done
case "$*" in
    *" tpu-vm describe "*) printf '10.0.0.2;10.0.0.3;10.0.0.4\\t%s\\n' "${EXTERNAL-34.0.0.2;34.0.0.3;34.0.0.4}" ;;
    "storage cp "*) exec cp "${places[@]}" ;;
    "storage rsync "*)
        [[ -d ${places[0]} ]] || exit 1
        mkdir -p "${places[1]}"
        exec python COPIES folder "${places[@]}" "${flags[@]}" ;;
esac
""".replace("COPIES", str(COPIES))
PYTHON = '#!/bin/sh\necho "$*" >>"$HOME/installed"\n'


@pytest.fixture
def places(tmp_path):
    """A machine's environment with the stand-ins on its PATH; three hosts under `machines`."""
    commands = {"papermill": PAPERMILL, "gcloud": GCLOUD, "ssh": SSH, "python3": PYTHON}
    for folder in ("commands", "started", "home", "gs", "machines/0", "machines/1", "machines/2"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "commands/python").symlink_to(sys.executable)
    for name, text in commands.items():
        (tmp_path / "commands" / name).write_text(text)
        (tmp_path / "commands" / name).chmod(0o755)
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("EFFNETLIB_", "COPY", "DATA"))}
    return mine | {
        "PATH": f"{tmp_path / 'commands'}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "STARTED": str(tmp_path / "started"),
        "GS": str(tmp_path / "gs"),
        "MACHINES": str(tmp_path / "machines"),
        "PLAN": "0 0 0",
        "WRITER": "0",
        "GANG": "3",
    }


def start(command, environment, **changes):
    environment = environment | {name: str(value) for name, value in changes.items()}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Its code, and what it said."""
    said = process.communicate(timeout=120)
    return process.returncode, "".join(said)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def all_started(places):
    return len(os.listdir(places["STARTED"])) == 3


# The scripts themselves


def scripts():
    yield from ((path.name, path.read_text()) for path in LAUNCH.glob("*.sh"))
    yield from ((f"skypilot.yaml, {part}", "#!/bin/bash\n" + SKYPILOT[part]) for part in ("setup", "run"))
    yield "jobset.yaml", "#!/bin/bash\n" + container(jobset())["command"][2]


def test_the_scripts_are_ones():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, text in scripts():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stdout)
    assert all(os.access(script, os.X_OK) for script in LAUNCH.glob("*.sh"))


# local.sh


def local(places, tmp_path, **changes):
    return start([LAUNCH / "local.sh", "3"], places, EFFNETLIB_OUTPUTS=tmp_path / "outputs", **changes)


def test_a_host_that_fails_takes_the_others_down(places, tmp_path):
    code, said = finish(local(places, tmp_path, PLAN="wait 3 wait"))
    assert code == 3 and "host 1 ended with 3" in said and "host 0 ended with 75" in said


def test_a_gang_that_is_stopped_says_try_again(places, tmp_path):
    process = local(places, tmp_path, PLAN="wait wait wait")
    wait_for(lambda: all_started(places))
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75 and all(f"host {i} ended with 75" in said for i in range(3))


def test_a_failure_at_the_same_moment_as_a_success_counts(places, tmp_path):
    process = local(places, tmp_path, PLAN="0 0 3")
    wait_for(lambda: all_started(places))
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)  # it finds that all have ended
    process.send_signal(signal.SIGCONT)
    assert finish(process)[0] == 3


@pytest.mark.parametrize("variable, instead", [("EFFNETLIB_OUTPUTS", "COPY_TO"), ("EFFNETLIB_DATA", "DATA")])
def test_an_address_is_no_folder_of_a_host(places, tmp_path, variable, instead):
    settings = {"EFFNETLIB_PROCESS": 0, "EFFNETLIB_OUTPUTS": tmp_path / "outputs", variable: "gs://bucket/x"}
    for script, process in (
        ("host.sh", start([LAUNCH / "host.sh"], places, **settings)),
        ("ssh.sh", ssh(places, tmp_path, **{variable: "gs://bucket/x"})),
    ):
        code, said = finish(process)
        assert code == 2 and said.startswith(f"{script}: {variable} gs://bucket/x is an address: give ")
        assert f" as {instead}, " in said
    assert not (tmp_path / "machines/calls").exists()


@pytest.mark.parametrize("command", [["local.sh"], ["local.sh", "-p"], ["ssh.sh", "-p"], ["host.sh"]])
def test_wrong_usage_is_code_2_and_a_sentence(places, command):
    code, said = finish(start([LAUNCH / command[0], *command[1:]], places, COPY_TO="gs://bucket/run"))
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"{command[0]}: ")
    code, said = finish(start([LAUNCH / "host.sh"], places, EFFNETLIB_PROCESS=0, COPY_BACK=1))
    assert code == 2 and said.startswith("host.sh: COPY_BACK needs COPY_TO")


@pytest.mark.parametrize("given", ["mine", "./mine", "~/mine"])
def test_a_relative_folder_of_a_host_begins_where_it_is_started(places, tmp_path, given):
    settings = {"EFFNETLIB_PROCESS": 0, "EFFNETLIB_OUTPUTS": given, "GANG": 1, "HOME": tmp_path}
    process = subprocess.run([LAUNCH / "host.sh"], env=places | {k: str(v) for k, v in settings.items()}, cwd=tmp_path)
    assert process.returncode == 0 and (tmp_path / "mine/run/times").exists()


# host.sh where nothing is shared


def test_hosts_that_share_no_folder_resume_from_the_copy(places, tmp_path):
    """Whichever of them writes, which on a TPU the slice decides."""
    bucket = tmp_path / "bucket"
    settings = {"COPY_BACK": 1, "COPY_TO": bucket, "WRITER": 2, "FOLLOW": 1, "PLAN": "again again again"}
    for times, expected in enumerate((75, 0)):
        code, said = finish(local(places, tmp_path, **settings))
        assert code == expected
        assert all(f"<3><{process}><{times}>" in said for process in range(3))
        assert (bucket / "run/times").read_text() == f"{times + 1}\n"
        assert {path.name for path in (bucket / "hosts").iterdir()} == {f"host{process}.log" for process in range(3)}
        for process in range(3):  # of this time, not of the one before
            assert f"<{process}><{times}>" in (bucket / f"hosts/host{process}.log").read_text()


def test_a_copy_that_cannot_be_had_is_no_new_run(places, tmp_path):
    code, said = finish(local(places, tmp_path, COPY_BACK=1, COPY_TO=tmp_path / "not mounted/run"))
    assert code == 74 and re.search(r"host \d: could not copy from", said)
    assert not os.listdir(places["STARTED"])


def test_a_last_copy_that_fails_is_not_run_again(places, tmp_path):
    (tmp_path / "commands/copy").write_text("#!/bin/sh\ncase $1 in gs://*) ;; *) exit 1 ;; esac\n")
    (tmp_path / "commands/copy").chmod(0o755)
    settings = {"COPY_BACK": 1, "COPY_TO": "gs://bucket/run", "COPY": "copy", "PLAN": "75 75 75"}
    code, said = finish(local(places, tmp_path, **settings))
    assert "host 0 ended with 74" in said and "host 1 ended with 75" in said
    assert code in (74, 75)  # whichever came first


def test_a_host_waits_for_the_one_before_it(places, tmp_path):
    """As where an ssh was lost, and made again while what it had started still saves."""
    settings = {"EFFNETLIB_PROCESS": 0, "COPY_BACK": 1, "COPY_TO": tmp_path / "bucket", "PLAN": "wait", "GANG": 1}
    settings |= {"EFFNETLIB_OUTPUTS": tmp_path / "outputs"}
    first = start([LAUNCH / "host.sh"], places, **settings)
    wait_for(lambda: os.listdir(places["STARTED"]))
    second = start([LAUNCH / "host.sh"], places, **settings | {"PLAN": "0"})
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 75 and finish(second)[0] == 0
    assert (tmp_path / "bucket/run/times").read_text() == "2\n"


def test_copies_are_made_now_and_then(places, tmp_path):
    settings = {"COPY_TO": tmp_path / "bucket", "COPY_SECONDS": 0.1, "PLAN": "wait wait wait"}
    process = local(places, tmp_path, **settings)
    wait_for((tmp_path / "bucket/run/times").exists)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


# The data set


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder that `effnetlib data prepare` wrote: 4 photographs in 2 shards."""
    folder = tmp_path_factory.mktemp("prepared")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "photographs" / split / name).mkdir(parents=True)
            image = Image.fromarray(np.full((8, 8, 3), len(name + split), np.uint8))
            image.save(folder / "photographs" / split / name / "1.jpg")
    prepare(folder / "photographs", folder / "imagenet")
    return folder / "imagenet"


@pytest.fixture
def stored(prepared, tmp_path):
    """The same in a bucket. Its address is gs://bucket/imagenet."""
    shutil.copytree(prepared, tmp_path / "gs/bucket/imagenet")
    return tmp_path / "gs/bucket/imagenet"


def copies_of_data(places):
    calls = Path(places["MACHINES"], "calls").read_text()
    return len(re.findall("^gcloud storage rsync .*gs://bucket/imagenet /.*", calls, re.M))


def with_data(places, tmp_path, **changes):
    settings = {"DATA": "gs://bucket/imagenet", "EFFNETLIB_DATA": tmp_path / "data"} | changes
    return local(places, tmp_path, **settings)


def test_each_host_copies_the_data_set_once(places, tmp_path, stored):
    code, said = finish(with_data(places, tmp_path))
    assert code == 0, said
    assert "0.0 GiB of 0.0 GiB of imagenet are in" in said
    for host in range(3):
        assert f"host {host}: imagenet is in {tmp_path / 'data'}: 2 shards of the right size" in said
        assert f"data in {tmp_path / 'data'}\n" in (tmp_path / f"outputs/hosts/host{host}.log").read_text()
    assert check(tmp_path / "data/imagenet") == [] and len(load(str(tmp_path / "data/imagenet"), "train")) == 2
    assert copies_of_data(places) == 1  # these three share a machine

    assert finish(with_data(places, tmp_path))[0] == 0
    assert copies_of_data(places) == 1  # nothing was missing
    shard = next((tmp_path / "data/imagenet").glob("train*"))
    shard.write_bytes(b"half")
    assert finish(with_data(places, tmp_path))[0] == 0
    assert copies_of_data(places) == 2 and check(tmp_path / "data/imagenet") == []


def test_a_mounted_bucket_is_copied_too(places, tmp_path, stored):
    code, said = finish(with_data(places, tmp_path, DATA=f"{stored}/"))
    assert code == 0, said
    assert check(tmp_path / "data/imagenet") == [] and not (tmp_path / "machines/calls").exists()


def test_another_preparation_replaces_the_one_before_it(places, tmp_path, stored):
    assert finish(with_data(places, tmp_path))[0] == 0
    text = (stored / "manifest.json").read_text()
    shard = next(stored.glob("train*"))
    shard.write_bytes(shard.read_bytes()[::-1])  # of the same size
    about = next(each for each in json.loads(text)["splits"]["train"]["shards"] if each["file"] == shard.name)
    (stored / "manifest.json").write_text(text.replace(about["sha256"], "0" * 64))
    assert finish(with_data(places, tmp_path))[0] == 0
    assert (tmp_path / "data/imagenet" / shard.name).read_bytes() == shard.read_bytes()


def test_data_that_fit_nowhere_are_refused(places, tmp_path, stored):
    manifest = stored / "manifest.json"
    manifest.write_text(re.sub(r'"bytes": \d+', '"bytes": 4611686018427387904', manifest.read_text()))
    for changes in ({}, {"EFFNETLIB_DATA": ""}):
        code, said = finish(with_data(places, tmp_path, **changes))
        assert code == 74 and "imagenet needs 8,589,934,592.0 GiB, and there is room for" in said
    assert (
        "GiB in /dev/shm/effnetlib and " in said and f"{tmp_path / 'home'}/.cache/effnetlib: make room, or name" in said
    )
    assert not os.listdir(places["STARTED"]) and not (tmp_path / "data").exists()


def test_a_shard_of_the_wrong_size_is_an_error(places, tmp_path, stored):
    shard = next(stored.glob("val*") if any(stored.glob("val*")) else stored.glob("eval*"))
    size = shard.stat().st_size
    shard.write_bytes(b"half")
    code, said = finish(with_data(places, tmp_path))
    assert code == 74 and not os.listdir(places["STARTED"])
    assert (
        f"gs://bucket/imagenet/{shard.name} has 4 bytes, and manifest.json says {size:,}: bring it there again" in said
    )
    shard.unlink()
    assert f"gs://bucket/imagenet/{shard.name} is missing, and" in finish(with_data(places, tmp_path))[1]


def test_a_folder_that_was_not_copied_is_left_alone(places, tmp_path, stored):
    mine = tmp_path / "data/imagenet/train-00000-of-00001.array_record"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, said = finish(with_data(places, tmp_path))
    assert code == 74 and f"{mine.parent} was not copied by this: name another folder as EFFNETLIB_DATA" in said
    assert mine.read_text() == "mine"
    code, said = finish(with_data(places, tmp_path, DATA=stored, EFFNETLIB_DATA=stored.parent))
    assert code == 74 and "was not copied by this" in said and check(stored) == []


@pytest.mark.parametrize("what", ["DATA", "COPY_BACK"])
def test_a_stop_while_copying_ends_at_once(places, tmp_path, stored, what):
    tool = tmp_path / "commands/slowly"
    tool.write_text("#!/bin/sh\ntrap '' TERM\nsleep 300 & echo $! >>$MACHINES/sleeps\nwait\n")
    tool.chmod(0o755)
    settings = {"COPY": "slowly"} | (
        {} if what == "DATA" else {"DATA": "", "COPY_BACK": 1, "COPY_TO": "gs://bucket/run"}
    )
    process = with_data(places, tmp_path, **settings)
    sleeps = tmp_path / "machines/sleeps"
    wait_for(lambda: sleeps.exists() and sleeps.read_text())
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75 and not os.listdir(places["STARTED"]), said
    for pid in sleeps.read_text().split():
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text())


@pytest.fixture
def copies(monkeypatch):
    spec = importlib.util.spec_from_file_location("copies", COPIES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("EFFNETLIB_PROCESS", "0")
    return module


@pytest.mark.parametrize("text", ["", "[]", '{"splits": {"train": {}}}', '{"splits": {"train": {"whole": false}}}'])
def test_data_without_a_usable_manifest_are_an_error(copies, tmp_path, text):
    with pytest.raises(
        copies.Failed, match="has no manifest.json that can be used .it could not be copied.: wanted is"
    ):
        copies.read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(copies.Failed, match="has no manifest.json that can be used .*: wanted is a folder that"):
        copies.read_manifest(str(tmp_path))


def test_data_go_into_memory_if_they_fit(copies, monkeypatch, tmp_path):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    wanted = {"a": {"file": "a", "bytes": 60}, "b": {"file": "b", "bytes": 40}}
    rooms = {memory: 100, disk: 1000}
    monkeypatch.setattr(copies, "room", rooms.get)
    assert copies.choose([memory, disk], "x", wanted) == memory
    rooms[memory] = 99
    assert copies.choose([memory, disk], "x", wanted) == disk
    rooms[disk] = 99
    with pytest.raises(copies.Failed, match="x needs 0.0 GiB, and there is room for .* in .*memory and .* in .*disk: "):
        copies.choose([memory, disk], "x", wanted)
    (disk / "x").mkdir(parents=True)  # the one that has most of it already
    (disk / "x/a").write_bytes(bytes(60))
    (disk / "x/manifest.json").write_text(json.dumps({"splits": {"train": {"shards": list(wanted.values())}}}))
    rooms[memory] = 100
    assert copies.choose([memory, disk], "x", wanted) == disk


def test_room_is_spared_for_the_run(copies, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**18))
    assert copies.room(tmp_path / "not there/yet") == 9 * 10**17
    available = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    assert copies.room(copies.MEMORY / "effnetlib") < 0.8 * available
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    assert copies.room(copies.MEMORY / "effnetlib") == 900


def test_a_copy_tells_how_far_it_is(copies, monkeypatch, tmp_path):
    (tmp_path / "imagenet").mkdir()
    monkeypatch.setenv("COPY", "sh -c 'truncate -s 1G $2/a; until test -e $2/../seen; do sleep 0.05; done' -")
    monkeypatch.setattr(copies, "PROGRESS_SECONDS", 0.05)
    said = []

    def say(text):
        said.append(text)
        if text.startswith("1.0 GiB of 4.0 GiB"):
            (tmp_path / "seen").touch()

    monkeypatch.setattr(copies, "say", say)
    copies.copy_with_progress("gs://bucket/imagenet", tmp_path / "imagenet", 2**32)
    assert said[-1] == f"1.0 GiB of 4.0 GiB of imagenet are in {tmp_path}"
    monkeypatch.setenv("COPY", "false")
    with pytest.raises(copies.Failed, match="gs://bucket/imagenet could not be copied to .*/imagenet: run it again"):
        copies.copy_with_progress("gs://bucket/imagenet", tmp_path / "imagenet", 2**32)


# What runs write, and what the bucket forgets


def test_the_words_are_those_of_the_library(copies):
    assert (copies.MANIFEST, copies.CHECKPOINTS) == (shards.MANIFEST, checkpoints.FOLDER)
    assert copies.UNFINISHED in TMP_DIR_SUFFIX


def put(folder, *steps):
    for step in steps:
        (folder / str(step) / "state").mkdir(parents=True, exist_ok=True)
        (folder / str(step) / "state/array").write_text(f"of {step}")


def names(folder):
    return {path.name for path in folder.iterdir()}


class Host:
    """A host that has begun with a copy of its bucket, and the bucket."""

    def __init__(self, places, tmp_path):
        self.outputs, self.bucket = tmp_path / "outputs/.host0", tmp_path / "gs/bucket"
        self.outputs.mkdir(parents=True)
        settings = {"EFFNETLIB_PROCESS": "0", "EFFNETLIB_OUTPUTS": str(self.outputs), "COPY_BACK": "1"}
        self.environment = places | settings | {"COPY_TO": str(self.bucket)}
        self.run, self.there = self.outputs / "a/run/checkpoints", self.bucket / "a/run/checkpoints"

    def copy(self, what, **changes):
        command = [sys.executable, COPIES, what]
        done = subprocess.run(command, env=self.environment | changes, capture_output=True, text=True)
        return done.returncode, done.stderr

    def train(self, *kept):
        """As the run does: the new checkpoints are whole before the old ones go. And it has written its record."""
        put(self.run, *kept)
        for old in names(self.run) - {str(step) for step in kept}:
            shutil.rmtree(self.run / old)
        (self.run.parent / "run.json").write_text(f"at {kept[-1]}")


@pytest.fixture
def host(places, tmp_path):
    put(tmp_path / "gs/bucket/a/run/checkpoints", 100, 200)
    put(tmp_path / "gs/bucket/another/run/checkpoints", 1)
    (tmp_path / "gs/bucket/a/run/run.json").write_text("at 200")
    (tmp_path / "gs/bucket/another/run/run.json").write_text("at 1")
    host = Host(places, tmp_path)
    assert host.copy("back")[0] == 0 and names(host.run) == {"100", "200"}
    return host


@pytest.mark.parametrize("kind", ["gs://", "mounted"])
def test_the_bucket_forgets_the_checkpoints_that_the_run_deleted(host, kind):
    put(host.outputs / "another/run/checkpoints", 1)
    put(host.bucket / "another/run/checkpoints", 2)  # of another slice, meanwhile
    (host.bucket / "another/run/run.json").write_text("at 2")
    host.train(200, 300)
    put(host.run, "400.orbax-checkpoint-tmp")
    to = "gs://bucket" if kind == "gs://" else str(host.bucket)
    assert host.copy("out", COPY_TO=to) == (0, "")
    assert names(host.there) == {"200", "300"} and (host.there / "300/state/array").read_text() == "of 300"
    assert (host.there.parent / "run.json").read_text() == "at 300"
    assert names(host.bucket / "another/run/checkpoints") == {"1", "2"}  # this host has not written there
    assert (host.bucket / "another/run/run.json").read_text() == "at 2"
    assert not (host.outputs / ".snapshot").exists() and not (host.bucket / ".begun").exists()


def test_nothing_is_deleted_before_the_new_checkpoints_are_there(host, tmp_path):
    host.train(200, 300)
    tool = tmp_path / "commands/fails"
    tool.write_text("#!/bin/sh\necho $* >>$MACHINES/fails\nexit 1\n")
    tool.chmod(0o755)
    code, said = host.copy("out", COPY="fails", COPY_DELETE="--delete")
    assert code == 74 and "host 0: could not copy to" in said
    assert "--delete" not in (tmp_path / "machines/fails").read_text() and names(host.there) == {"100", "200"}


def test_what_a_crash_left_is_deleted_by_the_next_run(host):
    put(host.there, 300)  # copied, and then the machine was gone
    shutil.rmtree(host.outputs)
    host.outputs.mkdir()
    assert host.copy("back")[0] == 0 and names(host.run) == {"100", "200", "300"}
    host.train(300, 400)
    assert host.copy("out")[0] == 0 and names(host.there) == {"300", "400"}


def test_a_run_without_a_checkpoint_deletes_none(host):
    host.train(300)
    shutil.rmtree(host.run)
    host.run.mkdir()
    put(host.run, "damaged-200-17")
    assert host.copy("out")[0] == 0 and names(host.there) == {"100", "200", "damaged-200-17"}


def test_a_tool_of_your_own_deletes_nothing_unless_it_has_a_flag(host, tmp_path):
    host.train(200, 300)
    tool = f"{sys.executable} {COPIES} folder"
    assert host.copy("out", COPY=tool)[0] == 0 and names(host.there) == {"100", "200", "300"}
    assert host.copy("out", COPY=tool, COPY_DELETE="--delete")[0] == 0
    assert names(host.there) == {"200", "300"}


def test_a_backup_forgets_nothing(host):
    host.train(200, 300)
    assert host.copy("out", COPY_BACK="")[0] == 0 and names(host.there) == {"100", "200", "300"}
    host.train(300, 400)
    assert host.copy("out", COPY_BACK="", EFFNETLIB_PROCESS="1")[0] == 0 and "400" not in names(host.there)


def test_hosts_that_do_not_write_copy_their_logs_only(host):
    put(host.run, 300)
    (host.outputs / "hosts").mkdir()
    (host.outputs / "hosts/host1.log").write_text("mine")
    assert host.copy("out", EFFNETLIB_PROCESS="1")[0] == 0
    assert names(host.there) == {"100", "200"} and (host.bucket / "hosts/host1.log").read_text() == "mine"


def test_a_copy_of_a_folder_copies_what_changed_and_leaves_no_half_file(copies, monkeypatch, tmp_path):
    source, dest = tmp_path / "source", tmp_path / "dest"
    put(source, 1, 2)
    copies.folder(source, dest, delete=False)
    first = (dest / "1/state/array").stat().st_ino
    (source / "2/state/array").write_text("of 9")  # of the same size
    copies.folder(source, dest, delete=False)
    assert (dest / "1/state/array").stat().st_ino == first and (dest / "2/state/array").read_text() == "of 9"

    def half(_, path):
        Path(path).write_text("of")
        raise OSError("killed")

    (source / "2/state/array").write_text("of 10")
    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OSError, match="killed"):
        copies.folder(source, dest, delete=True)
    assert (dest / "2/state/array").read_text() == "of 9"
    monkeypatch.undo()
    shutil.rmtree(source / "1")
    copies.folder(source, dest, delete=True)
    assert names(dest) == {"2"} and names(dest / "2/state") == {"array"}
    with pytest.raises(FileNotFoundError):
        copies.folder(source, tmp_path / "not mounted/run", delete=False)
    with pytest.raises(FileNotFoundError):
        copies.folder(tmp_path / "not mounted", dest, delete=True)
    assert (dest / "2/state/array").read_text() == "of 10"


# ssh.sh


def ssh(places, tmp_path, **changes):
    settings = {"COPY_TO": "gs://bucket/run", "LOGS": tmp_path / "logs"} | changes
    return start([LAUNCH / "ssh.sh", "slice", "-p", "directory", "it's a b"], places, **settings)


def test_ssh_installs_starts_and_collects(places, tmp_path, stored):
    code, said = finish(ssh(places, tmp_path, DATA="gs://bucket/imagenet", EFFNETLIB_DATA="data"))
    assert code == 0, said
    assert copies_of_data(places) == 3  # each to its own folder
    for host in range(3):
        assert check(tmp_path / f"machines/{host}/effnetlib/data/imagenet") == []
        assert "--editable ." in (tmp_path / f"machines/{host}/installed").read_text()
        log = f"<10.0.0.2><3><{host}><0><-p><directory><it's a b>"
        assert log in (tmp_path / f"logs/host{host}.log").read_text()
        assert log in (tmp_path / f"gs/bucket/run/hosts/host{host}.log").read_text()
    assert (tmp_path / "gs/bucket/run/run/times").read_text() == "1\n"
    assert "slice, 3 hosts: -p directory" in next((tmp_path / "gs/bucket/run/launches").iterdir()).read_text()


def test_ssh_takes_any_hosts_by_their_addresses(places, tmp_path):
    code, said = finish(ssh(places, tmp_path, HOSTS="me@10.1.0.3 me@10.1.0.2", PLAN="0 0", GANG=2))
    assert code == 0, said
    assert "<10.1.0.3><2><0><0>" in (tmp_path / "logs/host0.log").read_text()
    assert "<10.1.0.3><2><1><0>" in (tmp_path / "logs/host1.log").read_text()
    calls = (tmp_path / "machines/calls").read_text()
    assert "gcloud --quiet compute" not in calls and " me@10.1.0.2 cd effnetlib" in calls
    given = {"HOSTS": "10.1.0.3 10.1.0.2", "EFFNETLIB_COORDINATOR": "inside:1", "INSTALL": ""}
    assert finish(ssh(places, tmp_path, PLAN="0 0", GANG=2, **given))[0] == 0
    assert "<inside:1><2><1><1>" in (tmp_path / "logs/host1.log").read_text()


def test_ssh_asks_again_where_a_host_does_not_answer_yet(places, tmp_path):
    """These have no external address."""
    (tmp_path / "machines/refuses").touch()
    code, said = finish(ssh(places, tmp_path, RETRY_SECONDS=0.1, EXTERNAL=";;"))
    assert code == 0, said
    calls = (tmp_path / "machines/calls").read_text()
    assert calls.count("tar -xzf") == 4 and " 10.0.0.4 cd effnetlib" in calls  # three hosts, one of them twice


def test_ssh_starts_nothing_where_it_cannot_install(places, tmp_path):
    code, said = finish(ssh(places, tmp_path, INSTALL="case $PWD in */1) exit 9 ;; *) sleep 300 ;; esac"))
    assert code == 9 and "installing on host 1, 34.0.0.3, ended with 9, see" in said
    assert not os.listdir(places["STARTED"])


# Versions


def test_all_hosts_have_the_versions_of_the_lock_on_a_python_that_is_tested(tmp_path):
    """The images' Python may be 3.10, so that uv brings ours; only the Dockerfile begins with it."""
    readme, dockerfile = (LAUNCH / "README.md").read_text(), (LAUNCH / "Dockerfile").read_text()
    for text in ((LAUNCH / "ssh.sh").read_text(), SKYPILOT["setup"], readme):
        assert "--python 3.11 " in text and re.search(r"uv pip install .*-c requirements\.lock .*--editable \.", text)
    assert "FROM python:3.11-slim\n" in dockerfile and "-c requirements.lock" in dockerfile
    lock = (ROOT / "requirements.lock").read_text()
    for name in ("jax", "jaxlib", "libtpu", "flax"):
        assert re.search(rf"^{name}==", lock, re.M)


def test_the_image_holds_what_the_hosts_are_sent():
    sent = re.search(r"\n +(effnetlib notebooks .*)\n", (LAUNCH / "ssh.sh").read_text())[1].split()
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    assert {line[0] for line in words} == {"FROM", "ARG", "WORKDIR", "COPY", "RUN"}
    assert {name for line in words if line[0] == "COPY" for name in line[1:-1]} == set(sent)
    assert all((ROOT / name).exists() for name in sent)
    assert ["WORKDIR", container(jobset())["workingDir"]] in words


def test_ssh_takes_the_others_down_with_one(places, tmp_path):
    code, said = finish(ssh(places, tmp_path, PLAN="wait 3 wait"))
    assert code == 3
    for host, its_code in enumerate((75, 3, 75)):
        assert f"host {host} ended with {its_code}, see" in said
    assert (tmp_path / "gs/bucket/run/run/times").exists()


def test_ssh_waits_for_what_its_hosts_save(places, tmp_path):
    process = ssh(places, tmp_path, PLAN="wait wait wait", AGAIN=5)
    wait_for(lambda: all_started(places))
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 75
    assert (tmp_path / "gs/bucket/run/run/times").read_text() == "1\n"


def test_hosts_do_not_outlive_their_ssh(places, tmp_path):
    process = ssh(places, tmp_path, PLAN="wait wait wait")
    wait_for(lambda: all_started(places))
    process.kill()
    process.communicate(timeout=120)
    logs = [tmp_path / f"gs/bucket/run/hosts/host{host}.log" for host in range(3)]
    wait_for(lambda: all(log.exists() for log in logs))


def test_ssh_runs_again_what_was_saved(places, tmp_path):
    code, said = finish(ssh(places, tmp_path, PLAN="again again again", WRITER=1, AGAIN=2))
    assert code == 0 and said.count("running it again") == 1
    assert (tmp_path / "gs/bucket/run/run/times").read_text() == "2\n"
    for host in range(3):
        log = (tmp_path / f"logs/host{host}.log").read_text()
        assert f"<{host}><0>" in log and f"<{host}><1>" in log  # every host resumes from the same state
    again = finish(ssh(places, tmp_path, PLAN="75 75 75", AGAIN=1, INSTALL=""))
    assert again[0] == 75 and again[1].count("running it again") == 1


def test_ssh_needs_a_place_that_all_hosts_reach(places, tmp_path):
    code, said = finish(ssh(places, tmp_path, COPY_TO=""))
    assert code == 2 and said.count("\n") == 1 and "give COPY_TO=gs://" in said
    code, said = finish(ssh(places, tmp_path, COPY_TO="", EFFNETLIB_OUTPUTS=tmp_path / "shared"))
    assert code == 0 and (tmp_path / "shared/run/times").exists()
    calls = (tmp_path / "machines/calls").read_text().splitlines()
    asked = [" ".join(call.split()[:7]) for call in calls if call.startswith("gcloud")]
    assert asked == [f"gcloud --quiet compute tpus tpu-vm {what} slice" for what in ("ssh", "describe")]
    for host in range(3):  # one ssh installs, and one runs
        to = [call for call in calls if call.startswith("ssh") and f" 34.0.0.{host + 2} " in call]
        assert len(to) == 2 and all("-oBatchMode=yes" in call for call in to) and "tar -xzf" in to[0]


# skypilot.yaml; SkyPilot's own validation of it was run by hand, for it is too much to install here


def test_skypilot_starts_every_host(places, tmp_path, stored):
    assert SKYPILOT["envs"]["BUCKET"] is None  # what makes SkyPilot ask for it
    assert SKYPILOT["file_mounts"] == {"/bucket": {"source": "${BUCKET}", "mode": "MOUNT"}}
    assert SKYPILOT["envs"]["COPY_TO"].startswith("/bucket/") and SKYPILOT["envs"]["DATA"] == "/bucket/imagenet"
    assert SKYPILOT["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    settings = {name: value for name, value in SKYPILOT["envs"].items() if value} | {
        "SKYPILOT_NODE_IPS": "10.0.0.2\n10.0.0.3",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "COPY_TO": str(tmp_path / "run"),
        "EFFNETLIB_OUTPUTS": str(tmp_path / "outputs"),
        "DATA": str(stored),
        "EFFNETLIB_DATA": str(tmp_path / "data"),
        "LINGER_SECONDS": "0.1",
        "WRITER": "1",
        "PLAN": "again again",
        "GANG": "1",
    }
    run = ["bash", "-c", SKYPILOT["run"]]
    code, said = finish(start(run, places, **settings))
    assert code == 75 and "<10.0.0.2><2><1><0><-p><preset><b0-4096-rmsprop><-p>" in said
    code, said = finish(start(run, places, **settings))
    assert code == 0 and "<10.0.0.2><2><1><1>" in said and f"data in {tmp_path / 'data'}\n" in said
    assert (tmp_path / "run/hosts/host1.log").exists()


# jobset.yaml


def jobset(**changes):
    text = JOBSET
    for name, value in (FILLED | changes).items():
        text = text.replace(name, value)
    return yaml.safe_load(text)


def job(filled):
    return filled["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(filled):
    return job(filled)["template"]["spec"]["containers"][0]


def test_jobset_is_one_once_it_is_filled():
    filled = jobset()
    assert JobsetV1alpha2JobSet.from_dict(filled).to_dict() == filled  # an unknown field would be dropped
    assert not re.search(
        r"\b[A-Z]{5,}\b", re.sub(r"#.*|EFFNETLIB_\w+|JOB_COMPLETION_INDEX|FOLLOW", "", yaml.safe_dump(filled))
    )
    with pytest.raises(ValueError, match="parallelism"):  # so kubectl refuses it, too
        JobsetV1alpha2JobSet.from_dict(yaml.safe_load(JOBSET))


def test_jobset_is_a_gang_that_runs_again_on_75_only():
    filled = jobset(HOSTS="8")
    policy, spec = filled["spec"]["failurePolicy"], job(filled)
    assert [(rule["action"], rule.get("onJobFailureReasons")) for rule in policy["rules"]] == [
        ("RestartJobSet", ["PodFailurePolicy"]),
        ("FailJobSet", None),
    ]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    codes = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes == {"containerName": container(filled)["name"], "operator": "In", "values": [75]}
    assert spec["completions"] == spec["parallelism"] == 8
    assert {"name": "EFFNETLIB_PROCESSES", "value": "8"} in container(filled)["env"]
    assert filled["spec"]["coordinator"]["replicatedJob"] == filled["spec"]["replicatedJobs"][0]["name"]
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(filled)["volumeMounts"]}
    assert mounts == {"bucket": "/bucket", "outputs": "/outputs", "memory": "/dev/shm"} and volumes == set(mounts)


def test_jobset_starts_every_host(places, tmp_path, stored):
    settings = {
        variable["name"]: variable.get("value", "effnetlib-hosts-0-0.effnetlib")
        for variable in container(jobset())["env"]
    }
    assert settings["COPY_TO"].startswith("/bucket/") and settings["DATA"] == "/bucket/imagenet"
    settings |= {"DATA": str(stored), "EFFNETLIB_DATA": str(tmp_path / "data")}
    settings |= {"COPY_TO": str(tmp_path / "run"), "EFFNETLIB_OUTPUTS": str(tmp_path / "outputs")}
    settings |= {"JOB_COMPLETION_INDEX": "2", "WRITER": "2", "PLAN": "0 0 wait 0", "GANG": "1"}
    process = start(container(jobset())["command"], places, **settings)
    wait_for(lambda: os.listdir(places["STARTED"]))
    process.send_signal(signal.SIGTERM)  # as Kubernetes does, to process 1
    code, said = finish(process)
    assert f"data in {tmp_path / 'data'}\n" in said
    assert code == 75 and "<effnetlib-hosts-0-0.effnetlib><4><2><0><-p><preset>" in said
    assert (tmp_path / "run/run/times").read_text() == "1\n"
