#!/usr/bin/env bash
# What every host of a slice runs: one papermill process, which joins the others.
#
#   host.sh [-p NAME VALUE …]        the parameters of notebooks/train.ipynb
#
# A relative path among them, or in a variable below, begins where host.sh is started.
#
# Which host it is, and where the first one is, comes from EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES and EFFNETLIB_PROCESS
# (see effnetlib/runs/hosts.py). What runs write goes to EFFNETLIB_OUTPUTS, a folder that all hosts see. Each host leaves its
# notebook and its log in hosts/ there. SIGTERM is passed on, and waits for the save.
#
# DATA is a folder that `effnetlib data prepare` wrote, or its address, such as gs://BUCKET/imagenet. Each host first copies it to
# memory or disk: to EFFNETLIB_DATA if that is given, else to /dev/shm/effnetlib if it fits, else to ~/.cache/effnetlib. Its last
# part is the name of the data set there. Without DATA, EFFNETLIB_DATA is where the data sets are.
#
# COPY_TO is an address or a folder. The first host copies EFFNETLIB_OUTPUTS there every COPY_SECONDS (600) and at the end.
# copies.py has the tools that copy, which COPY, COPY_DELETE and COPY_FILE replace.
#
# COPY_BACK=1 is for hosts that share no folder: each begins with a copy of COPY_TO, which must be there, in a folder of its
# own under EFFNETLIB_OUTPUTS, and so all resume from the same state. The one that writes copies its runs to COPY_TO, the others
# their notebook and log. COPY_TO is then the only truth: what was not copied there is not resumed from. It holds the
# checkpoints that the run keeps: the last two and the best.
#
# FOLLOW=1 shows papermill's log too. UNTIL_EOF=1 takes the end of the standard input for a SIGTERM: so it ends with its ssh.
# It ends with papermill's code; 75 is "run me again", 74 is a copy that failed, 2 is a wrong setting.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() {
    echo "host.sh: $*" >&2
    exit 2
}
process=${EFFNETLIB_PROCESS:-}
[[ $process =~ ^[0-9]+$ ]] || refuse "EFFNETLIB_PROCESS says which host this is, from 0"
[[ -z ${COPY_BACK:-} || -n ${COPY_TO:-} ]] || refuse "COPY_BACK needs COPY_TO, which each host begins with a copy of"
[[ ${EFFNETLIB_OUTPUTS:-} != *:/* ]] ||
    refuse "EFFNETLIB_OUTPUTS $EFFNETLIB_OUTPUTS is an address: give it as COPY_TO, or mount it and give the folder"
[[ ${EFFNETLIB_DATA:-} != *:/* ]] ||
    refuse "EFFNETLIB_DATA $EFFNETLIB_DATA is an address: give that of one data set as DATA, and each host copies it"
export EFFNETLIB_OUTPUTS=${EFFNETLIB_OUTPUTS:-$here/../../outputs}
EFFNETLIB_OUTPUTS=${EFFNETLIB_OUTPUTS/#\~\//$HOME/}
[[ $EFFNETLIB_OUTPUTS == /* ]] || EFFNETLIB_OUTPUTS=$PWD/$EFFNETLIB_OUTPUTS
copies=(python "$here/copies.py")

papermill='' begins=''
asked=0 signalled=0
helpers=()
on_signal() {
    asked=1 signalled=1
    [[ -z $begins ]] || kill -KILL -- "-$begins" 2>/dev/null || true
    [[ -z $papermill ]] || kill -TERM "$papermill" 2>/dev/null || true
}
trap on_signal TERM INT HUP USR1
place=$(mktemp)
trap 'rm -f "$place"; kill "${helpers[@]}" 2>/dev/null || true' EXIT
if [[ -n ${UNTIL_EOF:-} ]]; then
    { while read -r; do :; done; kill -TERM $$; } <&0 >/dev/null 2>&1 &
    helpers+=($!)
fi

# Runs a copy before papermill. There is nothing to save: a signal ends it at once, with all that it has started, and this
# script with 75.
begin_with() {
    local code
    set -m # its processes are a group
    "$@" </dev/null &
    begins=$!
    set +m
    ((!asked)) || on_signal
    while :; do
        signalled=0 code=0
        wait "$begins" 2>/dev/null || code=$? # a signal ends it early, with a code of its own
        ((signalled)) || break
    done
    begins=''
    ((!asked)) || exit 75
    return "$code"
}

if [[ -n ${COPY_BACK:-} ]]; then
    mkdir -p "$EFFNETLIB_OUTPUTS"
    EFFNETLIB_OUTPUTS=$EFFNETLIB_OUTPUTS/.host$process
    exec 9>"$EFFNETLIB_OUTPUTS.lock"
    until flock --nonblock 9; do # an earlier one, whose ssh was lost, still saves
        ((!asked)) || exit 75
        sleep 1
    done
    rm -rf "$EFFNETLIB_OUTPUTS"
    mkdir "$EFFNETLIB_OUTPUTS"
    begin_with "${copies[@]}" back || exit 74
fi
if [[ -n ${DATA:-} ]]; then
    begin_with "${copies[@]}" data >"$place" || exit 74
    EFFNETLIB_DATA=$(<"$place")
    export EFFNETLIB_DATA
fi
((!asked)) || exit 75
hosts=$EFFNETLIB_OUTPUTS/hosts
log=$hosts/host$process.log
mkdir -p "$hosts"

copy_out() { [[ -z ${COPY_TO:-} ]] || "${copies[@]}" out; }

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
        copy_out || true
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
copied=0
copy_out || copied=$?
if ((copied == 74)); then
    code=74 # not "run me again", which would begin without what is only here
fi
if ((code)); then
    echo "host.sh: host $process ended with $code, see $log" >&2
fi
exit "$code"
