#!/usr/bin/env bash
# Installs this checkout on every host by ssh, starts host.sh there, and waits for all of them.
#
#   COPY_TO=gs://BUCKET/RUN ssh.sh TPU [-p NAME VALUE …]
#   COPY_TO=gs://BUCKET/RUN HOSTS="ADDRESS …" ssh.sh NAME [-p NAME VALUE …]
#
# TPU is a Cloud TPU VM of any size. gcloud brings your key to it and tells its hosts' addresses; project and zone are gcloud's
# own settings (gcloud config set, or CLOUDSDK_COMPUTE_ZONE). The key is gcloud's, ~/.ssh/google_compute_engine. HOSTS names any
# other machines, the one of process 0 first. They reach it under that address, without USER@, or else under
# EFFNETLIB_COORDINATOR. All else that ssh must know belongs into ~/.ssh/config.
#
# COPY_TO is where the results go and where a run is resumed from (see COPY_BACK in host.sh); hosts that all mount one folder
# have EFFNETLIB_OUTPUTS instead. DATA is the address of the data set, which each host copies. COPY, COPY_DELETE, COPY_FILE,
# COPY_SECONDS and EFFNETLIB_DATA are passed on as well. Each host's log grows in LOGS (outputs/hosts/TPU).
#
# The gang fails as one: when a host fails, or this script ends in whatever way, the others are stopped and save. A host's exit
# code is the result; 75 is "run me again", which this does itself at most AGAIN times (0), and 255 is ssh's. INSTALL is the
# command that installs what was copied to a host; empty, nothing is copied either.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() { # before anything is installed
    echo "ssh.sh: $*" >&2
    exit 2
}
slice=${1:-}
[[ $slice =~ ^[A-Za-z0-9] ]] || refuse "the first argument is the name of a TPU VM, or with HOSTS any name"
shift
[[ -n ${COPY_TO:-}${EFFNETLIB_OUTPUTS:-} ]] ||
    refuse "the hosts share no folder: give COPY_TO=gs://BUCKET/RUN, or as EFFNETLIB_OUTPUTS a folder that all mount"
[[ ${EFFNETLIB_OUTPUTS:-} != *:/* ]] ||
    refuse "EFFNETLIB_OUTPUTS $EFFNETLIB_OUTPUTS is an address: give it as COPY_TO, or mount it on every host and give the folder"
[[ ${EFFNETLIB_DATA:-} != *:/* ]] ||
    refuse "EFFNETLIB_DATA $EFFNETLIB_DATA is an address: give that of one data set as DATA, and each host copies it"
# The images' own Python is older than ours. With the lock, all hosts have the versions that the tests ran with.
default_install='tar -xzf effnetlib.tar.gz && cd effnetlib && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv &&
    python3 -m uv venv -q --allow-existing --python 3.11 .venv &&
    python3 -m uv pip install -q -p .venv -c requirements.lock "jax[tpu]" --editable .'
install=${INSTALL-$default_install}
logs=${LOGS:-$here/../../outputs/hosts/$slice}
mkdir -p "$logs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkfifo "$work/open"

installers=()
stop() {
    exec 3>&-
    ((!${#installers[@]})) || kill -- "${installers[@]/#/-}" 2>/dev/null || true
}
# shellcheck source=/dev/null
source "$here/gang.sh"

ssh=(ssh -oBatchMode=yes -oStrictHostKeyChecking=accept-new -oServerAliveInterval=30 -oConnectTimeout=10 -oConnectionAttempts=3)

# Where ssh finds each host, and where the hosts find process 0.
read -ra addresses <<<"${HOSTS:-}"
coordinator=${addresses[0]:-}
coordinator=${EFFNETLIB_COORDINATOR:-${coordinator#*@}}
if ((!${#addresses[@]})); then
    tpu_vm() { gcloud --quiet compute tpus tpu-vm "$@"; }
    tpu_vm ssh "$slice" --command=true </dev/null # for the key
    ssh+=("-oIdentityFile=~/.ssh/google_compute_engine")
    fields='networkEndpoints[].ipAddress,networkEndpoints[].accessConfig.externalIp'
    IFS=$'\t' read -r internal external <<<"$(tpu_vm describe "$slice" --format="value($fields)")" # in the workers' order
    [[ $external == *[^\;]* ]] || external=$internal # no host has one: this runs inside their network
    IFS=';' read -ra addresses <<<"$external"
    coordinator=${EFFNETLIB_COORDINATOR:-${internal%%;*}}
fi
set -m # a terminal's Ctrl-C reaches this script only, which stops the hosts and waits for what they save

# A host that has just begun does not answer yet, or does not know the key: ssh says 255.
install_on() {
    local attempt code
    for attempt in {1..6}; do
        code=0
        "${ssh[@]}" "${addresses[$1]}" "cat >effnetlib.tar.gz && $install" <"$work/effnetlib.tar.gz" >>"$logs/host$1.log" 2>&1 || code=$?
        ((code == 255 && attempt < 6)) || break
        sleep "${RETRY_SECONDS:-10}"
    done
    ((!code)) || echo "ssh.sh: installing on host $1, ${addresses[$1]}, ended with $code, see $logs/host$1.log" >&2
    return "$code"
}
if [[ -n $install ]]; then
    tar -czf "$work/effnetlib.tar.gz" -C "$here/../.." --exclude=__pycache__ --transform='s,^,effnetlib/,' \
        effnetlib notebooks pyproject.toml requirements.lock README.md LICENSE
    for process in "${!addresses[@]}"; do
        install_on "$process" &
        installers+=($!)
    done
    wait_for_gang
    installers=()
fi
if [[ -n ${COPY_TO:-} && -z ${EFFNETLIB_OUTPUTS:-} ]]; then # so it is there, and a host that cannot read it is no new run
    mkdir "$work/launches"
    echo "$slice, ${#addresses[@]} hosts: $*" >"$work/launches/$(date -u +%Y-%m-%dT%H%M%SZ).txt"
    ${COPY:-gcloud storage rsync --recursive} "$work/launches" "$COPY_TO/launches"
fi

# What the host runs. Its ssh's standard input is the pipe that this script holds open: its end is what stops the host.
command_for() {
    local settings=(FOLLOW=1 UNTIL_EOF=1 "EFFNETLIB_COORDINATOR=$coordinator" "EFFNETLIB_PROCESSES=${#addresses[@]}"
        "EFFNETLIB_PROCESS=$1")
    shift
    local name
    for name in COPY COPY_DELETE COPY_FILE COPY_SECONDS COPY_TO DATA EFFNETLIB_DATA EFFNETLIB_OUTPUTS; do
        [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
    done
    [[ -n ${EFFNETLIB_OUTPUTS:-} ]] || settings+=(COPY_BACK=1)
    # shellcheck disable=SC2016 # the host's own PATH
    printf 'cd effnetlib && PATH=$PWD/.venv/bin:$PATH exec env'
    printf ' %q' "${settings[@]}" notebooks/launch/host.sh "$@"
}

# An ssh for each host: one of gcloud's for all would wait for every host, so one that fails would leave the others hanging. And
# 128 of gcloud's would need more memory and connections than a laptop has.
host() {
    local process=$1 code=0
    "${ssh[@]}" "${addresses[$process]}" "$(command_for "$@")" >>"$logs/host$process.log" 2>&1 || code=$?
    if ((code)); then
        echo "ssh.sh: host $process ended with $code, see $logs/host$process.log" >&2
    fi
    return "$code"
}

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
    echo "ssh.sh: all is saved, running it again" >&2
done
