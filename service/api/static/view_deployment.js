// `#/deployments/NAME`: what runs, how it does, what ran before, and the ways to change it.

import { ask, poll, save } from "./api.js";
import { needsSubmit, promoteInto, rollBack, told } from "./dialogs.js";
import { badge, command, el, empty, facts, fill, put, row, say, section, table } from "./dom.js";
import { figureBlock, showFigure } from "./figures.js";
import { driftOf, health } from "./view_overview.js";
import { count, fixed, modelText, number, percent, several, short, span, topologyText, when } from "./words.js";

const EVERY_MS = 2000;
const SOURCES = {
  predicted: "that was predicted when it was promoted", floor: "that its replicas allow at the least",
  noise: "that sampling noise alone costs", attainable: "that the last refresh could reach",
};
const CAUSES = { manual: ["manual", ""], automatic: ["automatic", "busy"], rollback: ["rollback", "warn"] };

class DeploymentView {
  constructor({ root, name, signal, ready, failed, notice }) {
    Object.assign(this, { root, name, signal, ready, failed, notice });
    this.path = `v1/deployments/${encodeURIComponent(name)}`;
    this.figured = "";
    this.#build();
  }

  #build() {
    const { signal } = this;
    this.state = el("span", { id: "health-state", class: "badge" }, "...");
    this.says = el("p", { id: "verdict", class: "lead" });
    this.promote = needsSubmit(el("button", { type: "button", id: "promote", class: "primary", onclick: () => this.#promote() }, "Promote a placement ..."), signal);
    this.explore = el("a", { class: "button", hidden: true }, "Explore the placement");
    this.fetch = el("button", { type: "button", hidden: true, onclick: () => this.#save() }, "Save the placement");
    this.tiles = facts([["Version", "", "version"], ["Placement", "", "placement"], ["Balance now", "", "balance"],
      ["Predicted", "", "predicted"], ["Drift", "", "drift"], ["Traffic shift", "", "shift"]], { class: "tiles" });
    this.figure = figureBlock("health", "Balance over posted windows", { id: "health", level: "h3" });
    this.refresh = el("div", { id: "refresh" });
    this.spec = el("div", {});
    this.none = empty("No placement has been promoted yet",
      el("p", {}, "Solve one for this cluster and promote it, here or by the API. Ranks then post the load they see, and drift is watched."),
      command(`moe-placement submit TRACE --topology TOPOLOGY --wait`));
    this.none.hidden = true;
    this.versions = table("versions", "Versions", ["version", "promoted", "cause", "by", "why", "#predicted", "#observed", "placement", "solve", ".change"]);
    put(this.root, el("div", { class: "line" }, this.state, this.says),
      el("div", { class: "buttons start" }, this.promote, this.explore, this.fetch),
      this.none, this.tiles,
      section("Health", {}, this.figure.block),
      el("div", { class: "columns" }, section("Last refresh", {}, this.refresh), section("What runs", {}, this.spec)),
      section("History", {}, this.versions));
  }

  start() {
    this.renew = poll(async () => {
      try {
        const [found, versions] = await Promise.all([
          ask(this.path, { signal: this.signal }), ask(`${this.path}/versions?limit=100`, { signal: this.signal })]);
        this.found = found;
        this.#show(found, versions.items);
        this.ready();
        await this.#draw();
      } catch (error) { this.failed(error); }
    }, { every: EVERY_MS, signal: this.signal });
  }

  #show(found, versions) {
    const current = versions.find((one) => one.current) ?? null;
    const drift = driftOf(found);
    const [text, tone] = health(found);
    say(this.state, text);
    this.state.className = `badge ${tone}`;
    say(this.says, verdict(found, drift));
    this.none.hidden = current !== null;
    this.tiles.hidden = current === null;
    this.explore.hidden = this.fetch.hidden = current === null;
    const at = (id) => this.tiles.querySelector(`#${id}`);
    if (current !== null) {
      this.explore.setAttribute("href", `#/placements/${current.placement_id}`);
      say(at("version"), `${current.version}`);
      if (at("placement").textContent !== short(current.placement_id)) {
        at("placement").replaceChildren(el("a", { href: `#/placements/${current.placement_id}`, class: "id" }, short(current.placement_id)));
      }
    }
    say(at("balance"), fixed(drift?.balance) || "no load yet");
    say(at("predicted"), fixed(current?.predicted?.balance) || "not known");
    say(at("drift"), percent(drift?.excess) || "-");
    say(at("shift"), typeof drift?.shift === "number" ? percent(drift.shift) : "not known");
    this.#showRefresh(found);
    this.#showSpec(found);
    // A placement is shown against the one that runs.
    const rows = versions.map((one) => ({ ...one, from: one.current ? null : current?.placement_id }));
    fill(this.versions, rows, (one) => one.version, (one) => this.#versionRow(one));
  }

  #showRefresh(found) {
    const signature = JSON.stringify([found.refresh, found.policy, found.drift?.holds_back]);
    if (this.refresh.signature === signature) return;
    this.refresh.signature = signature;
    const { refresh, policy } = found;
    const solve = (id) => el("a", { href: `#/solves/${id}` }, short(id));
    const last = refresh.last;
    const entries = [
      ["Policy", policy.mode === "auto" ? `automatic, beyond a drift of ${percent(policy.drift_threshold)}` : "manual: drift is watched, nothing changes by itself"],
      ["Now", refresh.phase === "idle" ? "idle" : refresh.phase],
      refresh.solve_id ? ["Solving", solve(refresh.solve_id)] : null,
      refresh.observing !== null && refresh.observing !== undefined ? ["Observed", `version ${refresh.observing}`] : null,
      found.drift?.holds_back ? ["Held back", found.drift.holds_back] : null,
      ["Refreshes", String(refresh.number)],
      ...(last ? Object.entries(last).map(([name, value]) => lastEntry(name, value, solve)).filter(Boolean) : [["Last", "none yet"]]),
    ].filter(Boolean);
    this.refresh.replaceChildren(facts(entries, { class: "facts panel" }));
  }

  #showSpec(found) {
    const signature = JSON.stringify([found.topology, found.model, found.facts, found.options, found.num_ranks]);
    if (this.spec.signature === signature) return;
    this.spec.signature = signature;
    this.spec.replaceChildren(facts([
      ["Topology", topologyText(found.topology)], ["Model", modelText(found.model)],
      ["MoE layers", count(found.facts.layers)], ["Experts per layer", count(found.facts.experts)],
      ["Devices", count(found.facts.devices)], ["Slots per layer", count(found.facts.slots)],
      ["Semantics", found.options.semantics], ["Ranks that post load", count(found.num_ranks)],
      ["Made", when(found.created_at)],
    ], { class: "facts panel" }));
  }

  #versionRow(one) {
    const button = el("button", { type: "button", "aria-label": `Roll back to version ${one.version}`, onclick: () => this.#rollBack(one) }, "Roll back");
    return row([
      put(el("span", {}), String(one.version), " ", one.current ? badge("current", "good") : null),
      [when(one.promoted_at), "t"],
      badge(...(CAUSES[one.cause] ?? [one.cause, ""])),
      one.by,
      [one.why, "why"],
      [fixed(one.predicted?.balance), "n"],
      [fixed(one.observed?.balance), "n"],
      [el("a", { href: `#/placements/${one.placement_id}${one.from ? `?from=${one.from}` : ""}` }, short(one.placement_id)), "id"],
      [one.solve_id ? el("a", { href: `#/solves/${one.solve_id}` }, short(one.solve_id)) : "", "id"],
      one.current ? "" : needsSubmit(button, this.signal),
    ], { "data-version": String(one.version) });
  }

  async #draw() {
    try {
      const answer = await ask(`${this.path}/figure`, { signal: this.signal });
      const signature = JSON.stringify(answer);
      if (signature === this.figured) return;
      this.figured = signature;
      await showFigure(this.figure, answer, this.signal);
    } catch (error) {
      if (this.signal.aborted || !error.status || error.status === 401) throw error;
      this.figure.chart.hidden = true;
      say(this.figure.caption, `The figure cannot be drawn: ${error.message}`);
    }
  }

  async #change(dialog) {
    try {
      const made = await dialog();
      if (made === null) return;
      this.notice(`${this.name} runs version ${made.version} now.`);
      // The button that was pressed may be gone with the next look.
      document.querySelector("h1").focus();
      this.renew();
    } catch (error) { this.notice(told(error, this.name), "bad"); }
  }

  #promote() { return this.#change(() => promoteInto(this.found)); }

  #rollBack(version) { return this.#change(() => rollBack(this.name, version)); }

  async #save() {
    try {
      await save(`${this.path}/placement`, `${this.name}.json`);
    } catch (error) { this.notice(told(error, this.name), "bad"); }
  }
}

/** How it does, in a sentence. */
function verdict(found, drift) {
  if (found.version === null) return "Nothing runs by this name yet.";
  if (drift === null) return "No complete window of load has been posted for this version, so that nothing is known of its health.";
  const over = drift.excess >= 0 ? `${percent(drift.excess)} above` : `${percent(-drift.excess)} below`;
  const source = SOURCES[drift.reference_of] ?? "that was expected";
  return `Over ${several(drift.windows, "window")} the fullest device carried ${fixed(drift.balance)} times the mean load: ${over} the ${fixed(drift.reference)} ${source}.`;
}

/** One entry of how the last refresh ended. */
function lastEntry(name, value, solve) {
  if (value === null || value === undefined) return null;
  if (name === "why" || name === "detail") return ["Why", String(value)];
  if (name === "solve_id" || name === "job_id") return ["Its solve", solve(value)];
  if (name === "at" || name === "ended_at") return ["Ended", when(value)];
  if (typeof value === "object") return null;
  const text = typeof value === "number" ? (name.endsWith("_s") ? span(value) : number(value)) : String(value);
  return [name === "outcome" ? "Last" : name.replaceAll("_", " "), text];
}

export const title = ([name]) => `Deployment ${name}`;

/** Show the view. */
export function show({ parameters: [name], ...view }) {
  new DeploymentView({ name, ...view }).start();
}
