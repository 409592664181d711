#!/usr/bin/env bash
# The gang, for the launchers to source: background jobs that fail as one. When a job fails the others are stopped, and its exit
# code is the gang's; TERM, INT, HUP or USR1 stops all of them, and the gang's code is then 75, "run me again".
#
# Before it is sourced, `stop` must be there: a function that asks every job to end, and that may be called at any time, also
# before there is a job or once more. A job saves before it ends, so whoever stops a gang still waits for it.
stopped=0 # whether a signal has come
trap 'stopped=1; stop' TERM INT HUP USR1

# Waits for all jobs of this shell; returns the gang's code.
wait_for_gang() {
    local code result=0
    ((!stopped)) || stop # the signal came before the last job had started
    while [[ -n $(jobs -p) ]]; do # those that have ended too, until their code is read
        code=0
        wait -n || code=$?
        # After a signal a code says nothing, also wait's own, which the signal ends early. Jobs that were stopped because of
        # another are not what failed.
        if ((code && !result && !stopped)); then
            result=$code
            stop
        fi
    done
    return $((stopped ? 75 : result))
}
