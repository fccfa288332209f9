#!/usr/bin/env bash
# ray: a placement group of GPU fractions that fits is not granted with PACK, as Ray counts a node's GPUs by their sum
#
# Packages   ray 2.60.0. Python 3.11 or 3.12, Linux. No GPU is needed: nodes are told that they have some.
# Input      Two nodes with two GPUs each, and a placement group of four bundles of 0.6 GPU: one fits on each GPU.
# Expected   It is granted, whatever the strategy: PACK prefers few nodes, and takes more where one has no room.
# Happens    A fraction must lie on one GPU, so a node has room for two bundles. The scheduler compares a bundle with the
#            sum of the node's free GPUs (2.0), so that with PACK three seem to fit (1.8); the node then refuses the third,
#            and the same plan is made again. With SPREAD, two bundles a node, the same group is granted at once.
# Seen       PACK: granted within 20 s: False
#            SPREAD: granted within 20 s: True
# Matters    Whoever puts engines or ranks on parts of GPUs (0.51 so that no two share one, or 0.6 and 0.4) on several nodes
#            waits for a group that the cluster could hold, and the autoscaler has no reason to add a node. Fractions have to
#            be planned by device, and spread evenly.
#
# Exits 0 if this is still so, 1 if it has changed, 2 if the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
{
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$folder/venv/bin/pip" --quiet --disable-pip-version-check install "ray==2.60.0" "setuptools<81"
} >&2 || exit 2
cd "$folder"
unset "${!RAY_@}"
RAY_AUTH_MODE=disabled "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

SECONDS = 20
node = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args=node)
cluster.add_node(**node)
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
granted = {}
for strategy in ("PACK", "SPREAD"):
    group = placement_group([{"GPU": 0.6}] * 4, strategy=strategy)
    granted[strategy] = group.wait(timeout_seconds=SECONDS)
    print(f"{strategy}: granted within {SECONDS} s: {granted[strategy]}")
    remove_placement_group(group)
ray.shutdown()
cluster.shutdown()
sys.exit(0 if granted == {"PACK": False, "SPREAD": True} else 1)
PYTHON
