"""Configuration: one clear message for each mistake, before anything starts."""

import inspect
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from sampo_ray.config.losses import ADVICE, LOSSES, advice
from sampo_ray.config.profiles import resolve
from sampo_ray.config.run import RunConfig, load_config
from sampo_ray.errors import ConfigError
from sampo_ray.loop.validate import check_fit
from sampo_ray.run.directory import dump_config

MINIMAL = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"dir": "r"}}
ONLINE = ["rounds.mode=online", "data.prompts=p", "reward.function=f.py:f"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rat=1", ["optim.learning_rat", "did you mean 'learning_rate'"]),
        ("model.lora.rnk=1", ["model.lora.rnk", "did you mean 'rank'"]),
        ("optimm.learning_rate=1", ["optimm", "did you mean 'optim'"]),
        ("method.beta=-1", ["method.beta", "greater than 0", "-1"]),
        ("method.loss=sigmoit", ["method.loss='sigmoit'", "did you mean 'sigmoid'"]),
        ("method.loss=dpo", ["method.loss='dpo'", "use method.loss=sigmoid method.reduction=sum"]),
        ("method.loss=KTO", ["method.loss='KTO'", "use method.loss=kto_pair method.reduction=sum"]),
        ("method.loss=LD-DPO", ["method.loss='LD-DPO'", "method.reduction=ld"]),
        ("method.loss=SimPO", ["method.loss='SimPO'", "did you mean 'simpo'?"]),
        ("method.loss=aot", ["method.loss='aot'", "sorts a batch"]),
        ("method.loss=apo_zero", ["method.loss='apo_zero'", "a loss of your own"]),
        ("method.loss=[sigmoid,sft]", ["method.loss: input should be a valid string"]),
        ("model.lora.targets=q_proj", ["'all-linear' or a list, as in model.lora.targets=[q_proj] (got 'q_proj')"]),
        ("model.lora.targets=[1]", ["model.lora.targets.0: input should be a valid string (got 1)"]),
        ("model.lora=true", ["model.lora: is a section (got True); set its fields, as in model.lora.rank=..."]),
        ("trainer.gradient_checkpointing=some", ["input should be a valid boolean or 'selective' (got 'some')"]),
        ("run.trackers=wandb", ["run.trackers: input should be a list, as in run.trackers=[wandb] (got 'wandb')"]),
        ("optim.betas=[0.9]", ["optim.betas: more values are needed (got [0.9])"]),
        ("method.reduction=median", ["method.reduction='median'", "did you mean 'mean'"]),
        ("method.loss=tdpo trainer.zero_stage=3", ["method.loss='tdpo'", "use trainer.zero_stage=2"]),
        ("method.loss=tdpo reference.where=trainer", ["method.loss='tdpo'", "drop reference.where"]),
        ("method.reduction=sum method.mask=independent", ["method.mask='independent'", "sample"]),
        ("method.reduction=sum reference.positions=sampled", ["reference.positions=sampled", "positions=all"]),
        ("data.max_length=100 data.max_prompt_length=100", ["max_prompt_length=100", "max_length=100", "smaller"]),
        ("trainer.workers=2 trainer.min_workers=4", ["min_workers=4", "workers=2", "smaller"]),
        ("trainer.tokens_per_row=8192", ["trainer.tokens_per_row=8192", "data.max_length=8192", "16384"]),
        ("data.train=null", ["data.train is missing"]),
        ("rounds.mode=online", ["data.prompts is missing"]),
        ("data.train=[]", ["data.train is missing"]),
        ("data.train=3", ["data.train: input should be a valid string or a list", "(got 3)"]),
        ("data.train=[a,b,a]", ["data.train names 'a' twice", "once"]),
        ("data.train=[a,'']", ["data.train=['a', '']", "empty name"]),
        ("data.mix=[0.5,0.5]", ["data.mix=[0.5, 0.5]", "data.train, which has 1;", "data.mix=[1.0]"]),
        ("data.columns=[{},{}]", ["data.columns has 2 entries and data.train 1 names"]),
        ("data.train=[a,b] data.mix=[1.5,1]", ["data.mix.0", "less than or equal to 1", "1.5"]),
        ("data.train=[a,b] data.mix=[0,1]", ["data.mix.0", "greater than 0"]),
        ("serve.tokens_per_minute=0", ["serve.tokens_per_minute", "greater than or equal to 1"]),
        ("publish.transport=nccl", ["publish.transport", "'host', 'ipc' or 'broadcast'", "'nccl'"]),
        ("rounds.count=many", ["rounds.count", "'many'"]),
        ("trainer.zero_stage=1", ["trainer.zero_stage", "1"]),
        ("rounds", ["section.field=value"]),
        ("model.path.x=1", ["model.path", "not a section"]),
    ],
)
def test_a_mistake_is_named_with_its_field_value_and_mend(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(MINIMAL, override.split())
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1, "one mistake, one line"


def test_a_key_is_not_quoted():
    with pytest.raises(
        ConfigError, match=r"serve.api_keys: input should be a list, as in serve.api_keys=\[\.\.\.\]"
    ) as error:
        load_config(MINIMAL, ["serve.api_keys=long-secret"])
    assert "secret" not in str(error.value)


def test_the_names_that_losses_have_in_trl_are_known_or_lead_to_what_to_use():
    trl = pytest.importorskip("trl")
    names = set(re.findall(r"loss_type == \"(\w+)\"", inspect.getsource(trl.DPOTrainer)))
    assert names >= {"sigmoid", "ipo", "aot", "discopop"}
    assert not [name for name in names - {*LOSSES} if "known are" in advice(name) or "did you mean" in advice(name)]


@pytest.mark.parametrize(
    "settings", [text for text in ADVICE.values() if text.startswith("use ") and " or " not in text]
)
def test_what_is_advised_for_a_losss_other_name_can_be_configured(settings):
    overrides = [each.strip(",").replace("=...", "=0.5") for each in settings.split() if "=" in each]
    extra = ["rounds.mode=online", "data.prompts=p", "reward.function=f.py:f"] if "online" in settings else []
    load_config(MINIMAL, [*extra, *overrides])


def test_an_online_run_needs_a_reward_source():
    with pytest.raises(ConfigError, match=r"reward\.function, reward\.model or reward\.judge is missing"):
        load_config(MINIMAL, ONLINE[:2])


def test_a_recipe_that_is_not_there_or_not_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)


def test_keys_come_from_the_environment_and_are_not_written(monkeypatch):
    monkeypatch.setenv("SAMPO_API_KEYS", "key-1,key-2")
    config = load_config(MINIMAL)
    assert [key.get_secret_value() for key in config.serve.api_keys] == ["key-1", "key-2"]
    assert "key-1" not in dump_config(config) and "key-1" not in repr(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["serve.host=127.0.0.2"],
        ["serve.host=::1"],
        ["serve.host=localhost"],
        ["serve.host=::ffff:127.0.0.1"],
        ["serve.host=0.0.0.0", "serve.keys_file=keys.yaml"],
        ["serve.host=0.0.0.0", "serve.api_keys=[long-secret]"],
        ["serve.host=0.0.0.0", "serve.open=true"],
        ["serve.host=0.0.0.0", "serve.enabled=false"],
    ],
)
def test_an_endpoint_binds_to_loopback_or_has_keys_or_is_open_by_order(monkeypatch, overrides):
    monkeypatch.delenv("SAMPO_API_KEYS", raising=False)
    load_config(MINIMAL, overrides).serve.check_keyed()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.2", "::ffff:192.0.2.2", "gpu-box", "localhost.example"])
def test_an_open_address_without_keys_is_refused_where_a_run_starts(monkeypatch, host):
    monkeypatch.delenv("SAMPO_API_KEYS", raising=False)
    with pytest.raises(ConfigError) as error:
        load_config({**MINIMAL, "serve": {"host": host}}).serve.check_keyed()
    for word in (f"serve.host={host!r}", "SAMPO_API_KEYS", "serve.keys_file", "serve.open=true"):
        assert word in str(error.value)


@given(
    st.fixed_dictionaries(
        {
            "optim.batch_size": st.integers(1, 512),
            "method.beta": st.floats(1e-4, 10),
            "rounds.count": st.integers(1, 9),
            "data.max_length": st.integers(16, 9000),
            "method.reduction": st.sampled_from(["sum", "average", "sample", "top_k"]),
        }
    )
)
def test_what_is_written_reads_back_as_the_same(values):
    config = load_config(MINIMAL, [f"{key}={value}" for key, value in values.items()])
    assert load_config(yaml.safe_load(dump_config(config))) == config


@given(st.text(), st.text(min_size=1), st.sampled_from(sorted(LOSSES)), st.floats(0, exclude_min=True))
def test_any_text_and_number_reads_back_as_it_was(path, smoke, loss, norm):
    tree = {"model": {"path": path}, "data": {"train": f"{path}x"}, "run": {"dir": path}}
    tree |= {"method": {"loss": loss}, "optim": {"max_grad_norm": norm}, "serve": {"gates": {"smoke": smoke}}}
    config = load_config(tree)
    assert load_config(yaml.safe_load(dump_config(config))) == config


serving = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "host": st.sampled_from(["127.0.0.1", "0.0.0.0", "::", "gpu-box"]),
        "port": st.integers(0, 65535),
        "api_keys": st.lists(st.text(min_size=1, max_size=5), max_size=2),
        "keys_file": st.none() | st.just("keys.yaml"),
        "open": st.booleans(),
        "start_timeout_s": st.floats(0),
        "follow": st.sampled_from(["latest", "round", "manual"]),
        "gates": st.fixed_dictionaries({}, optional={"finite": st.booleans(), "max_growth": st.none() | st.just(1.5)}),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(serving, st.sampled_from(["", "key-1"]), st.sampled_from(["", "key-2"]))
def test_a_run_directory_always_loads_and_says_that_its_keys_are_to_be_given_again(monkeypatch, serve, before, after):
    monkeypatch.setenv("SAMPO_API_KEYS", before)
    config = load_config({**MINIMAL, "serve": serve})
    written = yaml.safe_load(dump_config(config))
    monkeypatch.setenv("SAMPO_API_KEYS", after)
    again = load_config(written)
    keyed_before, there_now = bool(config.serve.api_keys), again.serve.api_keys
    assert there_now == ((SecretStr(after),) if after else None if keyed_before else ())
    without = config.serve.model_copy(update={"api_keys": there_now})
    assert again == config.model_copy(update={"serve": without})
    given_again = bool(after) or again.serve.keys_file is not None or not again.serve.enabled
    if keyed_before and not given_again:
        with pytest.raises(ConfigError, match=r"begun with keys.*SAMPO_API_KEYS.*serve\.keys_file.*api_keys=\[\]"):
            again.serve.check_keyed()
        assert load_config(written, ["serve.api_keys=[]"]).serve.api_keys == ()


def config(*overrides: str) -> RunConfig:
    return load_config(MINIMAL, list(overrides))


def test_without_gpus_auto_is_a_laptop_and_a_recipe_for_gpus_runs_smaller():
    sizes = "trainer.workers=8", "trainer.min_workers=4", "trainer.num_cpus=2", "fleet.generators.max_replicas=4"
    resolved, notes = resolve(config(*sizes), {"CPU": 16}, cores=2)
    assert resolved.profile == "laptop"
    assert (resolved.trainer.min_workers, resolved.trainer.num_cpus) == (2, 2.0)
    assert (resolved.trainer.workers, resolved.fleet.generators.max_replicas) == (2, 2)
    assert resolved.trainer.num_gpus == resolved.fleet.generators.num_gpus == 0
    assert any("trainer.workers: 8 -> 2" in note for note in notes)


def test_a_laptop_asked_for_by_name_is_as_large_as_asked():
    resolved, notes = resolve(config("profile=laptop", "trainer.workers=4"), {"CPU": 4}, cores=2)
    assert resolved.trainer.workers == 4 and not notes


def test_gpus_that_are_asked_for_are_given_or_it_is_said():
    asked = "fleet.generators.num_gpus=0.4", "trainer.num_gpus=0.25"
    for gpus, profile in ((1, "laptop"), (8, "cluster")):
        resolved, notes = resolve(config(*asked), {"GPU": gpus}, cores=2)
        assert resolved.profile == profile and not any("num_gpus" in note for note in notes)
        assert (resolved.fleet.generators.num_gpus, resolved.trainer.num_gpus) == (0.4, 0.25)
    resolved, notes = resolve(config(*asked), {"CPU": 16}, cores=2)
    assert resolved.fleet.generators.num_gpus == resolved.trainer.num_gpus == 0
    assert {
        "trainer.num_gpus: 0.25 -> 0 (laptop profile)",
        "fleet.generators.num_gpus: 0.4 -> 0 (laptop profile)",
    } <= set(notes)


def test_a_run_that_ray_has_no_room_for_is_refused():
    with pytest.raises(ConfigError, match=r"3\.8 CPUs, Ray has 3\.5 CPUs: no room for .*use trainer\.workers=1 or"):
        resolve(config("profile=laptop", "trainer.workers=4"), {"CPU": 3.5}, cores=2)


@given(st.integers(1, 64), st.booleans(), st.booleans(), st.sampled_from([8, 64, 128]))
def test_gpus_are_never_promised_twice(gpus, online, serving, batch):
    overrides = [f"optim.batch_size={batch}", f"serve.enabled={serving}", *(ONLINE if online else [])]
    resolved, _ = resolve(config(*overrides), {"GPU": gpus}, cores=8)
    trainer, fleet = resolved.trainer, resolved.fleet
    asked = trainer.workers * trainer.num_gpus + resolved.reference_workers * fleet.references.num_gpus
    if resolved.profile == "cluster" and online:
        asked += fleet.generators.max_replicas * fleet.generators.num_gpus + (1 if serving else 0)
    elif online or serving:  # one deployment for rollouts and endpoint
        asked += fleet.generators.max_replicas * fleet.generators.num_gpus
    assert asked <= gpus + 1e-9
    assert gpus < 4 or asked == gpus, "every GPU is used"


def test_a_loss_without_a_reference_leaves_the_gpu_of_a_worker_to_the_trainer():
    def workers(name: str) -> int:
        where = ["reference.where=workers"] if LOSSES[name].reference == "log-probs" else []
        return resolve(config(f"method.loss={name}", *where), {"GPU": 5}, cores=8)[0].trainer.workers

    assert [workers(name) for name in LOSSES] == [3 if loss.reference == "log-probs" else 4 for loss in LOSSES.values()]


@pytest.mark.parametrize(
    ("transport", "gpus", "words"),
    [
        ("ipc", 0, ["publish.transport='ipc'", "a rank has 0 and a replica 0", "publish.transport=host"]),
        ("ipc", 8, ["publish.transport='ipc'", "a rank has 1 and a replica 1", "publish.transport=broadcast"]),
        (
            "broadcast",
            1,
            ["publish.transport='broadcast'", "a rank has 0.5 and a replica 0.2", "publish.transport=ipc"],
        ),
    ],
)
def test_a_transport_that_cannot_work_where_things_run_is_refused(transport, gpus, words):
    with pytest.raises(ConfigError) as error:
        resolve(config(f"publish.transport={transport}"), {"GPU": gpus}, cores=8)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("transport", "gpus"), [("host", 0), ("host", 8), ("broadcast", 0), ("broadcast", 8), ("ipc", 1)]
)
def test_a_transport_that_can_work_is_taken(transport, gpus):
    resolved, _ = resolve(config(f"publish.transport={transport}"), {"GPU": gpus}, cores=8)
    assert resolved.publish.transport == transport


def test_a_cluster_of_too_few_gpus_takes_turns_on_them_or_is_refused_with_what_works():
    assert resolve(config("profile=cluster"), {"GPU": 1}, cores=8)[0].fleet.placement == "shared"
    with pytest.raises(ConfigError, match="2 GPUs .1 rank, 1 live policy., Ray has 1 GPU: .* fleet.placement=shared"):
        resolve(config("profile=cluster", "fleet.placement=split"), {"GPU": 1}, cores=8)


def test_flex_attention_is_for_gpus():
    asked = config("model.attention=flex")
    with pytest.raises(ConfigError, match="model.attention='flex' needs GPUs.*use model.attention=segments"):
        check_fit(resolve(asked, {"CPU": 8}, cores=8)[0])
    check_fit(resolve(asked, {"GPU": 8}, cores=8)[0])
