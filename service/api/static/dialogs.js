// Asks before a deployment changes: what will change, why, and whether somebody was faster.

import { NoAnswer, ask, send, session, token } from "./api.js";
import { el, field, option, say } from "./dom.js";
import { count, percent, several, short } from "./words.js";

export const NEEDS_SUBMIT = "This needs a token with the scope submit; yours has read alone.";

/** Disable a button as long as the token is known not to suffice, and say why. */
export function needsSubmit(button, signal) {
  const show = () => {
    button.disabled = token.lacksSubmit;
    if (token.lacksSubmit) button.title = NEEDS_SUBMIT;
    else button.removeAttribute("title");
  };
  session.addEventListener("scope", show, { signal });
  show();
  return button;
}

/** What a refused change means to its reader. */
export function told(problem, name) {
  if (problem instanceof NoAnswer) return "The service does not answer. Nothing is known to have changed; try again.";
  if (problem.status === 412) {
    return `Somebody changed ${name} meanwhile. What would change now is shown above; look at it, then decide again.`;
  }
  if (problem.status === 403 && /scope submit/.test(problem.message)) return NEEDS_SUBMIT;
  if (problem.status === 401) return "This needs a token that the service takes: give one above, then try again.";
  return problem.message;
}

const describe = (version) => (version === null ? "no placement yet"
  : `version ${version.version}, placement ${short(version.placement_id)}`);

async function currentOf(name, signal) {
  const path = `v1/deployments/${encodeURIComponent(name)}`;
  const [deployment, versions] = await Promise.all([ask(path, { signal }), ask(`${path}/versions?limit=1`, { signal })]);
  return { deployment, version: deployment.version === null ? null : versions.items[0] };
}

/**
 * A dialog for one change of a deployment.
 *
 * change: title, verb; `controls` above what changes; `target()` gives {name, placementId, label} or null;
 * `commit(target, current, why)` sends it. Resolves to the version that was made, or null if it was given up.
 */
class Change {
  #lifetime = new AbortController();
  #looking = null;
  #current = null;
  #made = null;
  #failed = false;

  constructor(change) {
    this.change = change;
    this.from = el("dd", { id: "change-from" });
    this.to = el("dd", { id: "change-to" });
    this.moves = el("dd", { id: "change-moves" });
    this.why = el("input", { type: "text", required: true, maxlength: "200", autocomplete: "off" });
    this.error = el("p", { id: "change-error", class: "error", role: "alert" });
    this.yes = el("button", { id: "change-yes", class: "primary" }, change.verb);
    this.dialog = el("dialog", { id: "change", "aria-labelledby": "change-title" },
      el("form", { method: "dialog", onsubmit: (event) => { event.preventDefault(); this.#commit(); } },
        el("h2", { id: "change-title" }, change.title),
        change.controls ?? null,
        el("dl", { class: "change" },
          el("div", {}, el("dt", {}, "From"), this.from),
          el("div", {}, el("dt", {}, "To"), this.to),
          el("div", {}, el("dt", {}, "To copy"), this.moves)),
        field("why", "Reason", this.why, "For the history."),
        this.error,
        el("div", { class: "buttons" },
          el("button", { type: "button", onclick: () => this.dialog.close() }, "Cancel"), this.yes)));
  }

  /** Show it. */
  open() {
    document.body.append(this.dialog);
    this.dialog.showModal();
    this.look();
    return new Promise((resolve) => this.dialog.addEventListener("close", () => {
      this.#lifetime.abort();
      this.dialog.remove();
      resolve(this.#made);
    }));
  }

  /** Ask what would change, as things stand now. */
  async look() {
    this.#looking?.abort();
    const looking = this.#looking = new AbortController();
    const signal = AbortSignal.any([looking.signal, this.#lifetime.signal]);
    this.yes.disabled = true;
    const target = this.change.target();
    for (const place of [this.from, this.to, this.moves]) say(place, target === null ? "-" : "looking ...");
    if (target === null) return;
    try {
      this.#current = await currentOf(target.name, signal);
      const now = this.#current.version;
      say(this.from, describe(now));
      const same = now?.placement_id === target.placementId;
      say(this.to, same ? `version ${now.version}, as now` : target.label(this.#current));
      this.yes.disabled = same;
      say(this.moves, await this.#movesText(now, target.placementId, signal));
      if (this.#failed) say(this.error, "");
      this.#failed = false;
    } catch (error) {
      if (signal.aborted) return;
      for (const place of [this.from, this.to, this.moves]) if (place.textContent === "looking ...") say(place, "not known");
      say(this.error, told(error, target.name));
      this.#failed = true;
      this.#lookLater(error);
    }
  }

  // Nothing can be decided before it is known what would change.
  #lookLater(error) {
    const { signal } = this.#lifetime;
    if (error.status === 401) session.addEventListener("token", () => this.look(), { once: true, signal });
    else if (error instanceof NoAnswer || error.status >= 500) setTimeout(() => { if (!signal.aborted) this.look(); }, 2000);
  }

  async #movesText(now, placementId, signal) {
    if (now === null) return "everything: nothing runs yet";
    if (now.placement_id === placementId) return "nothing: this placement runs already";
    const path = `v1/placements/${placementId}/moves?from=${encodeURIComponent(now.placement_id)}`;
    const found = await ask(path, { signal });
    const share = found.num_moves && typeof found.moved_share === "number" ? ` (${percent(found.moved_share)} of all copies)` : "";
    return `${several(found.num_moves, "expert copy").replace("copys", "copies")}${share}`;
  }

  async #commit() {
    const target = this.change.target();
    if (target === null || this.yes.disabled) return;
    this.yes.disabled = true;
    say(this.error, "");
    try {
      this.#made = await this.change.commit(target, this.#current, this.why.value.trim());
      this.dialog.close();
    } catch (error) {
      say(this.error, told(error, target.name));
      if (error.status === 412) await this.look();
      else this.yes.disabled = token.lacksSubmit;
    }
  }
}

const only = (current) => (current.version === null ? { "If-None-Match": "*" } : { "If-Match": `"v${current.version.version}"` });

function promote(target, current, why) {
  const body = target.solveId ? { solve_id: target.solveId, why } : { placement_id: target.placementId, why };
  return send("PUT", `v1/deployments/${encodeURIComponent(target.name)}/placement`, body, { headers: only(current) });
}

const nextVersion = (current, placementId) =>
  `version ${(current.version?.version ?? 0) + 1}, placement ${short(placementId)}`;

/** Why a placement cannot run in a deployment, by their sizes; empty if it may. */
function misfit(placement, { facts }) {
  const pairs = [["num_layers", "layers"], ["num_experts", "experts"], ["num_devices", "devices"]];
  const other = pairs.filter(([one, two]) => placement !== undefined && placement[one] !== facts[two]).map(([, name]) => name);
  return other.length ? `other ${other.join(", ")}` : "";
}

/** Promote a placement (found by a solve, or stored) to a deployment that the reader chooses. */
async function promoteTo({ placementId, solveId }) {
  const [found, stored] = await Promise.all([ask("v1/deployments?limit=500"), ask("v1/placements?limit=500")]);
  const placement = stored.items.find((one) => one.id === placementId);
  const choices = found.items.map((one) => [one.name, misfit(placement, one)]).sort((one, two) => Boolean(one[1]) - Boolean(two[1]));
  const choice = el("select", { required: true, onchange: () => change.look() }, choices.map(([name, why]) => {
    const made = option(name, why ? `${name} (${why})` : name);
    made.disabled = why !== "";
    return made;
  }));
  const fits = choices.some(([, why]) => why === "");
  if (!fits) choice.value = "";
  const controls = fits ? field("change-deployment", "Deployment", choice)
    : el("p", { class: "trouble" }, choices.length ? "No deployment has the layers, experts and devices of this placement."
      : "There is no deployment yet: make one with PUT /v1/deployments/NAME.");
  const change = new Change({
    title: "Promote this placement",
    verb: "Promote",
    controls,
    target: () => (choice.value === "" ? null : {
      name: choice.value, placementId, solveId, label: (current) => nextVersion(current, placementId),
    }),
    commit: promote,
  });
  const made = await change.open();
  return made === null ? null : { name: choice.value, ...made };
}

/** Promote a stored placement, which the reader chooses, to a deployment. */
export async function promoteInto(deployment) {
  const shape = deployment.facts;
  const stored = (await ask("v1/placements?limit=500")).items;
  const fitting = stored.filter((one) => misfit(one, deployment) === "");
  const choice = el("select", { required: true, onchange: () => change.look() },
    fitting.map((one) => option(one.id, `${short(one.id)}: ${one.num_slots} slots, ${new Date(one.created_at * 1000).toLocaleString()}`)));
  const controls = fitting.length
    ? field("change-placement", "Placement", choice, `${count(fitting.length)} of the newest ${count(stored.length)} fit this deployment.`)
    : el("p", { class: "trouble" }, `No stored placement has ${shape.layers} layers, ${shape.experts} experts and ${shape.devices} devices.`);
  const change = new Change({
    title: `Promote a placement to ${deployment.name}`,
    verb: "Promote",
    controls,
    target: () => (choice.value === "" ? null : {
      name: deployment.name, placementId: choice.value, label: (current) => nextVersion(current, choice.value),
    }),
    commit: promote,
  });
  return change.open();
}

/** Make an earlier version of a deployment the current one. */
export function rollBack(name, version) {
  const label = (current) => `${nextVersion(current, version.placement_id)}: that of version ${version.version}`;
  const change = new Change({
    title: `Roll ${name} back to version ${version.version}`,
    verb: "Roll back",
    target: () => ({ name, placementId: version.placement_id, label }),
    commit: (target, current, why) => send("POST", `v1/deployments/${encodeURIComponent(name)}/rollback`,
      { to: version.version, why }, { headers: only(current) }),
  });
  return change.open();
}

/** Promote from a view: go to the deployment that changed, or say there what stood against it. */
export async function promoteFrom(view, what) {
  try {
    const made = await promoteTo(what);
    if (made === null) return;
    view.notice(`${made.name} runs version ${made.version} now.`);
    location.hash = `#/deployments/${made.name}`;
  } catch (error) { view.notice(told(error, "the deployment"), "bad"); }
}
