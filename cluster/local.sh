#!/usr/bin/env bash
# A Ray cluster on this machine: a head and two worker nodes, each with its own raylet, reachable
# from this machine only and with a token. To try raysft as it runs on a real cluster:
#
#   cluster/local.sh start     start it, print what to export and how to submit a job
#   cluster/local.sh exports   what to export, and how to submit a job, again
#   cluster/local.sh status    its nodes; exit code 0 if it runs
#   cluster/local.sh stop      stop it (and its jobs), and nothing else on this machine
#   cluster/local.sh lose N    kill -9 whatever runs on node N (0: the head), as a power cut would
#   cluster/local.sh add N     start node N again
#
# Settings, from the environment:
#   RAYSFT_HEAD_CPUS        CPUs of the head                   (1)
#   RAYSFT_NODE_CPUS        CPUs of each worker node           (half the cores)
#   RAYSFT_NODES            worker nodes                       (2)
#   RAYSFT_DASHBOARD_PORT   dashboard and jobs API             (8265)
#   RAYSFT_PORT_BASE        first port of a range of 3,000     (20000; below the ephemeral ports)
#   RAYSFT_STORE_BYTES      object store of each node          (536870912)
set -euo pipefail

PARENT=${TMPDIR:-/tmp}
# Ray puts sockets below its folder; a socket's path has at most 107 bytes.
[ ${#PARENT} -le 22 ] || PARENT=/tmp
DIR=${PARENT%/}/raysft-$(id -u)

HEAD_CPUS=${RAYSFT_HEAD_CPUS:-1}
CORES=$(nproc)
NODE_CPUS=${RAYSFT_NODE_CPUS:-$((CORES > 1 ? CORES / 2 : 1))}
NODES=${RAYSFT_NODES:-2}
DASHBOARD=${RAYSFT_DASHBOARD_PORT:-8265}
BASE=${RAYSFT_PORT_BASE:-20000}
STORE=${RAYSFT_STORE_BYTES:-536870912}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=$ROOT/.venv/bin
if [ -x "$BIN/ray" ]; then
  PATH=$BIN:$PATH
fi

fail() {
  echo "local.sh: $*" >&2
  exit 1
}

# Process ids of this cluster, of its jobs and their children: whoever holds a file in its folder
# open. (Names and environments do not tell: Ray renames its processes over both.)
members() {
  # Processes that end meanwhile, or are not ours to look into, are errors to find.
  { find /proc/[0-9]*/fd -lname "${1:-$DIR}/*" 2>/dev/null || true; } | cut -d/ -f3 | sort -un
}

# The folder of node number $1; 0 is the head.
folder_of() {
  [ "$1" = 0 ] && echo "$DIR/ray" || echo "$DIR/ray$1"
}

# The ports node number $1 listens on, as flags; its workers get 500 of their own.
ports() {
  local first=$((BASE + 10 * $1)) workers=$((BASE + 500 * ($1 + 1)))
  echo "--node-manager-port=$((first + 1)) --object-manager-port=$((first + 2))" \
    "--dashboard-agent-listen-port=$((first + 3)) --dashboard-agent-grpc-port=$((first + 4))" \
    "--runtime-env-agent-port=$((first + 5)) --metrics-export-port=$((first + 6))" \
    "--min-worker-port=$workers --max-worker-port=$((workers + 499))"
}

listens() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

use_cluster() {
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$DIR/token
  unset RAY_AUTH_TOKEN RAY_ADDRESS
}

# `ray start`, but keeping to 127.0.0.1: Ray turns it into the machine's address, and then listens
# on all interfaces. Its switch against that is named after other systems, and is passed on to
# every process of the cluster, jobs included; `ray start --address` itself refuses to run with it.
START=$(
  cat <<'PYTHON'
import sys
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
PYTHON
)

start_node() {
  local log=$DIR/start.log
  # RAY_ADDRESS: Ray Train's actors look for "the" cluster, and give up where a machine has two.
  env RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_ADDRESS="127.0.0.1:$BASE" TMPDIR="$DIR/tmp" \
    RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 \
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S="${TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S:-3}" \
    RAY_health_check_initial_delay_ms="${RAY_health_check_initial_delay_ms:-1000}" \
    RAY_health_check_period_ms="${RAY_health_check_period_ms:-1000}" \
    RAY_health_check_timeout_ms="${RAY_health_check_timeout_ms:-2000}" \
    RAY_health_check_failure_threshold="${RAY_health_check_failure_threshold:-3}" \
    python -c "$START" start "$@" --node-ip-address=127.0.0.1 --num-gpus=0 \
    --object-store-memory="$STORE" --disable-usage-stats --log-color=false \
    </dev/null >>"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; stop >&2; fail "a node did not start (above: the end of its log)"; }
}

# A folder of its own for each node, as on machines of their own: in a shared one, a node that
# unpacks a job's working directory for its workers first deletes it under the job.
start_worker_node() {
  # shellcheck disable=SC2046
  start_node --address="127.0.0.1:$BASE" --node-name="node$1" --num-cpus="$NODE_CPUS" \
    --labels="pool=workers" --temp-dir="$(folder_of "$1")" $(ports "$1")
}

nodes_alive() {
  RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray status --address="127.0.0.1:$BASE" 2>/dev/null |
    grep -cE '^ 1 node_' || true
}

start() {
  command -v ray >/dev/null || fail "no ray command: run \`make setup\` first"
  [ "$NODES" -le 5 ] || fail "RAYSFT_NODES=$NODES: at most 5"
  if [ -n "$(members)" ]; then
    fail "already running; \`cluster/local.sh status\` shows it, \`stop\` ends it"
  fi
  local port
  for port in "$BASE" "$DASHBOARD"; do
    if listens "$port"; then
      fail "port $port is taken; set RAYSFT_PORT_BASE and RAYSFT_DASHBOARD_PORT to free ones"
    fi
  done
  rm -rf "$DIR"
  mkdir -m 700 "$DIR" "$DIR/tmp"
  use_cluster
  # `ray get-auth-token --generate` writes to the home folder only, where other clusters' token is.
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$DIR/token")

  # shellcheck disable=SC2046
  start_node --head --port="$BASE" --node-name=head --num-cpus="$HEAD_CPUS" --temp-dir="$DIR/ray" \
    --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD" \
    --ray-client-server-port=$((BASE + 7)) --labels=pool=head $(ports 0)
  local node
  for node in $(seq "$NODES"); do
    start_worker_node "$node"
  done
  local tries=0
  until [ "$(nodes_alive)" -eq $((NODES + 1)) ]; do
    tries=$((tries + 1))
    [ $tries -lt 20 ] || { stop >&2; fail "the nodes did not join within 20 tries"; }
    sleep 0.5
  done
  echo "# A head ($HEAD_CPUS CPU) and $NODES nodes ($NODE_CPUS CPU each) run."
  exports
}

exports() {
  [ -n "$(members)" ] || fail "no cluster is running; \`cluster/local.sh start\` starts one"
  cat <<END
# Dashboard: http://127.0.0.1:$DASHBOARD (it asks for the token, which is in $DIR/token).
export RAY_ADDRESS=http://127.0.0.1:$DASHBOARD
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$DIR/token
# Then, from the folder of the source; all nodes see run.storage_path:
#   ray job submit --working-dir . -- python jobs/sft.py CONFIG.yaml run.storage_path=$ROOT/runs
END
}

status() {
  [ -n "$(members)" ] || { echo "no cluster of local.sh is running"; return 1; }
  use_cluster
  RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray status --address="127.0.0.1:$BASE"
}

stop() {
  local pids signal=TERM begin=$SECONDS
  pids=$(members)
  [ -n "$pids" ] || { rm -rf "$DIR"; echo "no cluster of local.sh is running"; return 0; }
  # Raylets drain first; what has not ended after 5 s is killed.
  while [ -n "$pids" ]; do
    # shellcheck disable=SC2086
    kill -"$signal" $pids 2>/dev/null || true
    sleep 0.5
    [ $((SECONDS - begin)) -lt 5 ] || signal=KILL
    pids=$(members)
  done
  rm -rf "$DIR"
  echo "stopped"
}

numbered() {
  [[ "${1:-}" =~ ^[0-9]+$ ]] && [ "$1" -le "$NODES" ] || fail "which node? 0 (head) to $NODES"
}

lose() {
  numbered "${1:-}"
  local pids
  pids=$(members "$(folder_of "$1")")
  [ -n "$pids" ] || fail "node $1 does not run"
  # shellcheck disable=SC2086
  kill -KILL $pids 2>/dev/null || true
  until [ -z "$(members "$(folder_of "$1")")" ]; do
    sleep 0.1
  done
  echo "lost node $1"
}

add() {
  numbered "${1:-}"
  [ "$1" -gt 0 ] || fail "a lost head takes its cluster with it: stop, then start"
  [ -z "$(members "$(folder_of "$1")")" ] || fail "node $1 runs"
  rm -rf "$(folder_of "$1")"
  use_cluster
  start_worker_node "$1"
  echo "added node $1"
}

case "${1:-}" in
start | exports | stop | status | lose | add) "$@" ;;
*) fail "usage: cluster/local.sh start | exports | status | stop | lose N | add N" ;;
esac
