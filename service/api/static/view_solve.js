// `#/solves/ID`: a solve while it runs and when it has ended.

import { NoAnswer, ask, save, send, session, until } from "./api.js";
import { NEEDS_SUBMIT, needsSubmit, promoteFrom, told } from "./dialogs.js";
import { el, facts, fill, put, row, say, section, table } from "./dom.js";
import { follow } from "./events.js";
import { figureBlock, showFigure } from "./figures.js";
import { STATUS, fixed, percent, quantity, several, short, span, topologyText, when } from "./words.js";

const FINAL = ["succeeded", "stopped", "failed", "timed_out"];
const FIGURE_MS = 700;
const LIVE = { live: ["live", "good"], reconnecting: ["reconnecting ...", "warn"], ended: ["ended", ""] };

const OPTIONS = [
  ["objective", "Objective"], ["semantics", "Semantics"], ["spare_slots", "Spare slots"], ["fill_memory", "Fill the memory"],
  ["time_limit", "Time limit", span], ["window", "Window", (tokens) => several(tokens, "token")], ["risk", "Over windows"],
  ["max_imbalance", "Most imbalance"], ["replica_split", "Replicas share"], ["calibration", "Calibration"], ["sample", "Sample"],
  ["source_format", "Trace format"], ["solver", "Solver"], ["threads", "Threads"], ["seed", "Seed"], ["max_moves", "Most moves"],
];
const METRICS = [
  ["balance", "Fullest device / mean", fixed],
  ["balance_p95", "... in the 95th percentile of windows", fixed],
  ["worst_layer_balance", "Worst layer", fixed],
  ["balance_floor", "Least that the hottest experts allow", fixed],
  ["fanout", "Devices that a token visits", fixed],
  ["hops", "Hops of a token", fixed],
];

class SolveView {
  constructor({ root, id, signal, ready, failed, notice }) {
    Object.assign(this, { root, id, signal, ready, failed, notice });
    this.path = `v1/solves/${encodeURIComponent(id)}`;
    this.found = null;
    this.incumbents = [];
    this.figureTimer = null;
    this.#build();
  }

  #build() {
    const { id } = this;
    this.status = el("span", { id: "status", class: "badge" }, "...");
    this.live = el("span", { id: "live", class: "badge", role: "status" }, "connecting ...");
    this.phase = el("span", { id: "phase", class: "soft" });
    this.stop = needsSubmit(el("button", { type: "button", id: "stop", hidden: true, onclick: () => this.#stop() }, "Stop early"), this.signal);
    this.promote = needsSubmit(el("button", { type: "button", id: "promote", class: "primary", hidden: true, onclick: () => promoteFrom(this, { placementId: this.found.placement_id, solveId: this.id }) }, "Promote ..."), this.signal);
    this.explore = el("a", { class: "button", hidden: true }, "Explore the placement");
    this.fetch = el("button", { type: "button", hidden: true, onclick: () => this.#save() }, "Save the placement");
    this.error = el("p", { id: "solve-error", class: "trouble", role: "alert", hidden: true });
    this.figures = facts([["Best so far", "", "objective"], ["Lower bound", "", "bound"], ["Gap", "", "gap"], ["Time", "", "elapsed"], ["Queued", ""]], { class: "tiles" });
    this.queued = this.figures.querySelector("div:last-child dd");
    this.curve = figureBlock("curve", "Best value and lower bound over time", { id: "curve" });
    this.history = table("incumbents", "Incumbents", ["#time", "#value", "#lower bound", "#gap", "found by"]);
    this.options = section("Options");
    this.result = section("Result", { hidden: true });
    put(this.root, el("div", { class: "line" }, this.status, this.live, this.phase),
      this.error, el("div", { class: "buttons start" }, this.promote, this.explore, this.fetch, this.stop),
      this.figures, this.curve.block,
      el("details", { class: "panel" }, el("summary", {}, "Incumbents as a table"), this.history),
      el("div", { class: "columns" }, this.result, this.options));
    this.root.dataset.solve = id;
  }

  async start() {
    this.found = await until(() => ask(this.path, { signal: this.signal }), this);
    this.#show();
    this.ready();
    this.#drawSoon(0);
    const clock = setInterval(() => this.#tick(), 500);
    this.signal.addEventListener("abort", () => { clearInterval(clock); clearTimeout(this.figureTimer); });
    await follow(this.id, { signal: this.signal, onEvent: (event) => this.#event(event), onState: (state) => this.#state(state) });
  }

  #state(state) {
    const [text, tone] = LIVE[state];
    say(this.live, text);
    this.live.className = `badge ${tone}`;
    if (state === "reconnecting") return;
    // What happened while nobody listened is in the document.
    this.#renew();
  }

  async #renew() {
    try {
      this.found = await ask(this.path, { signal: this.signal });
      this.#show();
      if (FINAL.includes(this.found.status)) this.#drawSoon(0);
    } catch (error) {
      if (!this.signal.aborted) this.failed(error);
    }
  }

  #event({ kind, id, data }) {
    if (kind === "incumbent") {
      this.incumbents.push({ id, ...data });
      this.#tell(data.objective, data.lower_bound, data.gap, data.unit);
      fill(this.history, this.incumbents, (one) => one.id, (one) => row([
        [span(one.elapsed_s), "n"], [quantity(one.objective, one.unit), "n"], [quantity(one.lower_bound, one.unit), "n"],
        [percent(one.gap), "n"], one.solver]));
    } else if (kind === "progress") this.#progress(data);
    if (this.found.status === "queued") this.#renew();
    this.#drawSoon(FIGURE_MS);
  }

  #progress({ phase, solver, attempt }) {
    const texts = { started: attempt > 1 ? `begun again, for the ${attempt}. time` : "begun", reading: "reading the trace", writing: "writing the placement" };
    if (!FINAL.includes(this.found.status)) say(this.phase, texts[phase] ?? [phase, solver].filter(Boolean).join(": "));
  }

  #tell(objective, bound, gap, unit) {
    const at = (id) => this.figures.querySelector(`#${id}`);
    say(at("objective"), quantity(objective, unit) || "-");
    say(at("bound"), quantity(bound, unit) || "-");
    say(at("gap"), percent(gap) || "-");
  }

  // Drawn from the events that are stored, at most a few times a second.
  #drawSoon(after) {
    if (this.figureTimer !== null) return;
    this.figureTimer = setTimeout(async () => {
      this.figureTimer = null;
      try {
        await showFigure(this.curve, await ask(`${this.path}/figure`, { signal: this.signal }), this.signal);
      } catch (error) {
        if (this.signal.aborted) return;
        if (error instanceof NoAnswer) this.#drawSoon(3000);
        else if (error.status === 401) session.addEventListener("token", () => this.#drawSoon(0), { once: true, signal: this.signal });
        else { this.curve.chart.hidden = true; say(this.curve.caption, `The figure cannot be drawn: ${error.message}`); }
      }
    }, after);
  }

  #tick() {
    const found = this.found;
    const running = found.status === "running" && found.elapsed_s !== null;
    const seconds = running ? found.elapsed_s + (performance.now() - this.asked) / 1000 : found.elapsed_s;
    const limit = found.request?.options?.time_limit;
    say(this.figures.querySelector("#elapsed"), span(seconds) ? `${span(seconds)}${running && limit ? ` of ${span(limit)}` : ""}` : "-");
  }

  #show() {
    const { found } = this;
    this.asked = performance.now();
    const [text, tone] = STATUS[found.status] ?? [found.status, ""];
    const isFinal = FINAL.includes(found.status);
    say(this.status, text);
    this.status.className = `badge ${tone}`;
    if (isFinal) say(this.phase, found.stop_requested ? "stopped early" : "");
    this.stop.hidden = isFinal;
    if (found.stop_requested) { this.stop.disabled = true; say(this.stop, "Stopping ..."); }
    this.promote.hidden = this.explore.hidden = this.fetch.hidden = !found.placement_id;
    if (found.placement_id) this.explore.setAttribute("href", `#/placements/${found.placement_id}?trace=${found.trace_id}`);
    const objective = found.result?.objective ?? found.incumbent ?? {};
    this.#tell(found.objective, found.lower_bound, found.gap, objective.unit);
    this.queued.replaceChildren(when(found.created_at));
    this.#tick();
    this.error.hidden = !found.error;
    if (found.error) say(this.error, `${found.error.code}: ${found.error.message}`);
    this.#showOptions();
    this.#showResult();
  }

  #showOptions() {
    const { request } = this.found;
    if (request === null || this.options.querySelector("dl")) return;
    const chosen = OPTIONS.filter(([key]) => ![null, undefined, false].includes(request.options?.[key]));
    const text = (value) => (typeof value === "object" ? "as given" : value === true ? "yes" : String(value));
    const link = (path, id) => (id ? el("a", { href: `#/${path}/${id}` }, short(id)) : "-");
    const start = request.start_placement_id;
    this.options.append(facts([
      ["Trace", link("traces", this.found.trace_id)],
      ["Topology", topologyText(request.topology)],
      ["Model", typeof request.model === "string" ? request.model : request.model === null ? "the trace's own" : "as given"],
      start ? ["Start from", start.startsWith("sha256:") ? link("placements", start) : link("solves", start)] : null,
      ...chosen.map(([key, name, words = text]) => [name, words(request.options[key])]),
      ["Caller", this.found.deployment ? `${this.found.caller} for ${this.found.deployment}` : this.found.caller],
    ].filter(Boolean), { class: "facts panel" }));
  }

  #showResult() {
    const { result } = this.found;
    this.result.hidden = !result?.metrics;
    if (!result?.metrics || this.result.querySelector("dl")) return;
    const objective = result.objective ?? {};
    const others = Object.entries(result.candidates ?? {}).sort((one, two) => two[1] - one[1]);
    const entries = METRICS.filter(([key]) => typeof result.metrics[key] === "number")
      .map(([key, name, text]) => [name, text(result.metrics[key])]);
    if (result.moves?.num_moves !== undefined) entries.push(["Away from the start", several(result.moves.num_moves, "move")]);
    const beaten = others.map(([name, value]) => `${name} ${quantity(value, objective.unit)}`).join(", ");
    put(this.result, facts([
      ["Found by", result.solver], ["Search ended", result.termination], ...entries, ["Tried", beaten],
      ...(result.notes ?? []).map((note) => ["Note", note]),
    ], { class: "facts panel" }));
  }

  async #stop() {
    this.stop.disabled = true;
    try {
      this.found = await send("DELETE", this.path, undefined, { signal: this.signal });
      this.#show();
    } catch (error) {
      if (this.signal.aborted) return;
      this.stop.disabled = error.message === NEEDS_SUBMIT;
      this.notice(told(error, "the solve"), "bad");
    }
  }

  async #save() {
    try {
      await save(`${this.path}/placement`, `${this.id}.json`);
    } catch (error) { this.notice(told(error, "the solve"), "bad"); }
  }
}

export const title = ([id]) => `Solve ${id}`;

/** Show the view. */
export function show({ parameters: [id], ...view }) {
  return new SolveView({ id, ...view }).start();
}
