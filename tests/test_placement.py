"""Where actors go: plans for clusters of any size, from records alone."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sampo_ray.config.machines import Cluster, Growth, Node
from sampo_ray.config.packing import EPSILON, Room, in_order
from sampo_ray.config.placement import placement, serving_plan
from sampo_ray.config.profiles import plan_for, resolve
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.config.sizing import ModelMemory, RankMemory
from sampo_ray.console.comments import comment, plan_lines
from sampo_ray.errors import ConfigError
from sampo_ray.run.directory import dump_config

MINIMAL = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}}
ONLINE = ["rounds.mode=online", "data.prompts=p", "reward.function=f.py:f"]
KINDS = {
    "offline": [],
    "alone": ["serve.enabled=false"],
    "online": ONLINE,
    "model": [*ONLINE[:2], "reward.model=rm"],
    "gates": ["serve.gates.smoke=hi"],
    "online gates": [*ONLINE, "serve.gates.smoke=hi"],
    "evaluated": ["evaluate.every=round", "evaluate.prompts=q"],
    "evaluated alone": ["evaluate.every=round", "evaluate.prompts=q", "serve.enabled=false"],
    "two GPUs": ["fleet.generators.engine.tensor_parallel_size=2"],
}


def config(*overrides: str) -> RunConfig:
    return load_config(MINIMAL, list(overrides))


def nodes(gpus: int, each: int = 8, cpus: float = 64) -> Cluster:
    sizes = [min(each, gpus - start) for start in range(0, gpus, each)] or [0]
    return Cluster(tuple(Node(size, cpus, id=f"n{at}", head=at == 0) for at, size in enumerate(sizes)), cores=4)


def sizes(kind: str, gpus: int) -> str:
    """What has GPUs in a plan: `7 ranks, 1 policy`; a number of GPUs behind it where it is not one."""
    plan, _ = plan_for(config(*KINDS[kind]), nodes(gpus))
    counts = [(each, "" if each.gpus_each == 1 else f" {each.gpus_each:g}") for each in plan.groups if each.kept]
    return ", ".join(f"{each.most} {each.role}{size}" for each, size in counts if each.gpus)


@pytest.mark.parametrize(
    ("kind", "gpus", "expected"),
    [
        ("offline", 1, "1 ranks 0.51, 1 policy 0.3"),
        ("offline", 2, "2 ranks 0.51, 1 policy 0.3"),
        ("offline", 4, "3 ranks, 1 policy"),
        ("offline", 8, "7 ranks, 1 policy"),
        ("offline", 16, "15 ranks, 1 policy"),
        ("offline", 64, "63 ranks, 1 policy"),
        ("alone", 8, "8 ranks"),
        ("alone", 64, "64 ranks"),
        ("online", 1, "1 ranks 0.51, 1 policy 0.3"),
        ("online", 2, "2 ranks 0.51, 2 policy 0.3"),
        ("online", 4, "2 ranks, 1 policy, 1 generators"),
        ("online", 8, "5 ranks, 1 policy, 2 generators"),
        ("online", 16, "11 ranks, 1 policy, 4 generators"),
        ("online", 64, "47 ranks, 1 policy, 16 generators"),
        ("model", 1, "1 ranks 0.51, 1 policy 0.3, 1 rewards 0.1"),
        ("model", 4, "1 ranks, 1 policy, 1 generators, 1 rewards"),
        ("model", 8, "4 ranks, 1 policy, 2 generators, 1 rewards"),
        ("gates", 1, "1 ranks 0.5, 1 policy 0.2, 1 generators 0.2"),
        ("gates", 8, "6 ranks, 1 policy, 1 generators"),
        ("online gates", 1, "1 ranks 0.5, 1 policy 0.2, 1 generators 0.2"),
        ("online gates", 8, "5 ranks, 1 policy, 2 generators"),
        ("evaluated", 1, "1 ranks 0.51, 1 policy 0.3"),
        ("evaluated", 8, "6 ranks, 1 policy, 1 generators"),
        ("evaluated alone", 1, "1 ranks 0.5, 1 generators 0.2"),
        ("two GPUs", 2, "2 ranks 0.51, 1 policy 0.6"),
        ("two GPUs", 4, "2 ranks, 1 policy 2"),
        ("two GPUs", 64, "62 ranks, 1 policy 2"),
    ],
)
def test_every_gpu_has_work(kind, gpus, expected):
    assert sizes(kind, gpus) == expected


def explicit() -> st.SearchStrategy[list[str]]:
    """Sizes that a recipe may give."""
    fields = {
        "trainer.workers": st.integers(1, 20),
        "trainer.num_gpus": st.sampled_from([0.6, 1, 2]),
        "fleet.generators.max_replicas": st.integers(1, 6),
        "fleet.generators.engine.tensor_parallel_size": st.sampled_from([1, 2, 4, 8]),
        "fleet.generators.num_gpus": st.sampled_from([0.4, 1]),
        "fleet.references.max_replicas": st.integers(1, 3),
        "fleet.rewards.num_gpus": st.sampled_from([0, 0.25, 1]),
        "reference.where": st.sampled_from(["auto", "workers", "trainer"]),
        "fleet.placement": st.sampled_from(["auto", "split"]),
        "optim.batch_size": st.sampled_from([1, 7, 128]),
    }
    chosen = st.fixed_dictionaries({}, optional=fields)
    return chosen.map(lambda values: [f"{name}={value}" for name, value in values.items()])


@settings(deadline=None)
@given(st.sampled_from([*KINDS]), st.integers(0, 40), st.sampled_from([1, 2, 4, 8]), explicit())
def test_a_plan_fits_keeps_what_is_given_and_leaves_no_gpu_idle_that_a_rank_could_use(kind, gpus, each, given_sizes):
    asked, cluster = config(*KINDS[kind], *given_sizes), nodes(gpus, each)
    refused = None
    try:
        plan, notes = plan_for(asked, cluster)
    except ConfigError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused and "; use " in refused
        return
    # Nothing is promised twice: all of it can be placed by device, and sums are no more than there is.
    room = Room.of(cluster.nodes)
    assert all(room.place(group) for group in in_order(plan.groups) for _ in range(group.kept))
    assert sum(group.gpus_each * group.kept for group in plan.groups) <= gpus + EPSILON
    assert all(-EPSILON <= free <= 1 for each in room.free for free in each.devices)
    assert plan.missing(cluster) is None
    # What is given is kept, or said.
    said = " ".join(notes)
    for name, value in (override.split("=") for override in given_sizes):
        found: object = plan.config
        for part in name.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert str(found) == value or value == "auto" or name in said or math.isclose(float(found), float(value))
    # What is left could not be a rank.
    ranks = plan.group("ranks")
    assert ranks is not None
    if asked.trainer.workers is None and plan.config.profile == "cluster" and ranks.gpus:
        assert not room.place(ranks)


@settings(deadline=None)
@given(st.sampled_from([*KINDS]), st.integers(0, 24), st.integers(0, 24))
def test_sizes_that_were_chosen_are_chosen_anew_on_another_cluster(kind, before, after):
    asked = config(*KINDS[kind])
    try:
        first, again = (resolve(asked, {"GPU": gpus, "CPU": 64}, 4)[0] for gpus in (before, after))
    except ConfigError:
        return  # one of them is too small
    stored = load_config(yaml.safe_load(dump_config(first)))
    moved, _ = resolve(stored, {"GPU": after, "CPU": 64}, 4)
    where = {"reference": first.reference}  # who computes log-probs is not changed within a run
    if first.reference == again.reference:
        assert moved == again
    else:
        assert moved.reference == where["reference"]
    assert resolve(moved, {"GPU": after, "CPU": 64}, 4)[0] == moved


def test_a_run_of_eight_gpus_goes_on_with_four_and_says_so():
    begun, _ = resolve(config(), {"GPU": 8, "CPU": 64}, 4)
    stored = load_config(yaml.safe_load(dump_config(begun)))
    resumed, notes = resolve(stored, {"GPU": 4, "CPU": 64}, 4)
    assert (begun.trainer.workers, resumed.trainer.workers) == (7, 3)
    assert "trainer.workers: 7 -> 3 (cluster profile)" in notes


def test_a_size_that_was_changed_since_it_was_chosen_counts_as_given():
    begun, _ = resolve(config(), {"GPU": 8, "CPU": 64}, 4)
    stored = yaml.safe_load(dump_config(begun))
    assert resolve(load_config(stored, ["trainer.workers=2"]), {"GPU": 4, "CPU": 64}, 4)[0].trainer.workers == 2
    with pytest.raises(ConfigError, match=r"use trainer\.workers=3"):
        resolve(load_config(stored, ["trainer.workers=4"]), {"GPU": 4, "CPU": 64}, 4)


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (
            ["trainer.workers=8"],
            8,
            ["9 GPUs (8 ranks, 1 live policy)", "Ray has 8", "trainer.workers=7 or serve.enabled=false or"],
        ),
        (
            ["trainer.workers=8", "reference.where=workers", "serve.enabled=false"],
            8,
            ["9 GPUs (8 ranks, 1 reference)", "trainer.workers=7 or reference.where=trainer"],
        ),
        (
            [
                "fleet.generators.engine.tensor_parallel_size=2",
                "fleet.generators.max_replicas=4",
                *ONLINE,
                "fleet.placement=split",
            ],
            8,
            ["fleet.generators.max_replicas=1"],
        ),
        (["fleet.generators.engine.tensor_parallel_size=2"], 1, ["tensor_parallel_size=1"]),
        ([*ONLINE, "serve.gates.smoke=hi", "fleet.generators.num_gpus=0.5"], 1, ["Ray has 1 GPU:", "; use "]),
        (
            ["evaluate.every=round", "evaluate.prompts=q", "serve.follow=round", "fleet.placement=shared"],
            8,
            ["serve.follow=round", "fleet.placement=split"],
        ),
        (["fleet.placement=shared", "serve.gates.smoke=hi"], 8, ["probing serve.gates", "fleet.placement=split"]),
    ],
)
def test_what_cannot_fit_is_refused_in_one_message_that_says_what_is_enough(overrides, gpus, words):
    with pytest.raises(ConfigError) as error:
        resolve(config(*overrides), {"GPU": gpus, "CPU": 64}, 4)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_cluster_without_gpus_is_refused():
    with pytest.raises(ConfigError, match="profile='cluster' needs GPUs, and Ray has none; use profile=laptop"):
        resolve(config("profile=cluster"), {"CPU": 16}, 4)


def test_what_a_message_advises_is_enough():
    for change in ("trainer.workers=7", "serve.enabled=false", "fleet.placement=shared"):
        resolve(config("trainer.workers=8", change), {"GPU": 8, "CPU": 64}, 4)


def test_an_engine_is_on_one_node_where_one_has_room_and_its_workers_on_different_gpus():
    parallel = "fleet.generators.engine.tensor_parallel_size=4"
    plan, _ = plan_for(config(parallel), nodes(16, each=8))
    assert plan.group("ranks").most == 12 and "GPUs of one node" in plan.table()
    plan, _ = plan_for(config(parallel), nodes(8, each=2))
    assert plan.group("ranks").most == 4 and "GPUs of several nodes" in plan.table()


def test_what_fits_in_total_and_on_no_node_is_refused():
    with pytest.raises(ConfigError, match="on 3 nodes: no room for"):
        plan_for(config("trainer.num_gpus=2", "trainer.workers=4"), nodes(9, each=3))


def test_gpus_are_not_used_by_turns_on_nodes_of_which_ray_would_overload_the_smaller():
    uneven = Cluster((Node(8, 64, head=True), Node(4, 64)))
    with pytest.raises(ConfigError, match="shared does not go with nodes of 4 and 8 GPUs; use fleet.placement=split"):
        plan_for(config("fleet.placement=shared"), uneven)
    with pytest.raises(ConfigError, match="no room for"):
        plan_for(config("fleet.generators.engine.tensor_parallel_size=12"), uneven)
    assert plan_for(config("fleet.placement=shared"), nodes(16))[0].group("ranks").most == 16


def test_nodes_with_few_cpus_keep_no_gpu_idle():
    plan, _ = plan_for(config(), nodes(8, cpus=4))
    assert plan.group("ranks").most == 7 and sum(group.cpus * group.kept for group in plan.groups) <= 4


HEAD = Node(0, 4, id="head", head=True)


def test_a_cluster_whose_gpus_may_still_come_is_no_laptop_and_what_is_missing_is_said():
    cluster = Cluster((HEAD,), (Growth(Node(8, 64), 2),))
    plan, _ = plan_for(config(), cluster)
    assert (plan.config.profile, plan.group("ranks").most) == ("cluster", 15)
    assert plan.missing(cluster) == "ranks (15 of 15), live policy (1 of 1), which need 16 GPUs, 16 CPUs"
    half = Cluster((HEAD, Node(8, 64)), (Growth(Node(8, 64), 1),))
    assert plan.missing(half) == "ranks (7 of 15), live policy (1 of 1), which need 8 GPUs, 8 CPUs"
    assert plan.missing(Cluster((HEAD, Node(8, 64), Node(8, 64)))) is None


def test_a_start_uses_the_gpus_that_are_there_and_waits_only_for_sizes_that_are_given():
    cluster = Cluster((HEAD, Node(8, 64)), (Growth(Node(8, 64), 3),))
    assert plan_for(config(), cluster)[0].group("ranks").most == 7
    assert plan_for(config("trainer.workers=20"), cluster)[0].missing(cluster) is not None
    with pytest.raises(ConfigError, match="Ray has 32 GPUs on 5 nodes"):
        plan_for(config("trainer.workers=40"), cluster)


def test_where_it_is_not_known_what_may_come_sizes_are_to_be_given():
    cluster = Cluster((HEAD,), (Growth(Node(), None),))
    with pytest.raises(ConfigError, match=r"^trainer\.workers: .*profile=laptop"):
        plan_for(config(), cluster)
    plan, _ = plan_for(config("trainer.workers=6"), cluster)
    assert plan.config.profile == "cluster" and plan.missing(cluster) is not None
    assert plan_for(config("profile=laptop"), cluster)[0].missing(cluster) is None
    there = Cluster((HEAD, Node(8, 64)), (Growth(Node(), None),))
    assert plan_for(config(), there)[0].group("ranks").most == 7


def test_a_cluster_of_cpus_that_may_get_more_of_them_is_a_laptop():
    assert plan_for(config(), Cluster((HEAD,), (Growth(Node(0, 16), 3),)))[0].config.profile == "laptop"


GIB = 1 << 30


def memory(weights: int, rank: int) -> ModelMemory:
    return ModelMemory(weights, 131_072, lambda sized: RankMemory(rank, 0))


def test_one_gpu_has_rank_and_engine_side_by_side_or_by_turns_or_is_too_small():
    cluster = Cluster((Node(1, 16, gpu_memory=24 * GIB, head=True),), cores=4)
    asked = config("data.max_length=1024")
    beside = placement(asked, cluster, memory(2 * GIB, 8 * GIB)).config.fleet
    turns = placement(asked, cluster, memory(2 * GIB, 20 * GIB)).config.fleet
    assert (beside.placement, turns.placement) == ("split", "shared")
    parts = [each.generators.engine["gpu_memory_utilization"] for each in (beside, turns)]
    assert parts == [0.63, 0.9]
    with pytest.raises(ConfigError, match=r"does not fit on a GPU here: a rank lacks .* GiB; use trainer\.offload"):
        placement(asked, cluster, memory(2 * GIB, 30 * GIB))


def test_heavy_work_stays_off_the_head_and_on_nodes_with_the_memory_for_it():
    small = Node(0, 8, 2 * GIB, id="small")
    with pytest.raises(ConfigError, match="GiB of memory on a node that is not the head"):
        placement(config(), Cluster((Node(0, 8, 99 * GIB, head=True), small)), memory(16 * GIB, 0))
    large = Node(0, 8, 99 * GIB, id="large")
    plan = placement(config(), Cluster((Node(0, 8, 2 * GIB, head=True), small, large)), memory(16 * GIB, 0))
    assert plan.group("base publish").memory > 32 * GIB and plan.group("base publish").avoids_head


def test_ranks_that_end_with_a_round_leave_their_gpus_to_generators():
    sizes = "trainer.workers=7", "fleet.generators.max_replicas=7", "fleet.generators.min_replicas=0"
    assert plan_for(config(*ONLINE, *sizes, "trainer.lifetime=round"), nodes(8))
    with pytest.raises(ConfigError, match="no room for"):
        plan_for(config(*ONLINE, *sizes), nodes(8))


def test_a_run_can_be_served_where_it_could_not_be_trained():
    begun, _ = plan_for(config("trainer.workers=7"), nodes(8))
    plan = serving_plan(begun.config, nodes(1))
    assert plan.group("ranks") is None and plan.group("policy").kept == 1
    assert serving_plan(config(), nodes(0)).group("policy").gpus == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_fits_a_terminal_and_says_what_is_left_over(kind):
    for gpus in (0, 1, 2, 8, 64):
        try:
            plan, _ = plan_for(config(*KINDS[kind]), nodes(gpus), memory(16 * GIB, 26 * GIB))
        except ConfigError:
            assert (kind, gpus) == ("two GPUs", 1)
            continue
        text = "\n".join(map(comment, plan_lines(plan)))
        assert all(len(line) <= 80 and line.startswith("#") for line in text.splitlines()), text
        assert "# left over" in text


def test_the_plan_of_eight_gpus_reads_as_a_table():
    plan, _ = plan_for(config(), nodes(8), memory(16 * GIB, 26 * GIB))
    lines = plan.table().splitlines()
    assert lines[0].split() == ["actors", "count", "GPUs", "CPUs", "memory", "where"]
    assert lines[1] == "ranks           7      1     1               a GPU each, 26.0 GiB of it"
    assert lines[2] == "live policy     1      1     1               a GPU each"
    assert lines[-1].split() == ["left", "over", "0", "55.2"]
