#!/bin/bash
# A run on a Ray cluster: the launcher is a job on its head, and an agent is started on each of the other nodes.
#
#   RAY_ADDRESS=http://HEAD:8265 examples/cluster/ray.sh run.yaml --set cluster.nodes=4
#   RAY_ADDRESS=http://HEAD:8265 examples/cluster/ray.sh run.yaml --set cluster.nodes=4 --set cluster.gpus_per_node=8
#
# Work in a folder that every node has. What follows the script goes to `opd run`.
set -euo pipefail

# no --working-dir: Ray would unpack a copy on each node, and a run needs one folder that all of them share
exec "${RAY:-.venv/bin/ray}" job submit -- \
    env --chdir="$PWD" "${OPD:-.venv/bin/opd}" run "$@" --set cluster.backend=ray
