"""What a start says and does while the cluster lacks what it asks for."""

import pytest

from sampo_ray.actors.waiting import Need, Wait, given_up, lacks
from sampo_ray.errors import FleetError
from sampo_ray.internals.ray_nodes import ClusterUse, NodeUse, Pending

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


def test_why_no_node_could_be_started_is_said() -> None:
    use = ClusterUse((node(0, 0),), (Pending(RANK, 1, True),), failed="gpu-group: quota of 0 GPUs in this zone")
    assert "a node could not be started: gpu-group: quota of 0" in given_up(use, lacks(use, NEEDS), 60)
