"""Ray's private interfaces about nodes: what they have, what Ray could not grant yet, and which may still come.

Checked with Ray 2.60.0.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
import requests
from ray._private import state
from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec
from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient
from ray.autoscaler.v2.schema import ResourceDemand
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import internal_kv_get_gcs_client

CALL_S = 10
HEAD, READ_ONLY = "node:__internal_head__", "node_"
"""The resource that the head alone has, and how kinds of nodes begin that no autoscaler has made."""
NODE_ID = "ray.io/node-id"
"""The label that Ray gives to each node."""
ANY_NODE: list[dict[str, dict[str, str]]] = [{"label_selector": {}}]
"""As `fallback_strategy`: where no node with the labels that are asked for has room, any other will do."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Pending:
    """Bundles of one shape that Ray has not granted. `together`: those of a placement group, granted all at once."""

    bundle: Mapping[str, float]
    count: int
    together: bool


@dataclass(frozen=True)
class NodeUse:
    """A node that is there: the kind that its autoscaler knows it by, its resources, and those that nobody holds."""

    id: str
    kind: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    @property
    def head(self) -> bool:
        return HEAD in self.total


@dataclass(frozen=True)
class ClusterUse:
    """What a cluster has, and what Ray owes."""

    nodes: tuple[NodeUse, ...]
    pending: tuple[Pending, ...] = ()
    starting: Mapping[str, int] = field(default_factory=dict)
    """Nodes that an autoscaler has asked for and that are not there yet, by kind."""
    failed: str | None = None
    """Why the autoscaler could not get a node, the last time."""


@dataclass(frozen=True)
class NodeKind:
    """A kind of nodes that an autoscaler may start, up to `most` (None: without limit)."""

    name: str
    resources: Mapping[str, float]
    most: int | None


def cluster_use() -> ClusterUse:
    """How the cluster is used now. Reaches `ray.autoscaler.v2.sdk`, which works with any autoscaler and without one."""
    now = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=CALL_S)
    nodes = tuple(
        NodeUse(node.node_id or "", node.ray_node_type_name, node.total_resources(), node.available_resources())
        for node in (*now.active_nodes, *now.idle_nodes)
    )
    demands = now.resource_demands
    pending = [*_bundles(demands.placement_group_demand, True), *_bundles(demands.ray_task_actor_demand, False)]
    starting = Counter(node.ray_node_type_name for node in now.pending_nodes)
    for launch in now.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    failed = [f"{each.ray_node_type_name}: {each.details}" for each in now.failed_launches if each.details]
    return ClusterUse(nodes, tuple(pending), starting, failed[-1] if failed else None)


def _bundles(demands: list[ResourceDemand], together: bool) -> list[Pending]:
    return [Pending(dict(each.bundle), each.count, together) for demand in demands for each in demand.bundles_by_count]


def node_kinds() -> tuple[NodeKind, ...] | None:
    """The kinds of nodes that the cluster's autoscaler may start: none without one, None where one does not say.

    Ray keeps them where its cluster's provider has told them (`state.get_cluster_config`). KubeRay does not: they are
    in its RayCluster resource, which the pod of the head may read.
    """
    if (config := state.state.get_cluster_config()) is not None and config.node_group_configs:
        groups = config.node_group_configs
        return tuple(_kind(each.name, dict(each.resources), each.max_count) for each in groups if each.max_count)
    if not is_autoscaled():
        return ()
    if (resource := _ray_cluster()) is None:
        return None
    kinds = _generate_available_node_types_from_ray_cr_spec(resource["spec"])
    return tuple(
        _kind(name, each["resources"], each["max_workers"]) for name, each in kinds.items() if each["max_workers"]
    )


def _kind(name: str, resources: Mapping[str, float], most: int) -> NodeKind:
    return NodeKind(name, resources, None if most < 0 else most)


def is_autoscaled() -> bool:
    """Whether an autoscaler starts and stops nodes. Where there is none Ray runs one that only looks, and names kinds
    of nodes itself. Reaches what both generations of it leave in the key-value store.
    """
    if is_autoscaler_v2():
        kinds = [node.kind for node in cluster_use().nodes]
    else:
        said = internal_kv_get_gcs_client().internal_kv_get(b"__autoscaling_status", None, CALL_S)
        kinds = list((json.loads(said or b"{}").get("autoscaler_report") or {}).get("active_nodes") or {})
    return any(kind and not kind.startswith(READ_ONLY) for kind in kinds)


def _ray_cluster() -> dict[str, dict[str, object]] | None:
    """KubeRay's RayCluster of this pod; None elsewhere, and where it may not be read."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    try:
        namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or NAMESPACE_FILE.read_text().strip()
        return KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}") if name else None
    except (OSError, requests.RequestException):
        return None
