// `#/`: what the service does now: its queue, the deployments, the solves.

import { ask, poll, token } from "./api.js";
import { badge, command, el, empty, fill, put, row, section, table } from "./dom.js";
import { STATUS, bytes, fixed, percent, quantity, short, span, topologyText, when } from "./words.js";

const EVERY_MS = 2000;

const tile = (name, value) => el("div", { class: "tile" }, el("dt", {}, name), el("dd", {}, value));

function tiles(status) {
  const stored = Object.values(status.artifact_bytes).reduce((sum, size) => sum + size, 0);
  const cpus = status.worker_cpus / Math.max(1, status.workers);
  return [
    tile("running", String(status.running)),
    tile("queued", String(status.queued)),
    tile("longest wait", status.queued ? span(status.oldest_queued_s) : "none"),
    tile("workers × threads", `${status.workers} × ${Math.round(cpus)}`),
    tile("traces", String(status.artifacts.trace ?? 0)),
    tile("placements", String(status.artifacts.placement ?? 0)),
    tile("stored", bytes(stored)),
    tile("free on disk", bytes(status.disk_free_bytes)),
  ];
}

/** What recent windows say of the current placement; null where they are of the one before. */
export const driftOf = (found) => (found.drift?.version === found.version ? found.drift : null);

/** How a deployment stands: in a word, and in a tone. */
export function health(found) {
  const drift = driftOf(found);
  if (found.version === null) return ["no placement", "warn"];
  if (typeof drift?.excess !== "number") return ["no load yet", ""];
  if (drift.due) return ["drifted", "bad"];
  return drift.excess > found.policy.drift_threshold ? ["above threshold", "warn"] : ["as predicted", "good"];
}

function deploymentRow(found) {
  const drift = driftOf(found) ?? {};
  return row([
    el("a", { href: `#/deployments/${found.name}` }, found.name),
    badge(...health(found)),
    [found.version === null ? "none" : String(found.version), "n"],
    [fixed(drift.balance), "n"],
    [fixed(drift.reference), "n"],
    [percent(drift.excess), "n"],
    topologyText(found.topology),
    found.policy.mode === "auto" ? `auto, ${found.refresh.phase}` : "manual",
    [when(found.updated_at), "t"],
  ]);
}

function solveRow(found) {
  const objective = found.result?.objective ?? found.incumbent ?? {};
  const [text, tone] = STATUS[found.status] ?? [found.status, ""];
  return row([
    [el("a", { href: `#/solves/${found.id}` }, found.id), "id"],
    put(el("span", {}), badge(text, tone), found.error ? el("span", { class: "why", title: found.error.message }, found.error.code) : null),
    [quantity(found.objective, objective.unit), "n"],
    objective.name ?? "",
    [percent(found.gap), "n"],
    [span(found.elapsed_s), "n"],
    [found.placement_id ? el("a", { href: `#/placements/${found.placement_id}` }, short(found.placement_id)) : "", "id"],
    found.deployment ? `${found.caller} for ${found.deployment}` : found.caller,
    [when(found.created_at), "t"],
  ]);
}

const noSolves = (origin) => empty("No solve yet",
  el("p", {}, "A solve reads a routing trace and searches the best placement for a cluster. ",
    el("a", { href: "#/solves/new" }, "Start one here"), ", or from a terminal:"),
  command(`moe-placement submit TRACE --topology h100:1x8 --objective balance --url ${origin}`));

const noDeployments = (origin) => empty("No deployment yet",
  el("p", {}, "A deployment is a running model: launchers fetch its current placement, ranks post their load, and drift is watched."),
  command(`curl -X PUT ${origin}/v1/deployments/chat \\\n  -H 'Content-Type: application/json' \\\n`
    + (token.held ? "  -H \"Authorization: Bearer $MOE_PLACEMENT_TOKEN\" \\\n" : "")
    + "  -d '{\"topology\": \"h100:1x8\", \"model\": \"mixtral-8x7b\"}'"));

async function solvesOf(pages, signal) {
  let items = [];
  let cursor = null;
  for (let page = 0; page < pages; page += 1) {
    const query = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    const answer = await ask(`v1/solves?limit=20${query}`, { signal });
    items = items.concat(answer.items);
    cursor = answer.next_cursor;
    if (!cursor) break;
  }
  return { items, more: Boolean(cursor) };
}

export const title = () => "Overview";

/** Show the view. */
export function show({ root, signal, ready, failed }) {
  const origin = location.origin + location.pathname.replace(/\/$/, "");
  const now = el("dl", { id: "tiles", class: "tiles", "aria-label": "Now" });
  const deployments = table("deployments", "Deployments",
    ["name", "health", "#version", "#balance now", "#expected", "#drift", "topology", "refresh", "changed"]);
  const solves = table("solves", "Solves",
    ["solve", "status", "#value", "objective", "#gap", "#time", "placement", "caller", "queued"]);
  const more = el("button", { type: "button", id: "more", hidden: true }, "Older solves");
  const nothing = { deployments: noDeployments(origin), solves: noSolves(origin) };
  let pages = 1;
  root.append(now,
    section("Deployments", {}, nothing.deployments, deployments),
    section("Solves", {}, nothing.solves, solves, more));
  for (const hidden of [nothing.deployments, nothing.solves, deployments, solves]) hidden.hidden = true;

  const renew = poll(async () => {
    try {
      const [status, running, found] = await Promise.all([
        ask("v1/status", { signal }), ask("v1/deployments?limit=500", { signal }), solvesOf(pages, signal)]);
      now.replaceChildren(...tiles(status));
      nothing.deployments.hidden = running.items.length > 0;
      deployments.hidden = running.items.length === 0;
      fill(deployments, running.items, (one) => one.name, deploymentRow);
      nothing.solves.hidden = found.items.length > 0;
      solves.hidden = found.items.length === 0;
      fill(solves, found.items, (one) => one.id, solveRow);
      more.hidden = !found.more;
      ready();
    } catch (error) { failed(error); }
  }, { every: EVERY_MS, signal });
  more.addEventListener("click", () => { pages += 1; renew(); });
}
