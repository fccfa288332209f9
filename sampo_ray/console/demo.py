"""The demo on the real stack: one fleet, three runs of one program, a table of what each did to quality and length."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from sampo_ray.config.columns import Columns
from sampo_ray.config.machines import Cluster
from sampo_ray.config.profiles import plan_for
from sampo_ray.config.run import load_config
from sampo_ray.console import session
from sampo_ray.console.demo_task import ROWS, Answers, DemoAssets, make_demo, render, summarise
from sampo_ray.iterate import iterate
from sampo_ray.loop import stages
from sampo_ray.loop.blocks import StageOutput
from sampo_ray.loop.display import Display, open_display
from sampo_ray.loop.fleet import Fleet, open_fleet
from sampo_ray.loop.tokenizing import Tokenizing, tokenize
from sampo_ray.run.directory import Run, create_run
from sampo_ray.run.parts import parts_of
from sampo_ray.sources.source import Source

TEMPERATURE = 1.0


def run_demo(directory: Path, seed: int, keep_serving: bool) -> None:
    """Makes model and data, trains each configuration, and prints how they compare."""
    # Models this small are fastest on one thread; two would wait for each other at every layer.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = (directory / time.strftime("%Y%m%d-%H%M%S")).resolve()
    started = time.monotonic()
    session.quiet_libraries()
    with open_display(Console(file=sys.stdout)) as display, contextlib.ExitStack() as stack:
        stack.enter_context(session.library_output_to(folder / "driver.log"))
        with display.stage("make", None, "model and data"):
            assets = make_demo(folder / "assets", seed)
        cluster = stack.enter_context(session.ray_cluster(display.note))
        runs = {name: demo_run(folder, name, assets, seed, cluster) for name in ROWS}
        with display.stage("start", None, "engines"):
            fleet = stack.enter_context(open_fleet(list(runs.values())[-1], keep_serving, display.note))
        session.announce(display, fleet.endpoint)
        answers: dict[str, Answers] = {}
        expected = [json.loads(line)["answer"] for line in assets.evaluation.read_text().splitlines()]
        for name, run in runs.items():
            if not answers:
                fleet.attach(run)
                answers["base"] = evaluate(fleet, run, 0, assets, display)
            display.heading(f"{name}: {run.place.url}")
            iterate(run, fleet, display)
            answers[name] = evaluate(fleet, run, run.manifest.rounds[-1].end_version, assets, display)
        display.console.print(render(summarise(answers, expected), TEMPERATURE))
        display.note(f"{time.monotonic() - started:.0f} s in all; runs and exported models are in {folder}")
        if keep_serving and fleet.endpoint:
            keyed = run.config.serve.keyed
            session.serve_until_interrupt(display, fleet.endpoint, keyed, "Sort these digits: 7305")


def demo_run(folder: Path, name: str, assets: DemoAssets, seed: int, cluster: Cluster) -> Run:
    """A run directory for one row of the table; what all rows share is here, what they differ in is in ROWS."""
    shared = {
        "model": {"path": str(assets.model)},
        "data": {"train": str(assets.preferences), "prompts": str(assets.prompts), "max_length": 128},
        "reward": {"function": "sampo_ray.console.demo_task:reward"},
        "run": {"dir": str(folder / name.lower().replace(" ", "-")), "seed": seed},
        "serve": {"port": 0},
        "fleet": {"generators": {"max_ongoing_requests": 128}},
        "optim": {"batch_size": 16, "learning_rate": 1e-4},
        "rollout": {"prompts": 256, "samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 72},
        "publish": {"every_steps": 6},
    }
    plan, _ = plan_for(load_config(shared, ROWS[name]), cluster)
    return create_run(plan.config)


def evaluate(fleet: Fleet, run: Run, version: int, assets: DemoAssets, display: Display) -> Answers:
    """One completion of each evaluation prompt from a version of the run's policy."""
    place = run.place.at("evaluation", str(version))
    sources = [Source(str(assets.evaluation), Columns(prompt="prompt"))]
    what = Tokenizing("prompts", sources, run.config.run.seed, run.place.at("tokenizer"), run.config.data)
    with display.stage("tokenize", None, "rows") as progress:
        data = tokenize(what, place.at("prompts"), progress)
    prompts = parts_of(place.at("prompts"), data.rows)
    rollout = run.config.rollout.model_copy(update={"samples": 1, "temperature": TEMPERATURE, "top_p": 1.0})
    window = run.config.fleet.generators.max_ongoing_requests
    with display.stage("evaluate", sum(data.rows), "prompts") as progress:
        out = StageOutput(place, progress.advance)
        parts = stages.sample(fleet.generators, prompts, out, rollout, run.config.run.seed, (run.id, version), window)
    table = pa.concat_tables([part.table() for part in parts])
    return Answers(table["text"].to_pylist(), pc.list_value_length(table["completion"]).to_pylist())
