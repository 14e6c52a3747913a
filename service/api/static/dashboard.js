// The page around the views: which one is shown, whether the service answers, and with which token it is asked.

import { NoAnswer, ask, isAborted, poll, session, token } from "./api.js";
import { el, empty, say } from "./dom.js";
import { tick } from "./words.js";

const READINESS_MS = 2000;
const NOTICE_MS = 12000;
const AWAY = "The service does not answer; asking again.";

const ROUTES = [
  [/^\/?$/, "overview"],
  [/^\/solves\/new$/, "submit"],
  [/^\/solves\/([^/]+)$/, "solve"],
  [/^\/deployments\/([^/]+)$/, "deployment"],
  [/^\/traces$/, "traces"],
  [/^\/traces\/([^/]+)$/, "trace"],
  [/^\/placements$/, "placements"],
  [/^\/placements\/([^/]+)$/, "placement"],
];
const VIEWS = {
  overview: () => import("./view_overview.js"),
  submit: () => import("./view_submit.js"),
  solve: () => import("./view_solve.js"),
  deployment: () => import("./view_deployment.js"),
  traces: () => import("./view_traces.js"),
  trace: () => import("./view_trace.js"),
  placements: () => import("./view_placements.js"),
  placement: () => import("./view_placement.js"),
};

const $ = (id) => document.getElementById(id);
const main = $("main");
let lifetime = new AbortController();
let noticeTimer = null;

// -- views ---------------------------------------------------------------------------------------------------

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    // Not written by a program: taken as it is.
    return text;
  }
}

function routeOf(hash) {
  const [path, query] = hash.replace(/^#/, "").split("?");
  for (const [pattern, name] of ROUTES) {
    const found = pattern.exec(path);
    if (found) return { name, parameters: found.slice(1).map(decoded), query: new URLSearchParams(query ?? "") };
  }
  return { name: "missing", parameters: [], query: new URLSearchParams() };
}

function heading(text) {
  document.title = `${text} - moe-placement`;
  return el("h1", { tabindex: "-1" }, text);
}

async function viewOf(name) {
  try {
    return await VIEWS[name]();
  } catch {
    // Its module did not come; the address is asked for again once the service is back.
    session.dispatchEvent(new CustomEvent("away"));
    return null;
  }
}

async function route(isFirst = false) {
  lifetime.abort();
  lifetime = new AbortController();
  const { signal } = lifetime;
  const { name, parameters, query } = routeOf(location.hash);
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  for (const link of document.querySelectorAll("nav a[data-route]")) {
    if (link.dataset.route === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  main.dataset.view = name;
  main.dataset.ready = "false";
  trouble("view", "");
  if (name === "missing") { missing("There is no such page", `Nothing is at ${location.hash}.`, isFirst); return; }
  const view = await viewOf(name);
  if (signal.aborted) return;
  if (view === null) {
    session.addEventListener("answered", () => route(isFirst), { once: true, signal });
    return;
  }
  const head = heading(view.title(parameters));
  const root = el("div", { class: `view ${name}` });
  main.replaceChildren(head, root);
  window.scrollTo(0, 0);
  if (!isFirst) head.focus();
  const ready = () => { main.dataset.ready = "true"; trouble("view", ""); updated(); };
  const failed = (error) => { if (!signal.aborted && !isAborted(error)) viewFailed(error); };
  try {
    await view.show({ root, parameters, query, signal, ready, failed, notice });
  } catch (error) { failed(error); }
}

function missing(title, text, isFirst) {
  const head = heading(title);
  main.replaceChildren(head, empty(text, el("p", {}, "Go back to the ", el("a", { href: "#/" }, "overview"), ".")));
  main.dataset.ready = "true";
  if (!isFirst) head.focus();
}

function viewFailed(error) {
  if (error instanceof NoAnswer || error.status === 401) return;
  if (error.status === 404 && main.dataset.ready === "false") {
    lifetime.abort();
    main.dataset.view = "missing";
    missing("Not found", error.message, true);
    return;
  }
  trouble("view", error.message);
  if (error.status === undefined) console.error(error);
}

// -- what is said above the views ----------------------------------------------------------------------------

const troubles = { service: "", view: "" };

function trouble(about, text) {
  troubles[about] = text;
  const all = Object.values(troubles).filter(Boolean).join(" ");
  say($("trouble"), all);
  $("trouble").hidden = all === "";
}

/** Say that something was done, or failed ("bad"), for some seconds. */
function notice(text, tone = "good") {
  clearTimeout(noticeTimer);
  $("notice").hidden = false;
  $("notice").className = `notice ${tone}`;
  say($("notice"), text);
  noticeTimer = setTimeout(() => { $("notice").hidden = true; say($("notice"), ""); }, NOTICE_MS);
}

function updated() { say($("updated"), `as of ${new Date().toLocaleTimeString()}`); }

function state(text, tone) {
  say($("state"), text);
  $("state").className = `badge ${tone}`;
}

// -- service and token ---------------------------------------------------------------------------------------

async function readiness() {
  try {
    const { status, reasons } = await ask("health/ready", { taken: [503] });
    const text = Object.entries(reasons ?? {}).map(([part, why]) => `${part}: ${why}`).join("; ");
    trouble("service", text);
    if (token.isRefused) state("token needed", "warn");
    else if (status === "ready") state("ready", "good");
    else state("not ready", "bad");
    if ($("service-version").textContent === "" && !token.isRefused) await version();
  } catch (error) {
    if (!(error instanceof NoAnswer) && error.status !== 401) trouble("service", error.message);
  }
}

async function version() {
  const found = await ask("v1/status");
  token.learn(found.scopes);
  say($("service-version"), `moe-placement ${found.version} (${found.role})`);
}

session.addEventListener("away", () => {
  state("no answer", "bad");
  trouble("service", AWAY);
});

session.addEventListener("answered", () => {
  if (troubles.service === AWAY) trouble("service", "");
});

session.addEventListener("refused", ({ detail }) => {
  state("token needed", "warn");
  if (detail) say($("token-error"), `The token was refused: ${detail}`);
  const form = $("token-form");
  const wasHidden = form.hidden;
  form.hidden = false;
  $("forget").hidden = true;
  // Outside of an open dialog nothing can be used.
  document.querySelector("dialog[open]")?.prepend(form);
  // Who is about to write something else is left to it.
  if (wasHidden && !document.activeElement?.matches("input, select")) $("token").focus();
});

$("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  say($("token-error"), "");
  try {
    await token.use($("token").value.trim());
    $("token").value = "";
    home();
    $("token-form").hidden = true;
    $("forget").hidden = false;
    renewed();
  } catch (error) {
    if (error instanceof NoAnswer) say($("token-error"), "The service does not answer; try again.");
    else say($("token-error"), `The token was refused: ${error.message}`);
    $("token").select();
  }
});

/** Bring the form back from the dialog that it was needed in. */
function home() {
  if ($("token-form").closest("dialog")) $("trouble").before($("token-form"));
}

document.addEventListener("close", home, { capture: true });

$("forget").addEventListener("click", () => {
  token.forget();
  $("forget").hidden = true;
  notice("The token is forgotten.");
});

$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

$("forget").hidden = !token.held;
window.addEventListener("hashchange", () => route());
setInterval(tick, 5000);
const renewed = poll(readiness, { every: READINESS_MS, signal: new AbortController().signal, open: true });
route(true);
