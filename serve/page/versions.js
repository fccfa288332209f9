// The panel of versions: their state and origin, and buttons that change which is live or pinned.

import { post, Refused } from "./api.js";
import { Chart } from "./chart.js";
import { announce, button, byId, el, setText } from "./dom.js";

const fixed = (digits) => (value) => value.toFixed(digits);
const percent = (value) => `${Math.round(value * 100)}%`;
const shortest = (labels) => [...labels].sort((a, b) => a.length - b.length)[0];
const METRICS = {
  reward: ["Reward", fixed(3)],
  loss: ["Loss", fixed(4)],
  margin: ["Margin", fixed(3)],
  accuracy: ["Accuracy", percent],
  mean_tokens: ["Mean tokens", fixed(1)],
  chosen_tokens: ["Chosen tokens", fixed(1)],
  rejected_tokens: ["Rejected tokens", fixed(1)],
};
const ACTIONS = {
  promote: (version) => ["Make live", `Make v${version} live?`, "Requests are answered by it from now on. New versions do not go live until the endpoint follows training again."],
  rollback: (version) => ["Roll back", `Roll back to v${version}?`, "It was live before. New versions do not go live until the endpoint follows training again."],
  follow: () => ["Follow training", "Follow training again?", "The newest version that passed its checks goes live, and so do later ones."],
};

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// Asks the user in a dialog; resolves to true when the user agrees.
function confirmed(verb, version) {
  const [label, title, text] = ACTIONS[verb](version);
  const dialog = byId("confirm");
  setText(byId("confirm-title"), title);
  setText(byId("confirm-text"), text);
  setText(byId("confirm-yes"), label);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    byId("confirm-yes").onclick = () => dialog.close("yes");
    byId("confirm-no").onclick = () => dialog.close("");
  });
}

export class VersionsPanel {
  // `onchange` is called after a change, `onchoose` with the model name to chat with, `onlogin` to ask for a key.
  constructor(node, { onchange, onchoose, onlogin }) {
    Object.assign(this, { onchange, onchoose, state: null, admin: null, rows: new Map(), unanswered: new Map() });
    this.live = el("p", { class: "serving" });
    this.back = button("Roll back", () => this.act("rollback", this.state.previous), { class: "quiet" });
    this.follow = button("Follow training", () => this.act("follow"), { class: "quiet" });
    this.controls = el("div", { class: "buttons start" }, this.back, this.follow);
    this.status = el("p", { class: "status", role: "status" });
    this.trouble = el("p", { class: "reason", hidden: true });
    this.note = el("p", { class: "note" }, "Changing versions needs a key with the scope admin. ",
      button("Use another key", onlogin, { class: "link" }));
    this.length = new Chart("Tokens", "v", [{ label: "chosen", format: fixed(1) }, { label: "rejected", format: fixed(1) }], { dots: true });
    this.mean = new Chart("Mean tokens", "v", [{ format: fixed(1) }], { dots: true });
    this.reward = new Chart("Reward", "v", [{ format: fixed(3) }], { dots: true });
    this.margin = new Chart("Reward margin", "v", [{ format: fixed(3) }], { dots: true });
    this.accuracy = new Chart("Accuracy", "v", [{ format: percent }], { dots: true });
    this.list = el("ul", { class: "versions" });
    const charts = [this.length, this.mean, this.reward, this.margin, this.accuracy];
    this.node = node;
    node.replaceChildren(this.live, this.trouble, this.controls, this.status, this.note, el("div", { class: "charts" }, charts.map((chart) => chart.node)), this.list);
  }

  // The state from the admin route if the key is allowed to, else from the model list. Throws Refused.
  async fetch(get) {
    if (this.admin !== false) {
      try {
        const { data } = await get("admin/versions", { optional: true });
        this.admin = true;
        return data;
      } catch (error) {
        if (!(error instanceof Refused) || ![401, 403, 404].includes(error.status)) throw error;
        this.admin = false;
      }
    }
    const { data } = await get("v1/models");
    const all = data.data.map((card) => card.metadata ?? {});
    // The card of a named adapter describes its base version, which has a card of its own.
    const versions = data.data.filter((card) => card.id.includes("@") && !card.metadata?.adapter).map((card) => card.metadata ?? {});
    const adapters = all.filter((each) => each.adapter).map((each) => ({ name: each.adapter, base: each.version }));
    const live = all.find((each) => each.state === "live") ?? all[0] ?? {};
    const listed = versions.length ? versions : all.slice(0, 1).map((each) => ({ state: "live", labels: [], ...each }));
    return { run: live.run, live: live.version, versions: listed, adapters, pinned: listed.filter((each) => each.state === "pinned").map((each) => each.version) };
  }

  // The models to choose from: the live policy, pinned versions and named adapters.
  models() {
    const { live, versions, adapters = [] } = this.state;
    const named = (each) => [`v${each.version}`, shortest(each.labels ?? [])].filter(Boolean).join(" · ");
    const pinned = versions.filter((each) => each.state === "pinned");
    return [
      { id: "policy", label: live == null ? "Live" : `Live · v${live}` },
      ...pinned.map((each) => ({ id: `policy@${each.version}`, label: named(each) })),
      ...adapters.map((each) => ({ id: `policy@${each.name}`, label: `${each.name} · on v${each.base}` })),
    ];
  }

  draw(state) {
    this.state = state;
    const { live, held, follow, previous, versions } = state;
    const rule = { latest: "Each new version goes live.", round: "The version at the end of each round goes live.", manual: "Versions go live by hand only." }[follow];
    setText(this.live, live == null ? "No version is live yet." : `v${live} is live. ${held ? "It is held there by hand." : rule ?? ""}`);
    this.controls.hidden = !this.admin;
    this.back.hidden = previous == null;
    setText(this.back, previous == null ? "Roll back" : `Roll back to v${previous}`);
    this.follow.hidden = !held;
    this.note.hidden = this.admin !== false;
    this.trouble.hidden = !state.troubles?.length;
    setText(this.trouble, (state.troubles ?? []).map(({ what, reason, tries }) => `Fails: ${what}. ${reason} (tried ${tries} times)`).join(" "));
    this.drawCharts([...versions].sort((a, b) => a.version - b.version), live);
    this.drawList(versions);
  }

  drawCharts(versions, live) {
    const measured = versions.filter((each) => Object.keys(each.metrics ?? {}).length > 0);
    const x = measured.map((each) => each.version);
    const column = (name) => measured.map((each) => each.metrics[name] ?? null);
    const has = (name) => measured.some((each) => typeof each.metrics[name] === "number");
    this.mean.draw(x, [has("mean_tokens") ? column("mean_tokens") : []], live);
    this.length.draw(x, has("mean_tokens") ? [[], []] : [column("chosen_tokens"), column("rejected_tokens")], live);
    this.reward.draw(x, [column("reward")], live);
    this.margin.draw(x, [has("reward") ? [] : column("margin")], live);
    this.accuracy.draw(x, [has("reward") ? [] : column("accuracy")], live);
  }

  drawList(versions) {
    const wanted = new Set(versions.map((each) => each.version));
    for (const [version, row] of this.rows) if (!wanted.has(version)) { row.node.remove(); this.rows.delete(version); }
    versions.forEach((each, at) => {
      if (!this.rows.has(each.version)) this.rows.set(each.version, this.row(each.version));
      const { node } = this.rows.get(each.version);
      if (this.list.children[at] !== node) this.list.insertBefore(node, this.list.children[at] ?? null);
      this.drawRow(each);
    });
  }

  row(version) {
    const row = { facts: el("dl", {}), labels: el("span", { class: "labels" }), chip: el("span", { class: "chip" }), reason: el("p", { class: "reason" }) };
    row.promote = button("Make live", () => this.act("promote", version), { class: "quiet" });
    row.pin = button("Pin", () => this.act("pin", version), { class: "quiet", title: "Serve it beside the live version, and keep it" });
    row.unpin = button("Unpin", () => this.act("unpin", version), { class: "quiet" });
    row.chat = button("Chat with it", () => this.onchoose(row.model), { class: "quiet" });
    row.node = el("li", {}, el("details", {},
      el("summary", {}, el("b", {}, `v${version}`), row.labels, row.chip),
      row.reason, row.facts, el("div", { class: "buttons start" }, row.chat, row.promote, row.pin, row.unpin)));
    return row;
  }

  drawRow(each) {
    const row = this.rows.get(each.version);
    const tone = { live: "good", pinned: "accent", starting: "warn", failing: "bad", refused: "bad", candidate: "warn" }[each.state] ?? "plain";
    setText(row.chip, each.state ?? "kept");
    row.chip.className = `chip ${tone}`;
    setText(row.labels, (each.labels ?? []).join(", "));
    row.reason.hidden = !each.reason;
    setText(row.reason, each.reason ? `${each.state === "refused" ? "Refused" : "Does not start"}: ${each.reason}` : "");
    const served = each.state === "live" || each.state === "pinned";
    row.model = each.state === "live" ? "policy" : `policy@${each.version}`;
    row.chat.hidden = !served;
    row.promote.hidden = !this.admin || each.state === "live" || each.state === "refused";
    const pinned = this.state.pinned?.includes(each.version);
    row.pin.hidden = !this.admin || pinned;
    row.unpin.hidden = !this.admin || !pinned;
    const facts = {
      Round: each.version === 0 || each.round == null ? null : `${each.round + 1}, step ${each.step}`,
      Parent: each.parent == null ? null : `v${each.parent}`,
      Base: each.base,
      Method: each.method,
      Recipe: each.recipe,
      Data: each.data?.slice(0, 12),
      Made: each.created ? new Date(each.created * 1000).toLocaleString() : null,
      ...Object.fromEntries(Object.entries(METRICS).map(([name, [label, form]]) => [label, typeof each.metrics?.[name] === "number" ? form(each.metrics[name]) : null])),
    };
    const known = Object.entries(facts).filter(([, value]) => value != null && value !== "");
    const text = known.flat().join("\n");
    if (row.known === text) return;
    row.known = text;
    row.facts.replaceChildren(...known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  async act(verb, version) {
    if (verb in ACTIONS && !(await confirmed(verb, version))) return;
    const route = verb === "follow" ? "promote" : verb;
    const body = verb === "rollback" ? {} : { version: verb === "follow" ? "latest" : version };
    const asked = JSON.stringify([route, body]);
    const id = this.unanswered.get(asked) ?? newId();
    this.unanswered.set(asked, id); // pressed again because no answer came, it is the same command
    setText(this.status, "Working");
    try {
      this.draw(await post(`admin/${route}`, body, { optional: true, id }));
      this.unanswered.delete(asked);
      const done = { promote: `v${version} is live.`, rollback: `v${this.state.live} is live again.`, follow: "Following training.", pin: `v${version} is pinned; it starts with its first request.`, unpin: `v${version} is no longer pinned.` };
      setText(this.status, done[verb]);
      this.onchange();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const forbidden = error.status === 401 || error.status === 403;
      const answered = error.status > 0 && error.status < 500;
      if (answered) this.unanswered.delete(asked);
      const unknown = "No answer came, so it may be done or not. Press the button again: it is done once.";
      setText(this.status, forbidden ? "This key may not change versions." : answered ? `Not done. ${error.sentence}` : unknown);
      if (forbidden) {
        this.admin = false;
        this.draw(this.state);
      }
      announce(this.status.textContent);
    }
  }

  forget() { this.admin = null; }
}
