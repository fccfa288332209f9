// The page: login, views, and polling of the endpoint while the page is visible.

import { get, key, Refused, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, el, setText } from "./dom.js";
import { RunPanel } from "./run.js";
import { VersionsPanel } from "./versions.js";

const RUN_MS = 2000;
const IDLE_MS = 10000;
const VERSIONS_MS = 8000;
const VERSIONS_MIN_MS = 4000;

const chat = new Chat();
const panels = { run: null, versions: null };
const seen = { view: null, mark: null, versionsAt: 0 };
let timer = 0;
let polling = false;

function show(view) {
  document.body.dataset.view = view;
  for (const each of document.querySelectorAll("[data-show]")) {
    if (each.dataset.show === view) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
}

function blank(name, text) {
  panels[name] = null;
  byId(`${name}-body`).replaceChildren(el("p", { class: "blank" }, text));
}

function showTrouble(error) {
  byId("trouble").hidden = !error;
  if (error) setText(byId("trouble"), `${error.title}. ${error.sentence} The page retries automatically.`);
}

async function fetchRun() {
  try {
    const { data, live } = await get("run");
    panels.run ??= new RunPanel(byId("run-body"));
    panels.run.draw(data);
    seen.view = data;
    return `${data.run} ${data.steps.version.at(-1)} ${live}`;
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 0 || error.status === 401) throw error;
    seen.view = null;
    blank("run", error.status === 404 ? "This endpoint does not show its run." : error.sentence);
    return "";
  }
}

async function fetchVersions() {
  const panel = panels.versions ?? new VersionsPanel(el("div", {}), {
    onchange: () => chat.offer(panels.versions.models()),
    onlogin: () => login("Use another key"),
    onchoose: (model) => { show("chat"); chat.choose(model); },
  });
  try {
    const state = await panel.fetch(get);
    if (!panels.versions) {
      panels.versions = panel;
      byId("versions-body").replaceChildren(panel.node);
    }
    panels.versions.draw(state);
    chat.offer(panels.versions.models());
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 0 || error.status === 401) throw error;
    blank("versions", error.sentence);
  }
}

function drawSummary() {
  const live = panels.versions?.state?.live;
  const brief = seen.view ? RunPanel.brief(seen.view) : "";
  setText(byId("summary"), [brief, live == null ? "" : `v${live} live`].filter(Boolean).join(" · "));
}

// Polls the run; the versions when a new step or live version shows that they may have changed, or after VERSIONS_MS.
async function poll() {
  clearTimeout(timer);
  if (polling || document.hidden || byId("login").open) return;
  polling = true;
  let pause = RUN_MS;
  try {
    const mark = await fetchRun();
    const age = Date.now() - seen.versionsAt;
    if (age > VERSIONS_MS || (mark !== seen.mark && age > VERSIONS_MIN_MS)) {
      await fetchVersions();
      seen.mark = mark;
      seen.versionsAt = Date.now();
    }
    showTrouble(null);
    drawSummary();
    if (!seen.view?.alive) pause = IDLE_MS;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 401) showTrouble(error);
    pause = IDLE_MS / 2;
  } finally {
    polling = false;
    timer = setTimeout(poll, pause);
  }
}

function login(title, wrong = "") {
  const dialog = byId("login");
  if (dialog.open) return;
  setText(byId("login-title"), title);
  setText(byId("login-error"), wrong);
  dialog.showModal();
  byId("key").focus();
}

// The endpoint refused this key. Answers to calls that were made with an earlier key do not count.
function locked(used) {
  if (byId("login").open || used !== key()) return;
  setKey(null);
  byId("forget").hidden = true;
  showTrouble(null);
  login("This endpoint needs a key", used ? "The endpoint does not know this key." : "");
}

byId("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = byId("key").value.trim();
  if (!value) return;
  setKey(value);
  byId("key").value = "";
  byId("forget").hidden = false;
  byId("login").close();
  panels.versions?.forget();
  seen.versionsAt = 0;
  byId("message").focus();
  poll();
});
byId("forget").addEventListener("click", () => { setKey(null); location.reload(); });
window.addEventListener("locked", (event) => locked(event.detail.used));
document.addEventListener("visibilitychange", poll);
for (const each of document.querySelectorAll("[data-show]")) each.addEventListener("click", () => show(each.dataset.show));

byId("forget").hidden = !key();
byId("message").focus({ preventScroll: true });
poll();
