// `#/placements/ID`: the explorer: every layer and device, their experts and load, and what another placement has there.

import { ask, save, until } from "./api.js";
import { needsSubmit, promoteFrom, told } from "./dialogs.js";
import { el, facts, field, option, put, row, say, section, table } from "./dom.js";
import { DIVERGING, Grid, RISING } from "./grid.js";
import { Placing } from "./placing.js";
import { traceText } from "./view_submit.js";
import { count, fixed, percent, several, short } from "./words.js";

const MOST_MOVES = 200;

function measured(name, action) {
  const began = performance.now();
  const result = action();
  performance.measure(name, { start: began, end: performance.now() });
  return result;
}

/** The ends of the scale of loads, mean 1 in the middle: the largest few values do not wash out the others. */
function scaleOf(load) {
  const sorted = Float32Array.from(load).sort();
  const most = Math.max(1.1, sorted[Math.floor(0.999 * (sorted.length - 1))] ?? 1.1);
  return { least: Math.max(0, 2 - most), most };
}

/** Where values stand on the scale, 0 to 1: both halves have their own stretch. */
const along = (load, { least, most }) => Float32Array.from(load, (value) =>
  (value < 1 ? 0.5 * ((value - least) / (1 - least)) : 0.5 + 0.5 * ((value - 1) / (most - 1))));

class Explorer {
  constructor({ root, id, query, signal, ready, failed, notice }) {
    Object.assign(this, { root, id, query, signal, ready, failed, notice });
    this.placing = null;
    this.other = null;
    this.found = null;
    // Of several questions only the latest is answered.
    this.turn = { load: 0, compare: 0 };
    this.#build();
  }

  #build() {
    const { signal } = this;
    const change = (action) => (event) => { event.preventDefault?.(); action(); };
    this.trace = el("select", { onchange: change(() => this.#load()) }, option("", "none: show replicas"));
    this.from = el("select", { onchange: change(() => this.#compareWith(this.from.value)) }, option("", "nothing"));
    this.pasted = el("input", { type: "text", id: "from-id", placeholder: "or paste an id", "aria-label": "Id of the placement to compare with", spellcheck: "false", autocomplete: "off", onchange: change(() => this.#compareWith(this.pasted.value.trim())) });
    this.find = el("input", { type: "number", min: "0", step: "1", placeholder: "number", oninput: () => this.#find() });
    this.foundText = el("p", { id: "found", class: "soft", role: "status" });
    this.promote = needsSubmit(el("button", { type: "button", id: "promote", class: "primary", onclick: () => promoteFrom(this, { placementId: this.id }) }, "Promote ..."), signal);
    this.host = el("div", { id: "grid", role: "grid", tabindex: "0", "aria-label": "Experts by layer and device", "aria-describedby": "grid-help", "aria-readonly": "true" });
    this.live = el("p", { id: "cell", class: "sr", role: "status" });
    this.detail = el("div", { id: "detail" });
    this.legend = el("div", { id: "legend" });
    this.facts = el("div", {});
    this.moves = section("Moves", { id: "moves-section", hidden: true });
    const compare = field("from", "Compare with", this.from);
    this.from.after(this.pasted);
    const finding = field("find", "Find expert", this.find);
    finding.append(this.foundText);
    put(this.root, el("p", { class: "id soft wrap" }, this.id),
      el("div", { class: "buttons start" }, this.promote, el("button", { type: "button", onclick: () => this.#save() }, "Save the placement"),
        el("a", { class: "button", href: `#/solves/new?start=${this.id}` }, "Solve from here")),
      this.facts,
      section("Explorer", {},
        el("div", { class: "panel tools" }, field("trace", "Loads of trace", this.trace), compare, finding),
        el("p", { id: "grid-help", class: "help" }, "Layers from top to bottom, devices from left to right. Point at a cell, or go through them with the arrow keys, Home, End, Page Up and Page Down."),
        el("div", { class: "explorer" }, el("div", { class: "board panel" }, this.host, this.legend), el("div", { class: "panel side" }, this.detail)),
        this.live),
      this.moves);
    this.grid = new Grid(this.host, { onCell: (cell) => this.#cell(cell), signal });
  }

  async start() {
    this.wanted = { trace: this.query.get("trace") ?? "", from: this.query.get("from") ?? "" };
    await this.#load();
    this.ready();
    await until(() => this.#choices(), this);
    if (this.wanted.from) await this.#compareWith(this.wanted.from);
  }

  async #choices() {
    const [traces, placements] = await Promise.all([ask("v1/traces?limit=200", this), ask("v1/placements?limit=200", this)]);
    const { placing } = this;
    const fits = (one) => one.num_layers === placing.layers && one.num_experts === placing.experts;
    for (const one of traces.items.filter(fits)) {
      const known = [...this.trace.options].find(({ value }) => value === one.id);
      if (known) known.textContent = traceText(one);
      else this.trace.append(option(one.id, traceText(one)));
    }
    const others = placements.items.filter((one) => fits(one) && one.num_devices === placing.devices && one.id !== this.id);
    this.from.append(...others.map((one) => option(one.id, `${short(one.id)}, ${count(one.num_slots)} slots, ${new Date(one.created_at * 1000).toLocaleString()}`)));
  }

  #gridOf(id, trace) {
    const query = trace ? `?trace_id=${encodeURIComponent(trace)}` : "";
    return ask(`v1/placements/${encodeURIComponent(id)}/grid${query}`, { signal: this.signal });
  }

  async #load() {
    const trace = this.placing === null ? this.wanted.trace : this.trace.value;
    const error = this.root.querySelector("#trace-error");
    say(error, "");
    const turn = ++this.turn.load;
    const answer = await until(async () => {
      try {
        return await this.#gridOf(this.id, trace);
      } catch (problem) {
        // A trace that does not fit leaves the placement as it is.
        if (!trace || !(problem.status >= 400 && problem.status < 500) || problem.status === 401) throw problem;
        say(error, problem.message);
        return this.#gridOf(this.id, "");
      }
    }, this);
    if (turn !== this.turn.load) return;
    if (this.placing === null && trace) this.trace.append(option(trace, short(trace), true));
    this.placing = new Placing(answer);
    this.find.max = String(this.placing.experts - 1);
    this.facts.replaceChildren(facts(this.placing.overview(), { class: "tiles" }));
    this.#show();
    this.#remember();
  }

  #show() {
    const { placing } = this;
    if (placing.hasLoads) {
      const scale = scaleOf(placing.load);
      this.grid.show(placing, along(placing.load, scale), DIVERGING);
      this.#legend("diverging", [fixed(scale.least, 2), "1: mean of the layer's devices", `${fixed(scale.most, 2)} and more`], "load / mean");
    } else {
      const values = new Float32Array(placing.cells).map((_, cell) => placing.replicatedShare(cell));
      this.grid.show(placing, values, RISING);
      this.#legend("rising", ["none", "all"], "slots with experts that have replicas");
    }
    this.#mark();
  }

  #legend(kind, texts, title) {
    this.legend.replaceChildren(el("span", { class: "legend-title" }, title),
      el("span", { class: "legend-scale" }, el("span", { class: `legend-bar ${kind}`, "aria-hidden": "true" }), el("span", { class: "legend-texts" }, texts.map((text) => el("span", {}, text)))));
  }

  /** Mark what is looked for: an expert's replicas first, else what differs. */
  #mark() {
    const differing = this.differing?.differing ? this.differing.cells : null;
    this.grid.mark(this.found?.cells ?? differing);
  }

  #find() {
    const expert = this.find.value === "" ? null : Number(this.find.value);
    const known = expert !== null && Number.isInteger(expert) && expert >= 0 && expert < this.placing.experts;
    say(this.root.querySelector("#find-error"), expert === null || known ? "" : `Experts are 0 to ${this.placing.experts - 1}.`);
    measured("grid:find", () => {
      this.found = known ? this.placing.find(expert) : null;
      this.#mark();
    });
    say(this.foundText, known ? `expert ${expert}: ${several(this.found.replicas, "replica")} in ${several(this.found.layers, "layer")}` : "");
  }

  async #compareWith(id) {
    const error = this.root.querySelector("#from-error");
    say(error, "");
    this.other = this.differing = null;
    this.moves.hidden = true;
    const turn = ++this.turn.compare;
    if (id !== "") {
      try {
        const [grid, moves] = await Promise.all([this.#gridOf(id, ""),
          ask(`v1/placements/${encodeURIComponent(this.id)}/moves?from=${encodeURIComponent(id)}`, { signal: this.signal })]);
        if (turn !== this.turn.compare) return;
        const other = new Placing(grid);
        if (!this.placing.fits(other)) throw new Error("It has other layers, experts or devices: there is nothing to compare.");
        this.other = other;
        measured("grid:compare", () => { this.differing = this.placing.differing(other); this.#mark(); });
        this.#showMoves(id, moves);
      } catch (problem) {
        if (this.signal.aborted || turn !== this.turn.compare) return;
        say(error, told(problem, "the placement"));
      }
    }
    if (this.other === null) this.#mark();
    this.wanted.from = this.other === null ? "" : id;
    if (this.other !== null) {
      if (![...this.from.options].some((one) => one.value === id)) this.from.append(option(id, short(id)));
      this.pasted.value = "";
    }
    this.from.value = this.wanted.from;
    this.#cell(this.grid.cell);
    this.#remember();
  }

  #showMoves(id, found) {
    const shown = found.moves.slice(0, MOST_MOVES);
    const listed = table("moves", "Moves", ["layer", "#expert", "#from device", "#to device", ".show"]);
    listed.querySelector("tbody").append(...shown.map((move) => this.#moveRow(move)));
    const share = typeof found.moved_share === "number" && found.num_moves ? ` (${percent(found.moved_share)} of all copies)` : "";
    const { differing } = this.differing;
    const framed = this.grid.framed ? "; those that take an expert in are framed" : "";
    const cells = differing ? `${count(differing)} of ${count(this.placing.cells)} cells differ${framed}.`
      : "Every device holds the same experts.";
    this.moves.replaceChildren(this.moves.querySelector("h2"));
    put(this.moves,
      el("p", { class: "lead" }, el("b", { id: "num-moves" }, several(found.num_moves, "move")), ` to get here from placement ${short(id)}${share}. ${cells}`),
      shown.length ? listed : null,
      found.num_moves > shown.length ? el("p", { class: "soft" }, `The first ${count(shown.length)} are listed.`) : null);
    this.moves.hidden = false;
  }

  #moveRow(move) {
    const device = (number) => (number === null || number === undefined ? "none" : String(number));
    const layer = this.placing.layerName(move.layer);
    const button = el("button", {
      type: "button", "aria-label": `Show the move of expert ${move.expert} in layer ${layer} to device ${move.to_device}`,
      onclick: () => { this.grid.go(move.layer, move.to_device, move.from_device ?? null); this.host.focus(); },
    }, "Show");
    return row([layer, [String(move.expert), "n"], [device(move.from_device), "n"], [device(move.to_device), "n"], button]);
  }

  // Ids in the address, so that it can be sent to somebody.
  #remember() {
    const query = new URLSearchParams();
    if (this.trace.value) query.set("trace", this.trace.value);
    if (this.wanted.from) query.set("from", this.wanted.from);
    const text = query.size ? `?${query}`.replaceAll("%3A", ":") : "";
    history.replaceState(null, "", `#/placements/${this.id}${text}`);
  }

  #cell(cell) {
    const { placing, other } = this;
    const { came, left } = other === null ? { came: [], left: [] } : placing.changes(other, cell);
    const change = came.length || left.length
      ? `; compared: ${[came.length ? `gains ${came.join(", ")}` : "", left.length ? `loses ${left.join(", ")}` : ""].filter(Boolean).join(", ")}` : "";
    say(this.live, placing.sentence(cell) + change);
    this.#showDetail(cell, new Set(came), left);
  }

  #showDetail(cell, came, left) {
    const { placing } = this;
    const layer = Math.floor(cell / placing.devices);
    const held = [...new Set(placing.in(cell))];
    const loads = held.map((expert) => placing.loadOf(layer, expert));
    const order = held.map((_, place) => place).sort((one, two) => (loads[two] ?? 0) - (loads[one] ?? 0));
    this.detail.replaceChildren(
      el("h3", {}, `Layer ${placing.layerName(layer)}, device ${cell - layer * placing.devices}`),
      el("p", { class: "soft" }, placing.hasLoads ? `${fixed(placing.load[cell], 3)} times the mean load` : "Choose a trace to see loads."),
      el("ul", { class: "experts" },
        order.map((place) => this.#expertItem(layer, held[place], loads[place], came.has(held[place]))),
        left.map((expert) => el("li", { class: "left" }, el("span", {}, `expert ${expert}`), el("span", { class: "soft" }, "left")))));
  }

  #expertItem(layer, expert, load, isNew) {
    const copies = this.placing.numReplicas(layer, expert);
    const words = [copies > 1 ? `${copies} replicas` : null, load === null ? null : fixed(load, 3)].filter(Boolean).join(" · ");
    const name = el("button", { type: "button", class: "quiet", title: "Find it in every layer", onclick: () => { this.find.value = String(expert); this.#find(); } }, `expert ${expert}`);
    return el("li", {}, el("span", {}, name, isNew ? el("span", { class: "badge busy" }, "new") : null), el("span", { class: "soft" }, words));
  }

  async #save() {
    try {
      await save(`v1/placements/${encodeURIComponent(this.id)}`, `placement-${short(this.id)}.json`);
    } catch (error) { this.notice(told(error, "the placement"), "bad"); }
  }
}

export const title = () => "Placement";

/** Show the view. */
export function show({ parameters: [id], ...view }) {
  return new Explorer({ id, ...view }).start();
}
