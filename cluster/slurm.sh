#!/bin/bash
# A job on Slurm: a Ray head on the first node of the allocation, a worker on each other one, and all of it gone with the job.
#     sbatch [--nodes=4 --gpus-per-node=8 ...] cluster/slurm.sh --config job.yaml [section.key=value ...]
# From the repository root, in whose .venv the package is, on a file system that all nodes share, as the output is. Arguments are those
# of pipelines/generate.py, and so is the exit status. A job that runs out of time is queued again and goes on where it was;
#     scancel --batch --signal=TERM JOBID
# stops it for good with its journals written.
#SBATCH --job-name=nano-vllm
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@90
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
ray() { "$python" -m ray.scripts.scripts "$@"; }

# Whoever has the token runs code on the cluster. It lives in the environment of this job's processes and nowhere else.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
RAY_USAGE_STATS_ENABLED=0
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # a node of this job ends when the job has: nothing is left to be moved away
export RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

# Slurm runs this script on the first node. Ports and directory follow from the job, so that two jobs can be on one node.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${HEAD_ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
port=$((20000 + SLURM_JOB_ID % 1000 * 10))
common=(--num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="/tmp/ray-$SLURM_JOB_ID" --block)

steps=()
start_node() { # NODE ARGUMENTS...: of `ray start`
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$1" \
        "$python" -m ray.scripts.scripts start "${common[@]}" "${@:2}" &
    steps+=($!)
}

driver='' stopping='' again=''
stop() { # The driver journals what is finished and ends within 8 s; before there is one, nothing is lost.
    stopping=yes
    if [ -n "$driver" ]; then kill -TERM "$driver" 2> /dev/null || true; else exit 1; fi
}
end() {
    local status=$?
    kill -TERM "${steps[@]}" 2> /dev/null || true
    wait "${steps[@]}" 2> /dev/null || true
    rm -rf "/tmp/ray-$SLURM_JOB_ID"
    if [ -n "$again" ] && [ "$status" -eq 1 ]; then
        echo "out of time: queued again, to go on"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
trap end EXIT
trap stop TERM INT
trap 'again=yes; stop' USR1

start_node "${nodes[0]}" --head --node-ip-address="$address" --port="$port" \
    --include-dashboard=false --ray-client-server-port=$((port + 1)) --dashboard-agent-listen-port=0
for ((tries = 0; ; tries++)); do
    ray health-check --address "$address:$port" > /dev/null 2>&1 && break
    kill -0 "${steps[0]}" 2> /dev/null && [ "$tries" -lt 120 ] || { echo "error: Ray's head did not start" >&2; exit 1; }
    sleep 1
done
for ((node = 1; node < ${#nodes[@]}; node++)); do
    start_node "${nodes[$node]}" --address="$address:$port" --dashboard-agent-listen-port=0
done

# The number of engines follows from the GPUs that are there when the job starts, so it waits for all nodes.
export RAY_ADDRESS=$address:$port
"$python" - "${#nodes[@]}" << 'WAIT'
import sys
import time

import ray

ray.init(logging_level="ERROR")
wanted, deadline = int(sys.argv[1]), time.monotonic() + 300
while (joined := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"error: {joined} of {wanted} nodes joined within 300 s")
    time.sleep(0.5)
print(f"cluster  {joined} nodes, {ray.cluster_resources().get('GPU', 0):g} GPUs", flush=True)
WAIT

# Not through `ray job submit`: so the driver's exit status and signals are Slurm's.
"$python" pipelines/generate.py "$@" &
driver=$!
status=0
wait "$driver" || status=$?
while [ -n "$stopping" ] && [ "$status" -gt 128 ]; do # it was the signal that ended `wait`, not the driver
    stopping=''
    status=0
    wait "$driver" || status=$?
done
exit "$status"
