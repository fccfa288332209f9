"""Which nodes a start sees and asks for, and what it says and does while the cluster lacks them."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from sampo_ray.actors.nodes import Where, cluster_of
from sampo_ray.actors.waiting import Need, Wait, given_up, lacks
from sampo_ray.config.machines import Cluster
from sampo_ray.config.packing import Group
from sampo_ray.errors import FleetError
from sampo_ray.internals.ray_nodes import HEAD, ClusterUse, NodeKind, NodeUse, Pending
from tests.waiting import scaled

RANK, ENGINE = {"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0, "CPU": 2.0, "memory": float(8 << 30)}
NEEDS = [Need("ranks", (RANK,), "trainer.workers"), Need("policy", (ENGINE, {"GPU": 1.0}), "fleet.generators.num_gpus")]


def node(gpus: float, free: float, name: str = "a") -> NodeUse:
    return NodeUse(name, "gpu", {"GPU": gpus, "CPU": 16.0}, {"GPU": free, "CPU": 16.0, "memory": float(64 << 30)})


class Ray:
    """A cluster and a clock that only a test moves."""

    def __init__(self, use: ClusterUse) -> None:
        self.use, self.now, self.said = use, 0.0, list[str]()

    def wait(self, limit_s: float = 60.0) -> Wait:
        return Wait(NEEDS, self.said.append, limit_s, lambda: self.use, lambda: self.now)

    def pass_by(self, wait: Wait, seconds: int) -> bool:
        """Looks each half second."""
        for _ in range(2 * seconds):
            self.now += 0.5
            missing = wait.look()
        return missing


def test_what_is_missing_is_said_within_seconds_and_every_few() -> None:
    ray = Ray(ClusterUse((node(4, 0),), (Pending(RANK, 3, True), Pending(ENGINE, 1, False)), {"gpu-group": 2}))
    wait = ray.wait()
    assert ray.pass_by(wait, 4) and not ray.said
    assert ray.pass_by(wait, 17)
    assert len(ray.said) == 4 and len(set(ray.said)) == 1
    assert ray.said[0] == (
        "waiting for nodes: ranks 3 x {1 GPU, 1 CPU}; policy 1 x {1 GPU, 2 CPU, 8 GiB} "
        "(1 node: 4 GPUs, 0 free; 16 CPUs, 16 free; being started: 2 gpu-group)"
    )


def test_the_wait_ends_once_nothing_has_come_for_the_limit() -> None:
    ray = Ray(ClusterUse((node(4, 0),), (Pending(RANK, 3, True),)))
    wait = ray.wait()
    ray.pass_by(wait, 50)
    ray.use = ClusterUse((node(4, 0), node(1, 0, "b")), (Pending(RANK, 3, True),))  # another node is progress
    ray.pass_by(wait, 55)
    with pytest.raises(FleetError) as error:
        ray.pass_by(wait, 10)
    assert str(error.value) == (
        "the cluster lacks what the run asks for, ranks 3 x {1 GPU, 1 CPU}, and 60 s brought nothing more (2 nodes: "
        "5 GPUs, 0 free; 32 CPUs, 32 free); add nodes, or ask for less (trainer.workers), or wait longer "
        "(fleet.start_timeout_s=60)"
    )


def test_what_ray_is_about_to_grant_is_not_missing() -> None:
    """Its processes take seconds to start, and so many are reported as pending."""
    assert lacks(ClusterUse((node(4, 1),), (Pending(ENGINE, 2, False),)), NEEDS) == []
    (lack,) = lacks(ClusterUse((node(4, 1),), (Pending(RANK, 4, True),)), NEEDS)
    assert lack.need is NEEDS[0], "a placement group is granted as a whole"


def test_the_demand_of_other_runs_is_no_reason_to_wait_or_to_end() -> None:
    ray = Ray(ClusterUse((node(4, 0),), (Pending({"GPU": 8.0}, 1, False),)))
    assert not ray.pass_by(ray.wait(), 100) and not ray.said
    use = ClusterUse((node(4, 0),), (Pending(RANK, 3, True), Pending({"GPU": 8.0}, 1, False)))
    assert "others" not in given_up(use, lacks(use, NEEDS), 60)
    ray.use, wait = use, ray.wait()
    ray.pass_by(wait, 6)
    assert "ranks 3 x {1 GPU, 1 CPU}; others 1 x {8 GPU}" in ray.said[0]


def test_room_on_the_head_is_none_for_what_stays_off_it() -> None:
    store, pending = {"CPU": 0.1, "memory": float(1 << 30)}, Pending({"CPU": 0.1, "memory": float(1 << 30)}, 1, False)
    need = Need("weight store", (store,), avoids_head=True)
    use = ClusterUse((NodeUse("h", "head", {HEAD: 1.0}, {"CPU": 4.0, "memory": float(8 << 30)}),), (pending,))
    (lack,) = lacks(use, [need])
    assert str(lack) == "weight store 1 x {0.1 CPU, 1 GiB}" and lacks(use, [Need("others", (store,))]) == []
    assert "brought nothing more (1 node: 0 GPUs, 0 free; 0 CPUs, 4 free); add nodes, or wait" in given_up(
        use, [lack], 60
    )


def test_why_no_node_could_be_started_is_said() -> None:
    use = ClusterUse((node(0, 0),), (Pending(RANK, 1, True),), failed="gpu-group: quota of 0 GPUs in this zone")
    assert "a node could not be started: gpu-group: quota of 0" in given_up(use, lacks(use, NEEDS), 60)


HEAVY = Group("base publish", 1, 1, cpus=0.5, memory=17 << 30, avoids_head=True)
SERVERS = NodeUse("h", "head", {"CPU": 4.0, HEAD: 1.0, "memory": float(8 << 30)}, {})


def cluster(*nodes: NodeUse, kinds: tuple[NodeKind, ...] | None = ()) -> Cluster:
    return cluster_of(ClusterUse(nodes), kinds, {})


def test_what_is_heavy_stays_off_the_head_where_other_nodes_are_or_may_come() -> None:
    asked = {"memory": 17 << 30, "label_selector": {"ray.io/node-id": "!h"}}
    assert Where.of(HEAVY, cluster(SERVERS, node(8, 8))).options == asked
    gpus = NodeKind("gpu-group", {"CPU": 64.0, "GPU": 8.0}, 4)
    assert Where.of(HEAVY, cluster(SERVERS, kinds=(gpus,))).options == asked
    assert Where.of(HEAVY, cluster(SERVERS, kinds=None)).options == asked
    soft = {"fallback_strategy": [{"label_selector": {}}]}
    assert Where.of(HEAVY, cluster(SERVERS, node(8, 8), kinds=None)).lasting_options == asked | soft
    assert Where.of(HEAVY, cluster(SERVERS, kinds=(gpus,))).lasting_options == asked, "an autoscaler starts one for it"
    light = Group("exchange", 1, 1, cpus=0.1)
    assert Where.of(light, cluster(SERVERS, node(8, 8))).options == {}


def test_one_node_does_all_and_nothing_waits_for_its_memory() -> None:
    """What Ray counts as memory of a machine is what was free when Ray was started."""
    here = cluster(SERVERS)
    assert Where.of(HEAVY, here).options == {} and here.nodes[0].memory == 0


def test_nodes_that_may_come_are_those_that_an_autoscaler_has_not_started() -> None:
    gpus, none_left = NodeKind("gpu", {"CPU": 64.0, "GPU": 8.0}, 4), NodeKind("cpu", {"CPU": 8.0}, 1)
    there = cluster(SERVERS, node(8, 8), NodeUse("c", "cpu", {"CPU": 8.0}, {}), kinds=(gpus, none_left))
    assert [(each.node.gpus, each.count) for each in there.growth] == [(8, 3)]
    assert [(each.gpus, each.head) for each in there.nodes] == [(0, True), (8, False), (0, False)]
    (unknown,) = cluster(SERVERS, kinds=None).growth
    assert unknown.count is None
    (endless,) = cluster(SERVERS, kinds=(NodeKind("gpu", {"GPU": 8.0}, None),)).growth
    assert (endless.node.gpus, endless.count) == (8, None)


def on_a_ray_of_its_own(module: str) -> list[dict[str, Any]]:
    """The lines that a script of the tests prints, in a process of its own: the tests' Ray has other nodes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-m", module], env=env, capture_output=True, text=True, timeout=scaled(280), check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_ray_grants_each_plan_as_it_is_made() -> None:
    grants = on_a_ray_of_its_own("tests.grants")
    assert {grant["gpus"] for grant in grants} == {8, 16, 64}
    for grant in grants:
        assert grant["pending"] == 0 and grant["left"] == pytest.approx(grant["planned_left"], abs=0.001), grant
        if "shared" not in grant["case"]:
            assert grant["planned_left"] == 0, grant


@pytest.mark.slow
def test_a_start_says_what_it_lacks_takes_what_comes_and_ends_where_nothing_does() -> None:
    (found,) = on_a_ray_of_its_own("tests.starts")
    assert found["said_after_s"] < scaled(15)
    assert "waiting for nodes: policy 1 x {1 GPU, 0.5 CPU}" in found["said"]
    assert found["status"] == "RUNNING", "a node that joined has the replica"
    assert "ranks 3 x {1 GPU, 0.5 CPU}" in found["ranks"] and "trainer.workers" in found["ranks"]
    assert found["closed_after_s"] < scaled(30), "ranks that never started are not waited for"
    assert found["on_head"] == [False, True], "a store whose node is gone starts again, if need be on the head"
    assert found["place"] == found["attached"], "it knows what it works for"
