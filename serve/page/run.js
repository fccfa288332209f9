// The panel that shows the run.

import { Chart } from "./chart.js";
import { el, seconds, setText } from "./dom.js";
import { Scatter } from "./scatter.js";

const STAGES = {
  tokenize: "Tokenizing the data",
  prompts: "Choosing prompts",
  completions: "Sampling completions",
  scores: "Scoring",
  candidates: "Pairing",
  pairs: "Ordering pairs",
  reference: "Reference log-probs",
  train: "Training",
  "probe prompts": "Holding out probe prompts",
  base_answers: "Probing the base",
  base_scores: "Scoring its answers",
  answers: "Probing the new version",
  probe_scores: "Scoring its answers",
  probe: "Deciding",
};
const named = (stage) => STAGES[stage] ?? stage;
const fixed = (digits, sign = "") => (value) => `${sign && value > 0 ? sign : ""}${value.toFixed(digits)}`;
const percent = (value) => `${Math.round(value * 100)}%`;

export class RunPanel {
  constructor(node) {
    this.chip = el("span", { class: "chip" });
    this.round = el("b", {});
    this.about = el("p", { class: "note" });
    this.stage = el("span", {});
    this.amount = el("span", { class: "meta" });
    this.bar = el("progress", { "aria-label": "Progress of the stage" });
    this.now = el("div", { class: "now" }, el("div", { class: "row" }, this.stage, this.amount), this.bar);
    this.trail = el("ol", { class: "trail", "aria-label": "Stages of this round that are done" });
    this.charts = {
      loss: new Chart("Loss", "step ", [{ format: fixed(4) }], { wide: true }),
      margin: new Chart("Reward margin", "step ", [{ format: fixed(3, "+") }]),
      accuracy: new Chart("Accuracy", "step ", [{ format: percent }]),
      length: new Chart("Tokens", "step ", [{ label: "chosen", format: fixed(1) }, { label: "rejected", format: fixed(1) }]),
    };
    const tokens = { label: "tokens", format: fixed(1) };
    this.plots = {
      rate: new Scatter("Win rate against the base, over mean tokens", tokens, { label: "win rate", format: percent }),
      reward: new Scatter("Reward over length", { label: "tokens", format: fixed(0) }, { label: "reward", format: fixed(2) }),
    };
    this.blank = el("p", { class: "blank" });
    this.past = el("tbody", {});
    this.before = el("details", { class: "before" }, el("summary", {}, "Rounds"),
      el("table", {}, el("thead", {}, el("tr", {}, ["Round", "Versions", "Steps", "Time"].map((name) => el("th", { scope: "col" }, name)))), this.past));
    node.replaceChildren(el("div", { class: "row" }, this.round, this.chip), this.about, this.now, this.trail,
      el("div", { class: "charts" }, [...Object.values(this.charts), ...Object.values(this.plots)].map((chart) => chart.node)), this.blank, this.before);
  }

  draw(view) {
    const state = view.alive ? ["Running", "good"] : view.finished ? ["Finished", "plain"] : ["Not running", "warn"];
    setText(this.chip, state[0]);
    this.chip.className = `chip ${state[1]}`;
    setText(this.round, view.round ? `Round ${view.round}${view.rounds ? ` of ${view.rounds}` : ""}` : "Before the first round");
    setText(this.about, [view.run, view.base, view.method].filter(Boolean).join(" · "));
    this.drawStage(view.stage);
    const round = view.history.find((each) => each.round === view.round);
    const done = (round?.stages ?? []).map((each) => `${named(each.name)} ${each.seconds == null ? "" : seconds(each.seconds)}`);
    this.trail.hidden = !view.alive || done.length === 0;
    if (this.trail.children.length !== done.length) this.trail.replaceChildren(...done.map(() => el("li", {})));
    done.forEach((text, at) => setText(this.trail.children[at], text));
    const { steps } = view;
    this.charts.loss.draw(steps.version, [steps.loss]);
    this.charts.margin.draw(steps.version, [steps.margin]);
    this.charts.accuracy.draw(steps.version, [steps.accuracy]);
    this.charts.length.draw(steps.version, [steps.chosen_tokens, steps.rejected_tokens]);
    this.blank.hidden = steps.version.length > 0;
    setText(this.blank, view.alive ? "The curves begin with the first training step." : "There are no training steps to show.");
    this.drawProbes(view.probes ?? []);
    this.drawPast(view.history);
  }

  // What versions answered to the probe prompts: a point a version, and the last one's answers.
  drawProbes(probes) {
    const rated = probes.map(({ label, scores }) => ({ name: label, ...(scores.win_rate_base ?? { value: 0.5 }), x: scores.mean_tokens?.value }));
    const shown = rated.map(({ value, ...point }) => ({ ...point, y: value }));
    const last = shown.at(-1);
    this.plots.rate.draw(shown.length > 1 && probes.at(-1).scores.win_rate_base ? shown : [],
      { joined: true, level: 0.5, said: last ? `${last.name}: ${percent(last.y)}, ${fixed(1)(last.x)} tokens` : "" });
    const { label, answers = [], scores } = probes.at(-1) ?? {};
    const slope = scores?.reward_slope?.value;
    const through = [scores?.mean_tokens?.value, scores?.mean_reward?.value];
    this.plots.reward.draw(answers.map(([x, y]) => ({ name: label, x, y })),
      slope == null ? {} : { line: { slope, through }, said: `${label}: ${slope.toPrecision(2)} a token` });
  }

  drawStage(stage) {
    this.now.hidden = !stage;
    if (!stage) return;
    setText(this.stage, named(stage.name));
    const count = (value) => value.toLocaleString("en");
    const left = stage.total !== null && stage.rate ? (stage.total - stage.done) / stage.rate : 0;
    const rate = stage.rate && (stage.rate >= 1 ? `${stage.rate >= 10 ? Math.round(stage.rate) : stage.rate.toFixed(1)}/s` : `${seconds(1 / stage.rate)} each`);
    const amount = stage.total === null ? stage.done && `${count(stage.done)} ${stage.unit}` : `${count(stage.done)} of ${count(stage.total)} ${stage.unit}`;
    setText(this.amount, [amount, rate, left >= 1 && `${seconds(left)} left`].filter(Boolean).join(" · "));
    if (stage.total === null) this.bar.removeAttribute("value");
    else {
      this.bar.max = stage.total || 1;
      this.bar.value = stage.done;
    }
  }

  drawPast(history) {
    this.before.hidden = history.length === 0;
    const rows = history.map((each) => [
      `${each.round}`,
      each.steps ? `v${each.start_version} – v${each.start_version + each.steps}` : `from v${each.start_version}`,
      each.steps ? `${each.steps}` : "–",
      `${seconds(each.stages.reduce((sum, stage) => sum + (stage.seconds ?? 0), 0))}${each.committed ? "" : " so far"}`,
    ]);
    if (this.past.children.length !== rows.length) this.past.replaceChildren(...rows.map((row) => el("tr", {}, row.map(() => el("td", {})))));
    rows.forEach((row, at) => row.forEach((text, column) => setText(this.past.children[at].children[column], text)));
  }

  // The run's state in short, for the header.
  static brief(view) {
    if (!view.alive) return view.finished ? "Run finished" : "Run not running";
    const round = view.round ? `Round ${view.round}${view.rounds ? `/${view.rounds}` : ""}` : "";
    const stage = view.stage && `${named(view.stage.name).toLowerCase()}${view.stage.total ? ` ${Math.floor((100 * view.stage.done) / view.stage.total)}%` : ""}`;
    return [round, stage].filter(Boolean).join(", ") || "Run starting";
  }
}
