// The conversation: one version, or two side by side with a vote.

import { announce, button, byId, el, setText } from "./dom.js";
import { Answer } from "./answer.js";
import { better, judge, tie } from "./feedback.js";

const VOTES = [
  ["A is better", (a, b) => better(a, b), 0],
  ["Tie", (a, b) => tie(a, b), null],
  ["Both bad", (a, b) => tie(a, b, "both bad"), null],
  ["B is better", (a, b) => better(b, a), 1],
];

export class Chat {
  constructor() {
    this.turns = [];
    this.models = [];
    this.stopping = null;
    this.field = byId("message");
    this.scroll = byId("scroll");
    byId("composer").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.field.addEventListener("input", () => this.fit());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.stop();
    });
    byId("stop").addEventListener("click", () => { this.stop(); this.field.focus(); });
    byId("fresh").addEventListener("click", () => this.clear());
    for (const id of ["compare", "blind"]) byId(id).addEventListener("change", () => this.drawPickers());
    new ResizeObserver(() => this.follow()).observe(byId("turns"));
    this.scroll.addEventListener("scroll", () => {
      this.atEnd = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 48;
    });
    this.atEnd = true;
    this.offer([{ id: "policy", label: "Live" }]);
    this.drawEmpty();
  }

  get comparing() { return byId("compare").checked; }
  get blind() { return this.comparing && byId("blind").checked; }

  // The models to choose from: [{id, label}], the live policy first.
  offer(models) {
    if (JSON.stringify(models) === JSON.stringify(this.models)) return;
    const alone = this.models.length < 2;
    this.models = models;
    for (const id of ["model-a", "model-b"]) {
      const select = byId(id);
      const before = select.value;
      select.replaceChildren(...models.map((model) => el("option", { value: model.id }, model.label)));
      select.value = models.some((model) => model.id === before) ? before : models[0].id;
    }
    if (alone && models.length > 1) byId("model-b").value = models[1].id;
    this.drawPickers();
  }

  choose(model) {
    byId("model-a").value = model;
    this.field.focus();
  }

  drawPickers() {
    setText(byId("label-a"), this.comparing ? "Version A" : "Version");
    if (this.blind) setText(byId("label-a"), "One");
    setText(byId("pick-b").firstElementChild, this.blind ? "Other" : "Version B");
    byId("pick-b").hidden = byId("blind-switch").hidden = !this.comparing;
    const alone = this.comparing && this.models.length < 2;
    const notes = [
      alone && "Only the live policy is served, so both answers come from it. Pin a version to compare it.",
      this.blind && "The two sides are shuffled for each message. Their versions are hidden until you vote.",
    ].filter(Boolean);
    byId("pick-note").hidden = !notes.length;
    setText(byId("pick-note"), notes.join(" "));
  }

  drawEmpty() {
    byId("empty").hidden = this.turns.length > 0;
    byId("fresh").disabled = this.turns.length === 0;
    byId("empty").replaceChildren(
      el("p", { class: "lead" }, "Chat with the policy while it is trained"),
      el("p", {}, "Each answer shows the version of the weights that wrote it, and its number of tokens. ",
        "Turn on “Compare two” to see two versions side by side and vote for the better one."));
  }

  clear() {
    this.stop();
    this.turns = [];
    byId("turns").replaceChildren();
    this.drawEmpty();
    this.field.focus();
    announce("New chat");
  }

  stop() { this.stopping?.abort(); }

  fit() {
    this.field.rows = Math.min(8, Math.max(1, this.field.value.split("\n").length));
  }

  follow() {
    if (this.atEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  settings() {
    const number = (id) => (byId(id).value.trim() === "" ? undefined : Number(byId(id).value));
    return { temperature: number("temperature"), max_tokens: number("max-tokens") };
  }

  // The conversation so far as messages, without turns that have no answer.
  history() {
    const system = byId("system").value.trim();
    const messages = this.turns.filter((turn) => turn.answers[turn.choice].text).flatMap((turn) => [
      { role: "user", content: turn.text },
      { role: "assistant", content: turn.answers[turn.choice].text },
    ]);
    return [...(system ? [{ role: "system", content: system }] : []), ...messages];
  }

  send() {
    const text = this.field.value;
    if (this.stopping || !text.trim()) return;
    for (const id of ["temperature", "max-tokens"]) {
      if (!byId(id).checkValidity()) {
        byId("settings").open = true;
        byId(id).reportValidity();
        return;
      }
    }
    const request = { messages: [...this.history(), { role: "user", content: text }], ...this.settings() };
    const models = [byId("model-a").value];
    if (this.comparing) models.push(byId("model-b").value);
    if (this.blind && Math.random() < 0.5) models.reverse();
    const turn = this.addTurn(text, request, models);
    this.turns.push(turn);
    byId("turns").append(turn.node);
    this.field.value = "";
    this.fit();
    this.drawEmpty();
    this.atEnd = true;
    this.follow();
    this.run(turn.answers);
  }

  addTurn(text, request, models) {
    const turn = { text, choice: 0, blind: this.blind, voted: false };
    const single = models.length === 1;
    const onend = () => this.drawVote(turn);
    turn.answers = models.map((model, at) => new Answer({ model, name: "AB"[at], request, hidden: turn.blind, single, onend }));
    for (const answer of turn.answers) answer.again = () => { if (!this.stopping) this.run([answer]); };
    turn.vote = el("div", { class: "vote", hidden: true });
    turn.node = el("li", { class: single ? "turn" : "turn double" },
      el("div", { class: "user" }, el("span", { class: "hidden" }, "You: "), el("div", { class: "text", dir: "auto" }, text)),
      el("div", { class: "answers" }, turn.answers.map((answer) => answer.node)), turn.vote);
    return turn;
  }

  async run(answers) {
    this.stopping = new AbortController();
    byId("send").hidden = true;
    byId("stop").hidden = false;
    announce("Waiting for the answer");
    try {
      await Promise.all(answers.map((answer) => answer.run(this.stopping.signal)));
    } finally {
      this.stopping = null;
      // Keeps the keyboard focus in place: Send appears where Stop was.
      const focused = document.activeElement === byId("stop");
      byId("send").hidden = false;
      byId("stop").hidden = true;
      if (focused) byId("send").focus();
    }
  }

  drawVote(turn) {
    const [a, b] = turn.answers;
    if (!b || turn.voted || a.busy || b.busy) return;
    turn.vote.hidden = false;
    if (!a.complete || !b.complete) {
      turn.vote.replaceChildren(el("p", { class: "note" }, "Only two complete answers can be compared."));
      return;
    }
    const status = el("p", { class: "status", role: "status" });
    const buttons = VOTES.map(([label, judgement, choice]) => button(label, () => this.vote(turn, label, judgement(a, b), choice, status)));
    const choices = el("fieldset", { class: "choices" }, el("legend", { class: "hidden" }, "Which answer is better?"), buttons);
    turn.vote.replaceChildren(choices, status);
  }

  async vote(turn, label, judgement, choice, status) {
    const choices = turn.vote.querySelector("fieldset");
    choices.disabled = true;
    const result = await judge(judgement);
    choices.disabled = false;
    if (!result.final) {
      setText(status, result.text);
      return;
    }
    turn.voted = true;
    for (const answer of turn.answers) answer.reveal();
    if (choice !== null && turn === this.turns.at(-1)) turn.choice = choice;
    if (choice !== null) turn.answers[choice].node.classList.add("preferred");
    if (!result.stored) {
      setText(status, result.text);
      return;
    }
    const next = `The chat goes on with answer ${"AB"[turn.choice]}.`;
    turn.vote.replaceChildren(el("p", { class: "status" }, el("b", {}, label), ` · ${result.text} ${next}`));
    announce(`${label}. ${result.text} ${next}`);
    this.field.focus();
  }
}
