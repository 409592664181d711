#!/usr/bin/env bash
# A rehearsal: processes on this machine stand in for the hosts of a slice.
#
#   local.sh HOSTS [-p NAME VALUE …]        for example: local.sh 2 -p preset digits-64-lars -p simulated_devices 4
#
# The gang fails as one: when a host fails the others are stopped, and its exit code is the result. PORT is 8476 unless given.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosts=${1:-}
[[ $hosts =~ ^[1-9][0-9]*$ ]] || {
    echo "local.sh: the first argument is how many hosts" >&2
    exit 2
}
shift
export EFFNETLIB_COORDINATOR=localhost:${PORT:-8476} EFFNETLIB_PROCESSES=$hosts
running=()
stop() { kill -TERM "${running[@]}" 2>/dev/null || true; }
# shellcheck source=/dev/null
source "$here/gang.sh"
for ((process = 0; process < hosts; process++)); do
    EFFNETLIB_PROCESS=$process "$here/host.sh" "$@" &
    while cmp -s /proc/$$/cmdline /proc/$!/cmdline; do :; done # still a copy of this script, a signal to which is lost
    running+=($!)
done
wait_for_gang
