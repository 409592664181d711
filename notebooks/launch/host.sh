#!/usr/bin/env bash
# What every host of a slice runs: one papermill process, which joins the others.
#
#   host.sh [-p NAME VALUE …]        the parameters of notebooks/train.ipynb
#
# Which host it is, and where the first one is, comes from EFFNETLIB_COORDINATOR, EFFNETLIB_PROCESSES and EFFNETLIB_PROCESS
# (see effnetlib/distributed.py). What runs write goes to EFFNETLIB_OUTPUTS, a folder that all hosts see. Each host leaves its
# notebook and its log in hosts/ there. With COPY_TO, the first host runs `$COPY FOLDER $COPY_TO` every COPY_SECONDS and at
# the end; COPY is "gcloud storage rsync --recursive" unless you say otherwise. SIGTERM is passed on, and waits for the save.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
process=${EFFNETLIB_PROCESS:?which host this is, from 0}
export EFFNETLIB_OUTPUTS=${EFFNETLIB_OUTPUTS:-$here/../../outputs}
hosts=$EFFNETLIB_OUTPUTS/hosts
mkdir -p "$hosts"

copy() {
    if [[ $process == 0 && -n ${COPY_TO:-} ]]; then
        ${COPY:-gcloud storage rsync --recursive} "$EFFNETLIB_OUTPUTS" "$COPY_TO" || echo "host.sh: could not copy to $COPY_TO" >&2
    fi
}

papermill=
signalled=0
trap 'signalled=1; [[ -z $papermill ]] || kill -TERM $papermill 2>/dev/null || true' TERM INT
papermill --engine effnetlib --kernel python3 --no-progress-bar --cwd "$here/.." \
    "$here/../train.ipynb" "$hosts/host$process.ipynb" "$@" >"$hosts/host$process.log" 2>&1 &
papermill=$!
((!signalled)) || kill -TERM $papermill # it came in between

copy_now_and_then() {
    trap 'kill $!; exit' TERM
    while :; do
        sleep "${COPY_SECONDS:-600}" &
        wait $!
        copy
    done
}
copy_now_and_then &
copier=$!

# A signal ends `wait` early, with a code of its own: wait again for papermill's.
while :; do
    signalled=0 code=0
    wait $papermill || code=$?
    ((signalled)) || break
done
kill $copier 2>/dev/null || true
copy
if ((code)); then
    echo "host.sh: host $process ended with $code, see $hosts/host$process.log" >&2
fi
exit "$code"
