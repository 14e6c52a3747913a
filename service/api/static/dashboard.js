"use strict";
// Shows what the service's own API says. Everything is put in as text, never as markup.

const REFRESH_MS = 2000;
const TOKEN = "moe-placement-token";
const $ = (id) => document.getElementById(id);

let shownDeployment = null;
let olderPages = 0;
let timer = null;

class Refused extends Error {}

async function ask(path) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, credentials: "omit", cache: "no-store" });
  if (answer.status === 401 || answer.status === 403) {
    throw new Refused((await answer.json()).detail);
  }
  if (!answer.ok && answer.status !== 503) throw new Error(`${path}: HTTP ${answer.status}`);
  return answer.json();
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function link(text, action, title) {
  const made = element("a", text);
  made.href = "#";
  if (title) made.title = title;
  made.addEventListener("click", (event) => { event.preventDefault(); action(); });
  return made;
}

function row(cells) {
  const made = element("tr");
  for (const [content, name] of cells) {
    const cell = element("td", undefined, name);
    cell.append(content instanceof Node ? content : document.createTextNode(content ?? ""));
    made.append(cell);
  }
  return made;
}

function fill(table, rows, columns, none) {
  const body = $(table).tBodies[0];
  if (rows.length === 0) {
    const empty = row([[none, "empty"]]);
    empty.firstChild.colSpan = columns;
    rows = [empty];
  }
  body.replaceChildren(...rows);
}

const number = (value, digits = 4) =>
  typeof value === "number" ? Number(value.toPrecision(digits)).toString() : "";
const percent = (value) => (typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "");

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

function span(seconds) {
  if (typeof seconds !== "number") return "";
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

function when(seconds) {
  if (typeof seconds !== "number") return "";
  const moment = new Date(seconds * 1000);
  const made = element("time", `${span(Math.max(0, Date.now() / 1000 - seconds))} ago`);
  made.dateTime = moment.toISOString();
  made.title = moment.toLocaleString();
  return made;
}

function badge(text, name) { return element("span", text, `badge ${name}`); }

const STATUS = {
  queued: "", running: "busy", succeeded: "good", stopped: "warn", failed: "bad", timed_out: "bad",
};

function value(solve) {
  const objective = solve.result?.objective;
  const found = objective?.value ?? solve.objective;
  if (typeof found !== "number") return "";
  return `${number(found)} ${objective?.unit ?? ""}`.trim();
}

function solveRow(solve) {
  const status = badge(solve.status, STATUS[solve.status] ?? "");
  const links = element("span");
  if (solve.error) {
    status.title = solve.error.message;
    links.append(element("span", solve.error.code, "bad"));
    links.title = solve.error.message;
  }
  if (solve.placement_id) {
    links.append(link("placement", () => save(`v1/solves/${solve.id}/placement`, `${solve.id}.json`)));
  }
  return row([
    [link(solve.id, () => show(`v1/solves/${solve.id}`), "its JSON"), "id"],
    [status],
    [value(solve), "n"],
    [percent(solve.gap), "n"],
    [span(solve.elapsed_s), "n"],
    [when(solve.created_at)],
    [solve.deployment ? `${solve.caller} for ${solve.deployment}` : solve.caller],
    [links],
  ]);
}

function deploymentRow(found) {
  const drift = found.drift ?? {};
  const excess = badge(percent(drift.excess) || "-", drift.excess > (found.policy?.drift_threshold ?? 0.1) ? "bad" : "good");
  const refresh = found.refresh ?? {};
  return row([
    [link(found.name, () => { shownDeployment = found.name; update(); }, "its history")],
    [found.version ?? "none", "n"],
    [number(drift.balance), "n"],
    [number(drift.reference), "n"],
    [typeof drift.excess === "number" ? excess : "", "n"],
    [(found.policy ?? found.spec?.policy)?.mode ?? ""],
    [refresh.job_id ? link(refresh.phase, () => show(`v1/solves/${refresh.job_id}`)) : refresh.phase ?? ""],
    [when(found.updated_at)],
    [found.version ? link("placement", () => save(`v1/deployments/${found.name}/placement`, `${found.name}.json`)) : ""],
  ]);
}

function versionRow(found) {
  return row([
    [String(found.version), "n"],
    [when(found.promoted_at)],
    [badge(found.cause, found.cause === "rollback" ? "warn" : "")],
    [found.by],
    [found.why],
    [number(found.predicted?.balance), "n"],
    [number(found.observed?.balance), "n"],
    [found.job_id ?? found.solve_id ?? "", "id"],
  ]);
}

function tile(text, figure) {
  const made = element("div", undefined, "tile");
  made.append(element("b", figure), element("span", text));
  return made;
}

function tiles(status) {
  const stored = Object.values(status.artifact_bytes).reduce((sum, size) => sum + size, 0);
  $("tiles").replaceChildren(
    tile("queued", status.queued),
    tile("running", status.running),
    tile("longest wait", span(status.oldest_queued_s)),
    tile("workers × threads", `${status.workers} × ${Math.round(status.worker_cpus / Math.max(1, status.workers))}`),
    tile("traces", status.artifacts.trace ?? 0),
    tile("placements", status.artifacts.placement ?? 0),
    tile("stored", bytes(stored)),
    tile("free on disk", bytes(status.disk_free_bytes)),
  );
  $("version").textContent = `${status.version} (${status.role})`;
}

async function solves() {
  let found = [], cursor = null;
  for (let page = 0; page <= olderPages; page += 1) {
    const query = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    const answer = await ask(`v1/solves?limit=20${query}`);
    found = found.concat(answer.items);
    cursor = answer.next_cursor;
    if (!cursor) break;
  }
  $("more").hidden = !cursor;
  fill("solves", found.map(solveRow), 8, "none yet: moe-placement submit, or POST /v1/solves");
}

async function deployments() {
  const found = (await ask("v1/deployments")).items;
  fill("deployments", found.map(deploymentRow), 9, "none yet: PUT /v1/deployments/{name}");
  $("history").hidden = shownDeployment === null;
  if (shownDeployment === null) return;
  $("history-name").textContent = shownDeployment;
  const versions = (await ask(`v1/deployments/${encodeURIComponent(shownDeployment)}/versions`)).items;
  fill("versions", versions.map(versionRow), 8, "no placement yet");
}

async function readiness() {
  const { status, reasons } = await ask("health/ready");
  const text = Object.entries(reasons ?? {}).map(([part, why]) => `${part}: ${why}`).join("; ");
  $("state").textContent = status;
  $("state").className = `badge ${status === "ready" ? "good" : "bad"}`;
  trouble(text);
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

async function update() {
  clearTimeout(timer);
  try {
    await readiness();
    tiles(await ask("v1/status"));
    await Promise.all([solves(), deployments()]);
    $("token-form").hidden = true;
    $("forget").hidden = sessionStorage.getItem(TOKEN) === null;
    $("updated").textContent = `as of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    if (error instanceof Refused) {
      refuse(error);
      return;
    }
    $("state").textContent = "no answer";
    $("state").className = "badge bad";
    trouble(String(error.message));
  }
  if (!document.hidden) timer = setTimeout(update, REFRESH_MS);
}

function refuse(error) {
  $("token-form").hidden = false;
  $("token-error").textContent = sessionStorage.getItem(TOKEN) === null ? "" : error.message;
  sessionStorage.removeItem(TOKEN);
  $("forget").hidden = true;
  $("token").focus();
}

// A link cannot carry the token: fetched here, and handed over as a file.
async function fetched(path) {
  const token = sessionStorage.getItem(TOKEN);
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return answer.blob();
}

async function save(path, name) {
  try {
    const made = element("a");
    made.href = URL.createObjectURL(await fetched(path));
    made.download = name;
    made.click();
    URL.revokeObjectURL(made.href);
  } catch (error) { trouble(String(error.message)); }
}

async function show(path) {
  try {
    const text = JSON.stringify(JSON.parse(await (await fetched(path)).text()), null, 2);
    const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    window.open(url, "_blank", "noopener");
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  } catch (error) { trouble(String(error.message)); }
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  update();
});
$("forget").addEventListener("click", () => { sessionStorage.removeItem(TOKEN); update(); });
$("more").addEventListener("click", () => { olderPages += 1; update(); });
$("metrics").addEventListener("click", (event) => {
  event.preventDefault();
  fetched("metrics").then((blob) => window.open(URL.createObjectURL(new Blob([blob], { type: "text/plain" })), "_blank", "noopener"))
    .catch((error) => trouble(String(error.message)));
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });
update();
