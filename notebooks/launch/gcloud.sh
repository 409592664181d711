#!/usr/bin/env bash
# Installs this checkout on every host of a TPU VM, starts host.sh there by ssh, and waits for all of them.
#
#   COPY_TO=gs://BUCKET/RUN gcloud.sh TPU [-p NAME VALUE …]
#
# Project and zone are gcloud's own settings (gcloud config set, or CLOUDSDK_COMPUTE_ZONE); run `ssh-add
# ~/.ssh/google_compute_engine` first. COPY_TO is where the results go and where a run is resumed from (see COPY_BACK in
# host.sh); hosts that all mount one folder have EFFNETLIB_OUTPUTS instead. COPY, COPY_SECONDS and EFFNETLIB_DATA are passed on
# as well. Each host's log grows in LOGS (outputs/hosts/TPU).
#
# The gang fails as one: when a host fails, or this script ends in whatever way, the others are stopped and save. A host's exit
# code is the result; 75 is "run me again", which this does itself at most AGAIN times (0). INSTALL is the command that installs
# what was copied to a host; empty, nothing is copied either.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tpu=${1:?the name of a TPU VM}
shift
if [[ -z ${COPY_TO:-}${EFFNETLIB_OUTPUTS:-} ]]; then
    echo "gcloud.sh: the hosts share no folder: give COPY_TO=gs://BUCKET/RUN, or as EFFNETLIB_OUTPUTS a folder that all mount" >&2
    exit 2
fi
for name in EFFNETLIB_OUTPUTS EFFNETLIB_DATA; do # before anything is installed
    [[ ${!name:-} != *:/* ]] || {
        echo "gcloud.sh: $name ${!name} is an address: mount it on every host, and give the folder (COPY_TO takes an address)" >&2
        exit 2
    }
done
# The images' own Python is older than ours. With the lock, all hosts have the versions that the tests ran with.
default_install='tar -xzf effnetlib.tar.gz && cd effnetlib && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv &&
    python3 -m uv venv -q --allow-existing --python 3.11 .venv &&
    python3 -m uv pip install -q -p .venv -c requirements.lock "jax[tpu]" --editable .'
install=${INSTALL-$default_install}
logs=${LOGS:-$here/../../outputs/hosts/$tpu}
mkdir -p "$logs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkfifo "$work/open"

tpu_vm() { gcloud --quiet compute tpus tpu-vm "$@"; }

stop() { exec 3>&-; }
# shellcheck source=/dev/null
source "$here/gang.sh"

addresses=$(tpu_vm describe "$tpu" --format='value(networkEndpoints[].ipAddress)') # in the order of the workers
read -ra addresses <<<"${addresses//;/ }"
if [[ -n $install ]]; then
    tar -czf "$work/effnetlib.tar.gz" -C "$here/../.." --exclude=__pycache__ --transform='s,^,effnetlib/,' \
        effnetlib notebooks pyproject.toml requirements.lock README.md LICENSE
    tpu_vm scp "$work/effnetlib.tar.gz" "$tpu:" --worker=all
    tpu_vm ssh "$tpu" --worker=all --command="$install"
fi
if [[ -n ${COPY_TO:-} && -z ${EFFNETLIB_OUTPUTS:-} ]]; then # so it is there, and a host that cannot read it is no new run
    mkdir "$work/launches"
    echo "$tpu, ${#addresses[@]} hosts: $*" >"$work/launches/$(date -u +%Y-%m-%dT%H%M%SZ).txt"
    ${COPY:-gcloud storage rsync --recursive} "$work/launches" "$COPY_TO/launches"
fi

# What the host runs. Its ssh's standard input is the pipe that this script holds open: its end is what stops the host.
command_for() {
    local settings=(FOLLOW=1 UNTIL_EOF=1 "EFFNETLIB_COORDINATOR=${addresses[0]}" "EFFNETLIB_PROCESSES=${#addresses[@]}"
        "EFFNETLIB_PROCESS=$1")
    shift
    local name
    for name in COPY COPY_SECONDS COPY_TO EFFNETLIB_DATA EFFNETLIB_OUTPUTS; do
        [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
    done
    [[ -n ${EFFNETLIB_OUTPUTS:-} ]] || settings+=(COPY_BACK=1)
    # shellcheck disable=SC2016 # the host's own PATH
    printf 'cd effnetlib && PATH=$PWD/.venv/bin:$PATH exec env'
    printf ' %q' "${settings[@]}" notebooks/launch/host.sh "$@"
}

# Not one ssh with --worker=all: that waits for every host, so one that fails would leave the others hanging.
host() {
    local process=$1 code=0
    tpu_vm ssh "$tpu" --worker="$process" --ssh-flag="-oBatchMode=yes -oServerAliveInterval=30" \
        --command="$(command_for "$@")" >>"$logs/host$process.log" 2>&1 || code=$?
    if ((code)); then
        echo "gcloud.sh: host $process ended with $code, see $logs/host$process.log" >&2
    fi
    return "$code"
}

set -m # a terminal's Ctrl-C reaches this script only, which stops the hosts and waits for what they save
# shellcheck disable=SC2154 # gang.sh has `stopped`
for ((again = ${AGAIN:-0}; ; again--)); do
    ((!stopped)) || exit 75
    exec 3<>"$work/open"
    for process in "${!addresses[@]}"; do
        host "$process" "$@" <"$work/open" 3>&- &
    done
    code=0
    wait_for_gang || code=$?
    stop
    ((code == 75 && again > 0 && !stopped)) || exit "$code"
    echo "gcloud.sh: all is saved, running it again" >&2
done
