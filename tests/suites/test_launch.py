"""The launchers, with processes on this machine in place of hosts and a stand-in for papermill; that the real one then trains
over several hosts is in test_invariance."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "notebooks/launch"
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
JOBSET = (LAUNCH / "jobset.yaml").read_text()
FILLED = {"IMAGE": "an/image", "BUCKET": "mine", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "HOSTS": "4"}

# PLAN has a word a host: the code to end with, "wait" for a signal, or "again": 75 at first, and 0 once there is something to
# resume. Host $WRITER is the one that writes: it counts how often it ran. None ends before GANG have begun.
PAPERMILL = """#!/bin/bash
trap 'kill $!; exit 75' TERM
run=$EFFNETLIB_OUTPUTS/run
times=$(cat "$run/times" 2>/dev/null)
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
# A folder under $MACHINES a host. Nothing of the launcher's environment comes through, as with ssh.
GCLOUD = """#!/bin/bash
echo "$*" >>"$MACHINES/calls"
for argument; do
    case $argument in --worker=*) workers=${argument#*=} ;; --command=*) command=${argument#*=} ;; esac
done
[[ ${workers:-} != all ]] || workers=$(ls -d "$MACHINES"/[0-9])
case "$*" in
    *" tpu-vm describe "*) echo "10.0.0.2;10.0.0.3;10.0.0.4" ;;
    *" tpu-vm scp "*) for worker in $workers; do cp "$6" "$worker"; done ;;
    *" tpu-vm ssh "*)
        for worker in $workers; do
            cd "$MACHINES/${worker##*/}"
            env -i PATH="$PATH" HOME="$PWD" STARTED="$STARTED" PLAN="$PLAN" WRITER="$WRITER" GANG="$GANG" sh -c "$command" || exit
        done ;;
esac
"""
COPY = '#!/bin/sh\nmkdir -p "$2" && cp -r "$1/." "$2"\n'  # as `gcloud storage rsync --recursive` does
PYTHON = '#!/bin/sh\necho "$*" >>"$HOME/installed"\n'


@pytest.fixture
def places(tmp_path):
    """A machine's environment with the stand-ins on its PATH; three hosts under `machines`."""
    commands = {"papermill": PAPERMILL, "gcloud": GCLOUD, "copy": COPY, "python3": PYTHON}
    for folder in ("commands", "started", "machines/0", "machines/1", "machines/2"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in commands.items():
        (tmp_path / "commands" / name).write_text(text)
        (tmp_path / "commands" / name).chmod(0o755)
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("EFFNETLIB_", "COPY"))}
    return mine | {
        "PATH": f"{tmp_path / 'commands'}:{os.environ['PATH']}",
        "STARTED": str(tmp_path / "started"),
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
    said = process.communicate(timeout=60)
    return process.returncode, "".join(said)


def wait_for(condition):
    deadline = time.monotonic() + 30
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


@pytest.mark.parametrize("variable", ["EFFNETLIB_OUTPUTS", "EFFNETLIB_DATA"])
def test_an_address_is_no_folder_of_a_host(places, tmp_path, variable):
    settings = {"EFFNETLIB_PROCESS": 0, "EFFNETLIB_OUTPUTS": tmp_path / "outputs", variable: "gs://bucket/x"}
    code, said = finish(start([LAUNCH / "host.sh"], places, **settings))
    assert code == 2 and f"host.sh: {variable} gs://bucket/x is an address: mount it" in said
    code, said = finish(gcloud(places, tmp_path, **{variable: "gs://bucket/x"}))
    assert code == 2 and f"gcloud.sh: {variable} gs://bucket/x is an address: mount it" in said
    assert not (tmp_path / "machines/calls").exists()


@pytest.mark.parametrize("given", ["mine", "./mine", "~/mine"])
def test_a_relative_folder_of_a_host_begins_where_it_is_started(places, tmp_path, given):
    settings = {"EFFNETLIB_PROCESS": 0, "EFFNETLIB_OUTPUTS": given, "GANG": 1, "HOME": tmp_path}
    process = subprocess.run([LAUNCH / "host.sh"], env=places | {k: str(v) for k, v in settings.items()}, cwd=tmp_path)
    assert process.returncode == 0 and (tmp_path / "mine/run/times").exists()


# host.sh where nothing is shared


@pytest.mark.parametrize("writer", [0, 2])
def test_hosts_that_share_no_folder_resume_from_the_copy(places, tmp_path, writer):
    """Whichever of them writes, which on a TPU the slice decides."""
    bucket = tmp_path / "bucket"
    settings = {"COPY_BACK": 1, "COPY_TO": bucket, "WRITER": writer, "FOLLOW": 1, "PLAN": "again again again"}
    for times, expected in enumerate((75, 0, 0)):
        code, said = finish(local(places, tmp_path, **settings))
        assert code == expected
        assert all(f"<3><{process}><{times}>" in said for process in range(3))
        assert (bucket / "run/times").read_text() == f"{times + 1}\n"
        assert {path.name for path in (bucket / "hosts").iterdir()} == {f"host{process}.log" for process in range(3)}
        for process in range(3):  # of this time, not of the one before
            assert f"<{process}><{times}>" in (bucket / f"hosts/host{process}.log").read_text()


def test_a_copy_that_cannot_be_had_is_no_new_run(places, tmp_path):
    code, said = finish(local(places, tmp_path, COPY_BACK=1, COPY_TO=tmp_path / "not mounted/run"))
    assert code == 74 and re.search(r"host \d could not copy from", said)
    assert not os.listdir(places["STARTED"])


def test_a_last_copy_that_fails_is_not_run_again(places, tmp_path):
    (tmp_path / "commands/copy").write_text("#!/bin/sh\ntest -e $STARTED/0 && exit 1 || exit 0\n")
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


# gcloud.sh


def gcloud(places, tmp_path, **changes):
    settings = {"COPY": "copy", "COPY_TO": tmp_path / "bucket", "LOGS": tmp_path / "logs"} | changes
    return start([LAUNCH / "gcloud.sh", "slice", "-p", "directory", "it's a b"], places, **settings)


def test_gcloud_installs_starts_and_collects(places, tmp_path):
    code, said = finish(gcloud(places, tmp_path))
    assert code == 0, said
    for host in range(3):
        assert "--editable ." in (tmp_path / f"machines/{host}/installed").read_text()
        log = f"<10.0.0.2><3><{host}><0><-p><directory><it's a b>"
        assert log in (tmp_path / f"logs/host{host}.log").read_text()
        assert log in (tmp_path / f"bucket/hosts/host{host}.log").read_text()
    assert (tmp_path / "bucket/run/times").read_text() == "1\n"
    assert "slice, 3 hosts: -p directory" in next((tmp_path / "bucket/launches").iterdir()).read_text()


def test_gcloud_takes_the_others_down_with_one(places, tmp_path):
    code, said = finish(gcloud(places, tmp_path, PLAN="wait 3 wait"))
    assert code == 3
    for host, its_code in enumerate((75, 3, 75)):
        assert f"host {host} ended with {its_code}, see" in said
    assert (tmp_path / "bucket/run/times").exists()


def test_gcloud_waits_for_what_its_hosts_save(places, tmp_path):
    process = gcloud(places, tmp_path, PLAN="wait wait wait", AGAIN=5)
    wait_for(lambda: all_started(places))
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 75
    assert (tmp_path / "bucket/run/times").read_text() == "1\n"


def test_hosts_do_not_outlive_their_ssh(places, tmp_path):
    process = gcloud(places, tmp_path, PLAN="wait wait wait")
    wait_for(lambda: all_started(places))
    process.kill()
    process.communicate(timeout=60)
    logs = [tmp_path / f"bucket/hosts/host{host}.log" for host in range(3)]
    wait_for(lambda: all(log.exists() for log in logs))


def test_gcloud_runs_again_what_was_saved(places, tmp_path):
    code, said = finish(gcloud(places, tmp_path, PLAN="again again again", WRITER=1, AGAIN=2))
    assert code == 0 and said.count("running it again") == 1
    assert (tmp_path / "bucket/run/times").read_text() == "2\n"
    for host in range(3):
        log = (tmp_path / f"logs/host{host}.log").read_text()
        assert f"<{host}><0>" in log and f"<{host}><1>" in log  # every host resumes from the same state
    again = finish(gcloud(places, tmp_path, PLAN="75 75 75", AGAIN=1, INSTALL=""))
    assert again[0] == 75 and again[1].count("running it again") == 1


def test_gcloud_needs_a_place_that_all_hosts_reach(places, tmp_path):
    code, said = finish(gcloud(places, tmp_path, COPY_TO=""))
    assert code == 2 and said.count("\n") == 1 and "give COPY_TO=gs://" in said
    code, said = finish(gcloud(places, tmp_path, COPY_TO="", EFFNETLIB_OUTPUTS=tmp_path / "shared"))
    assert code == 0 and (tmp_path / "shared/run/times").exists()


# skypilot.yaml; SkyPilot's own validation of it was run by hand, for it is too much to install here


def test_skypilot_starts_every_host(places, tmp_path):
    assert SKYPILOT["envs"]["BUCKET"] is None  # what makes SkyPilot ask for it
    assert SKYPILOT["file_mounts"] == {"/bucket": {"source": "${BUCKET}", "mode": "MOUNT"}}
    assert SKYPILOT["envs"]["COPY_TO"].startswith("/bucket/")
    assert SKYPILOT["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    settings = {name: value for name, value in SKYPILOT["envs"].items() if value} | {
        "SKYPILOT_NODE_IPS": "10.0.0.2\n10.0.0.3",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "COPY_TO": str(tmp_path / "run"),
        "EFFNETLIB_OUTPUTS": str(tmp_path / "outputs"),
        "LINGER_SECONDS": "0.1",
        "WRITER": "1",
        "PLAN": "again again",
        "GANG": "1",
    }
    run = ["bash", "-c", SKYPILOT["run"]]
    code, said = finish(start(run, places, **settings))
    assert code == 75 and "<10.0.0.2><2><1><0><-p><preset><b0-4096-rmsprop><-p>" in said
    code, said = finish(start(run, places, **settings))
    assert code == 0 and "<10.0.0.2><2><1><1>" in said
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
    assert mounts == {"bucket": "/bucket", "outputs": "/outputs"} and volumes == set(mounts)


def test_jobset_starts_every_host(places, tmp_path):
    settings = {
        variable["name"]: variable.get("value", "effnetlib-hosts-0-0.effnetlib")
        for variable in container(jobset())["env"]
    }
    assert settings["COPY_TO"].startswith("/bucket/")
    settings |= {"COPY_TO": str(tmp_path / "run"), "EFFNETLIB_OUTPUTS": str(tmp_path / "outputs")}
    settings |= {"JOB_COMPLETION_INDEX": "2", "WRITER": "2", "PLAN": "0 0 wait 0", "GANG": "1"}
    process = start(container(jobset())["command"], places, **settings)
    wait_for(lambda: os.listdir(places["STARTED"]))
    process.send_signal(signal.SIGTERM)  # as Kubernetes does, to process 1
    code, said = finish(process)
    assert code == 75 and "<effnetlib-hosts-0-0.effnetlib><4><2><0><-p><preset>" in said
    assert (tmp_path / "run/run/times").read_text() == "1\n"
