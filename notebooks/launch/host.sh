#!/usr/bin/env bash
# What every host of a slice runs: one papermill process, which joins the others.
#
#   host.sh [-p NAME VALUE …]        the parameters of notebooks/train.ipynb
#
# A relative path among them, or in EFFNETLIB_OUTPUTS or EFFNETLIB_DATA, begins where host.sh is started. None may be an address
# such as gs://BUCKET: mount the bucket.
#
# Which host it is, and where the first one is, comes from EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES and EFFNETLIB_PROCESS
# (see effnetlib/runs/hosts.py). What runs write goes to EFFNETLIB_OUTPUTS, a folder that all hosts see. Each host leaves its
# notebook and its log in hosts/ there. With COPY_TO, the first host runs `$COPY FOLDER $COPY_TO` every COPY_SECONDS and at
# the end; COPY is "gcloud storage rsync --recursive", or "cp -rT" where COPY_TO is a folder, such as a mounted bucket, unless
# you say otherwise. SIGTERM is passed on, and waits for the save.
#
# COPY_BACK=1 is for hosts that share no folder: each begins with a copy of COPY_TO, which must be there, in a folder of its
# own under EFFNETLIB_OUTPUTS, and so all resume from the same state. The one that writes copies all to COPY_TO, the others
# their notebook and log. COPY_TO is then the only truth: what was not copied there is not resumed from.
#
# FOLLOW=1 shows papermill's log too. UNTIL_EOF=1 takes the end of the standard input for a SIGTERM: so it ends with its ssh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
process=${EFFNETLIB_PROCESS:?which host this is, from 0}
for name in EFFNETLIB_OUTPUTS EFFNETLIB_DATA; do
    [[ ${!name:-} != *:/* ]] || {
        echo "host.sh: $name ${!name} is an address: mount it on every host, and give the folder" >&2
        exit 2
    }
done
export EFFNETLIB_OUTPUTS=${EFFNETLIB_OUTPUTS:-$here/../../outputs}
EFFNETLIB_OUTPUTS=${EFFNETLIB_OUTPUTS/#\~\//$HOME/}
[[ $EFFNETLIB_OUTPUTS == /* ]] || EFFNETLIB_OUTPUTS=$PWD/$EFFNETLIB_OUTPUTS
to=${COPY_TO:-}
if [[ $to == *://* ]]; then copy=${COPY:-gcloud storage rsync --recursive}; else copy=${COPY:-cp -rT}; fi

papermill=
asked=0 signalled=0
helpers=()
trap 'asked=1 signalled=1; [[ -z $papermill ]] || kill -TERM $papermill 2>/dev/null || true' TERM INT HUP USR1
trap 'kill "${helpers[@]}" 2>/dev/null || true' EXIT
if [[ -n ${UNTIL_EOF:-} ]]; then
    { while read -r; do :; done; kill -TERM $$; } <&0 >/dev/null 2>&1 &
    helpers+=($!)
fi

if [[ -n ${COPY_BACK:-} ]]; then
    : "${to:?what to begin with a copy of}"
    mkdir -p "$EFFNETLIB_OUTPUTS"
    EFFNETLIB_OUTPUTS=$EFFNETLIB_OUTPUTS/.host$process
    exec 9>"$EFFNETLIB_OUTPUTS.lock"
    until flock --nonblock 9; do # an earlier one, whose ssh was lost, still saves
        ((!asked)) || exit 75
        sleep 1
    done
    # Not their parents: those are there if the bucket is mounted. `cp` fails when another host makes hosts/ at the same moment.
    [[ $to == *://* ]] || mkdir "$to" "$to/hosts" 2>/dev/null || true
    rm -rf "$EFFNETLIB_OUTPUTS"
    mkdir "$EFFNETLIB_OUTPUTS"
    if ! $copy "$to" "$EFFNETLIB_OUTPUTS"; then
        echo "host.sh: host $process could not copy from $to" >&2
        exit 74
    fi
    rm -rf "$EFFNETLIB_OUTPUTS/hosts" # those of an earlier time
    touch "$EFFNETLIB_OUTPUTS/.begun"
    ((!asked)) || exit 75
fi
hosts=$EFFNETLIB_OUTPUTS/hosts
log=$hosts/host$process.log
mkdir -p "$hosts"

# Whether this host holds what is to be copied. The one that writes is JAX's process 0, which on a TPU the slice numbers: it
# need not be ours.
holds_all() {
    if [[ -n ${COPY_BACK:-} ]]; then
        [[ -n $(find "$EFFNETLIB_OUTPUTS" -name checkpoints -prune -o -name run.json -newer "$EFFNETLIB_OUTPUTS/.begun" -print) ]]
    else
        [[ $process == 0 ]]
    fi
}

copy_to() {
    if [[ -z $to ]]; then
        return
    elif holds_all; then
        $copy "$EFFNETLIB_OUTPUTS" "$to"
    elif [[ -n ${COPY_BACK:-} ]]; then
        $copy "$hosts" "$to/hosts"
    fi || {
        echo "host.sh: host $process could not copy to $to" >&2
        return 1
    }
}

: >"$log"
EFFNETLIB_PARENT=$$ papermill --engine effnetlib --kernel python3 --no-progress-bar \
    "$here/../train.ipynb" "$hosts/host$process.ipynb" "$@" >"$log" 2>&1 &
started=$!
while cmp -s /proc/$$/cmdline /proc/$started/cmdline; do :; done # still a copy of this script, a signal to which is lost
papermill=$started
((!asked)) || kill -TERM $papermill # it came in between

copy_now_and_then() {
    trap 'kill $! 2>/dev/null; exit' TERM
    while kill -0 $$ 2>/dev/null; do
        sleep "${COPY_SECONDS:-600}" &
        wait $!
        copy_to || true
    done
}
copy_now_and_then &
copier=$!
if [[ -n ${FOLLOW:-} ]]; then
    tail --pid=$papermill --sleep-interval=0.2 --lines=+1 --follow "$log" &
    follower=$!
fi

# A signal ends `wait` early, with a code of its own: wait again for papermill's.
while :; do
    signalled=0 code=0
    wait $papermill || code=$?
    ((signalled)) || break
done
[[ -z ${follower:-} ]] || wait "$follower" || true
while kill $copier 2>/dev/null; do sleep 0.1; done # until it is gone: a copy that is under way is older than the last one
if ((asked && code == 143)); then
    code=75 # it was not yet there to pass it on
fi
if ! copy_to && [[ -n ${COPY_BACK:-} ]] && holds_all; then
    code=74 # not "run me again", which would begin without what is only here
fi
if ((code)); then
    echo "host.sh: host $process ended with $code, see $log" >&2
fi
exit "$code"
