#!/usr/bin/env bash
# Starts two Ray nodes of one CPU each on this machine, and ends both with Ctrl-C. In another terminal:
#
#   RAY_AUTH_MODE=disabled python -m orchestrator.search --cluster two_nodes_one_machine
#
# Each node has an address of its own on the loopback network. No other Ray of yours is touched: this script ends the processes
# it started, where `ray stop` would end them all.
set -euo pipefail

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled} RAY_USAGE_STATS_ENABLED=0
ray=${RAY:-ray}
folder=$(mktemp -d /tmp/two_nodes.XXXX)        # short: Unix sockets lie in it, whose paths end at 107 characters
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$folder"' EXIT
trap exit INT TERM

"$ray" start --head --block --node-ip-address=127.0.0.1 --port=6399 --num-cpus=1 --dashboard-host=127.0.0.1 \
  --dashboard-port="${DASHBOARD_PORT:-8265}" --object-store-memory=150000000 --temp-dir="$folder/1" &
until "$ray" health-check --address 127.0.0.1:6399 >/dev/null 2>&1; do sleep 1; done
"$ray" start --block --address=127.0.0.1:6399 --node-ip-address=127.0.0.2 --num-cpus=1 --object-store-memory=150000000 \
  --temp-dir="$folder/2" &       # its own: in a shared one it would unpack the working directory of a Ray job under the head's feet
echo "two nodes at 127.0.0.1:6399, RAY_AUTH_MODE=$RAY_AUTH_MODE; Ctrl-C ends them" >&2
wait
