// One answer: its stream, its text, its version and tokens, and the user's feedback on it.

import { chat, Refused } from "./api.js";
import { announce, button, el, icon, plural, seconds, setText } from "./dom.js";
import { edited, judge, thumb } from "./feedback.js";

const SLOW_MS = 4000;

export class Answer {
  // `hidden`: the version is not shown until the vote. `onend` is called each time the answer ends, fails or is stopped.
  constructor({ model, name, request, hidden = false, single = true, onend }) {
    Object.assign(this, { model, name, request, hidden, single, onend });
    this.title = el("h3", { hidden: single });
    this.body = el("div", { class: "text", dir: "auto" });
    this.problem = el("div", { class: "problem", hidden: true });
    this.meta = el("span", { class: "meta" });
    this.tools = el("span", { class: "tools-inline" });
    this.status = el("span", { class: "status", role: "status" });
    this.node = el("article", { class: "answer", "aria-label": single ? "Answer" : `Answer ${name}` },
      this.title, this.body, this.problem, el("footer", {}, this.meta, this.tools, this.status));
    this.clear();
  }

  clear() {
    Object.assign(this, { state: "waiting", text: "", id: null, version: null, spans: null, tokens: null, finish: null, duration: 0 });
    this.problem.hidden = true;
    this.tools.replaceChildren();
    setText(this.status, "");
    this.draw();
  }

  get busy() { return this.state === "waiting" || this.state === "streaming"; }
  get complete() { return this.state === "done" && this.id !== null; }

  // Streams the answer until it ends, fails or `signal` stops it.
  async run(signal) {
    this.clear();
    const began = performance.now();
    const slow = setTimeout(() => this.draw(true), SLOW_MS);
    try {
      for await (const item of chat({ ...this.request, model: this.model }, signal)) this.take(item);
      this.state = "done";
    } catch (error) {
      if (error.name === "AbortError") this.state = "stopped";
      else if (error instanceof Refused) this.fail(error);
      else throw error;
    } finally {
      clearTimeout(slow);
      this.duration = (performance.now() - began) / 1000;
      if (this.busy) this.state = "failed";
      this.end();
    }
  }

  take(item) {
    if (!item.object) {
      this.version = item.version;
      this.run_id = item.run;
      return;
    }
    this.id = item.id ?? this.id;
    this.state = "streaming";
    this.tokens = item.usage?.completion_tokens ?? this.tokens;
    this.spans = item.policy_versions ?? this.spans;
    this.text += item.choices?.[0]?.delta?.content ?? "";
    this.finish = item.choices?.[0]?.finish_reason ?? this.finish;
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  fail(error) {
    this.state = "failed";
    const when = error.retryAfter > 5 ? ` It may work again in ${seconds(error.retryAfter)}.` : "";
    this.problem.replaceChildren(el("strong", {}, error.title), el("p", {}, error.sentence + when));
    this.problem.hidden = false;
    announce(`No answer. ${error.title}. ${error.sentence}`);
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (this.state === "done") announce(`Answer ${this.single ? "" : `${this.name} `}finished${this.tokens === null ? "" : `, ${plural(this.tokens, "token")}`}`);
    this.draw();
    this.drawTools();
    this.onend?.(this);
  }

  reveal() {
    this.hidden = false;
    this.draw();
    this.drawTools();
  }

  origin() {
    if (this.hidden) return "hidden until you vote";
    const spans = this.spans ?? [];
    if (spans.length > 1) return spans.map((span, at) => `v${span.version}${at && span.from_tokens?.[0] != null ? ` from token ${span.from_tokens[0]}` : ""}`).join(", then ");
    return this.version === null ? "" : `v${this.version}`;
  }

  draw(slow = false) {
    setText(this.title, this.hidden ? `Answer ${this.name}` : `Answer ${this.name} · ${this.model}`);
    setText(this.body, this.text);
    this.node.setAttribute("aria-busy", this.busy);
    this.node.dataset.state = this.state;
    this.body.hidden = !this.text && this.state === "failed";
    const waiting = slow ? "Waiting: a version that is not running has to start first" : "Waiting for the first token";
    const facts = {
      waiting: [waiting],
      streaming: [this.origin(), "writing"],
      stopped: [this.origin(), "stopped"],
      failed: [this.version === null ? "" : this.origin()],
      done: [this.origin(), this.tokens === null ? "" : plural(this.tokens, "token"), seconds(this.duration), this.finish === "length" ? "cut at the limit" : ""],
    }[this.state];
    setText(this.meta, facts.filter(Boolean).join(" · "));
    this.meta.title = this.hidden || !this.run_id ? "" : `run ${this.run_id}`;
    this.node.classList.toggle("blank-answer", this.state === "done" && !this.text);
  }

  drawTools() {
    const again = button("Try again", () => this.again?.(this), { class: "quiet" });
    if (!this.complete) return this.tools.replaceChildren(again);
    const rate = (value, label) => button([icon(value), el("span", { class: "hidden" }, label)], (event) => this.rate(value, event.currentTarget),
      { class: "quiet round", "aria-pressed": "false", title: label });
    const edit = button([icon("edit"), "Edit"], () => this.edit(), { class: "quiet", title: "Write a better version of this answer" });
    return this.tools.replaceChildren(...(this.single ? [rate("up", "Good answer"), rate("down", "Bad answer")] : []), edit);
  }

  async rate(value, pressed) {
    const result = await judge(thumb(this, value));
    setText(this.status, result.text);
    if (result.stored) for (const each of this.tools.querySelectorAll("[aria-pressed]")) each.setAttribute("aria-pressed", each === pressed);
  }

  edit() {
    const area = el("textarea", { class: "rewrite", rows: Math.min(12, this.text.split("\n").length + 2), "aria-label": "The answer as it should be" });
    area.value = this.text;
    const close = () => {
      box.replaceWith(this.body);
      this.drawTools();
      this.tools.lastElementChild.focus();
    };
    const save = async () => {
      const text = area.value;
      if (!text.trim() || text === this.text) return setText(this.status, text.trim() ? "You have not changed the answer." : "An empty answer cannot be stored.");
      const result = await judge(edited(this, text));
      setText(this.status, result.text);
      if (!result.stored) return undefined;
      this.text = text;
      this.node.classList.add("edited");
      this.draw();
      return close();
    };
    const box = el("div", { class: "editing" }, area,
      el("div", { class: "buttons" }, button("Cancel", close, { class: "quiet" }), button("Save edit", save, { class: "primary" })));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); close(); }
    });
    this.body.replaceWith(box);
    this.tools.replaceChildren();
    area.focus();
  }
}
