#!/bin/sh
# Run on a node that is about to go (a preStop hook, a spot notice): jobs end with their journals written, then Ray does.
#     pre_stop.sh [SECONDS]     SECONDS: how long a job may take to end; 10, of which it takes 2 to 8
# A job whose driver runs here (on Ray's head) is stopped as `ray job stop` stops it; the same command goes on with it later. On other
# nodes there is none, and the end of Ray tells the head at once that the node is gone, not after health checks that fail.
set -u
wait_s=${1:-10}
driver='^[^ ]*python[0-9.]* [^ ]*pipelines/generate\.py( |$)'

if pkill -TERM -f "$driver"; then
    while [ "$wait_s" -gt 0 ] && pgrep -f "$driver" > /dev/null; do
        sleep 1
        wait_s=$((wait_s - 1))
    done
fi
exec ray stop --grace-period 5
