// The page: login, views, and looking at the endpoint again while somebody looks at the page.

import { get, key, Refused, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, el, setText } from "./dom.js";
import { RunPanel } from "./run.js";
import { VersionsPanel } from "./versions.js";

const RUN_MS = 2000;
const IDLE_MS = 10000;
const VERSIONS_MS = 8000;
const VERSIONS_LEAST_MS = 4000;

const chat = new Chat();
const panels = { run: null, versions: null };
const seen = { view: null, mark: null, versionsAt: 0 };
let timer = 0;
let looking = false;

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

function trouble(error) {
  byId("trouble").hidden = !error;
  if (error) setText(byId("trouble"), `${error.title}. ${error.sentence} The page tries again by itself.`);
}

async function lookAtRun() {
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

async function lookAtVersions() {
  const making = panels.versions ?? new VersionsPanel(el("div", {}), {
    onchange: () => chat.offer(panels.versions.models()),
    onlogin: () => login("Another key"),
    onchoose: (model) => { show("chat"); chat.choose(model); },
  });
  try {
    const state = await making.fetch(get);
    if (!panels.versions) {
      panels.versions = making;
      byId("versions-body").replaceChildren(making.node);
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

// One look at the endpoint; the versions only when something tells that they may have changed, or now and then.
async function look() {
  clearTimeout(timer);
  if (looking || document.hidden || byId("login").open) return;
  looking = true;
  let pause = RUN_MS;
  try {
    const mark = await lookAtRun();
    const age = Date.now() - seen.versionsAt;
    if (age > VERSIONS_MS || (mark !== seen.mark && age > VERSIONS_LEAST_MS)) {
      await lookAtVersions();
      seen.mark = mark;
      seen.versionsAt = Date.now();
    }
    trouble(null);
    drawSummary();
    if (!seen.view?.alive) pause = IDLE_MS;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 401) trouble(error);
    pause = IDLE_MS / 2;
  } finally {
    looking = false;
    timer = setTimeout(look, pause);
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

// The endpoint took no call with this key. A call that was on its way with an older one says nothing about today's.
function locked(used) {
  if (byId("login").open || used !== key()) return;
  setKey(null);
  byId("forget").hidden = true;
  trouble(null);
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
  look();
});
byId("forget").addEventListener("click", () => { setKey(null); location.reload(); });
window.addEventListener("locked", (event) => locked(event.detail.used));
document.addEventListener("visibilitychange", look);
for (const each of document.querySelectorAll("[data-show]")) each.addEventListener("click", () => show(each.dataset.show));

byId("forget").hidden = !key();
byId("message").focus({ preventScroll: true });
look();
