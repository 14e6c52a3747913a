// A placement as the explorer sees it: which experts sit on which device of which layer, and under which load.
// A cell is a layer and a device: number layer * devices + device.

import { fixed, several } from "./words.js";

/** A placement, from the answer of `/v1/placements/{id}/grid`. */
export class Placing {
  constructor(told) {
    this.layers = told.num_layers;
    this.experts = told.num_experts;
    this.devices = told.num_devices;
    this.slots = told.num_slots;
    this.model = told.model_name;
    this.layerIds = told.moe_layer_ids ?? null;
    this.balances = told.balance_L;
    this.hasLoads = told.load_LD !== null && told.load_LD !== undefined;
    this.expertLoad = told.load_LE ?? null;
    this.load = this.hasLoads ? Float32Array.from(told.load_LD.flat()) : null;
    this.#place(told.expert_LS, told.device_of_slot);
  }

  get cells() { return this.layers * this.devices; }

  // Experts of all cells in one array, each cell's sorted; `first[cell]` is where a cell begins.
  #place(slots, deviceOf) {
    const perLayer = this.devices;
    this.first = new Uint32Array(this.cells + 1);
    this.replicas = new Uint16Array(this.layers * this.experts);
    slots.forEach((layerSlots, layer) => layerSlots.forEach((expert, slot) => {
      if (expert < 0) return;
      this.first[layer * perLayer + deviceOf[slot] + 1] += 1;
      this.replicas[layer * this.experts + expert] += 1;
    }));
    for (let cell = 0; cell < this.cells; cell += 1) this.first[cell + 1] += this.first[cell];
    this.held = new Int32Array(this.first[this.cells]);
    const next = this.first.slice(0, this.cells);
    slots.forEach((layerSlots, layer) => layerSlots.forEach((expert, slot) => {
      if (expert >= 0) this.held[next[layer * perLayer + deviceOf[slot]]++] = expert;
    }));
    for (let cell = 0; cell < this.cells; cell += 1) this.in(cell).sort();
  }

  /** Experts of a cell, ascending; one that has two slots of the device comes twice. */
  in(cell) { return this.held.subarray(this.first[cell], this.first[cell + 1]); }

  layerName(layer) { return String(this.layerIds?.[layer] ?? layer); }

  numReplicas(layer, expert) { return this.replicas[layer * this.experts + expert]; }

  /** Share of an expert's load that one replica takes, in mean device loads; null without loads. */
  loadOf(layer, expert) {
    return this.expertLoad === null ? null : this.expertLoad[layer][expert] / this.numReplicas(layer, expert);
  }

  /** Share of a cell's slots that hold experts with other replicas. */
  replicatedShare(cell) {
    const layer = Math.floor(cell / this.devices);
    const held = this.in(cell);
    let replicated = 0;
    for (const expert of held) if (this.numReplicas(layer, expert) > 1) replicated += 1;
    return held.length ? replicated / held.length : 0;
  }

  /** One sentence on a cell. */
  sentence(cell) {
    const layer = Math.floor(cell / this.devices);
    const held = [...new Set(this.in(cell))];
    const load = this.hasLoads ? `, load ${fixed(this.load[cell], 2)} times the mean` : "";
    const names = held.map((expert) => {
      const share = this.loadOf(layer, expert);
      const copies = this.numReplicas(layer, expert);
      const told = [share === null ? null : fixed(share, 2), copies > 1 ? `${copies} replicas` : null].filter(Boolean);
      return told.length ? `${expert} (${told.join(", ")})` : String(expert);
    });
    const device = cell - layer * this.devices;
    const what = held.length ? `${several(held.length, "expert")}: ${names.join(", ")}` : "no experts";
    return `layer ${this.layerName(layer)}, device ${device}${load}, ${what}`;
  }

  /** Cells with a replica of an expert; how many replicas there are, in how many layers. */
  find(expert) {
    const cells = new Uint8Array(this.cells);
    let replicas = 0;
    let layers = 0;
    for (let layer = 0; layer < this.layers; layer += 1) {
      const copies = this.numReplicas(layer, expert);
      replicas += copies;
      layers += copies > 0 ? 1 : 0;
    }
    for (let cell = 0; cell < this.cells; cell += 1) if (this.#holds(cell, expert)) cells[cell] = 2;
    return { cells, replicas, layers };
  }

  #holds(cell, expert) {
    for (let place = this.first[cell]; place < this.first[cell + 1]; place += 1) {
      if (this.held[place] === expert) return true;
    }
    return false;
  }

  fits(other) {
    return this.layers === other.layers && this.devices === other.devices && this.experts === other.experts;
  }

  /** Cells that hold other experts than those of another placement: 1 where experts only leave, 2 where some come. */
  differing(other) {
    const cells = new Uint8Array(this.cells);
    let differing = 0;
    for (let cell = 0; cell < this.cells; cell += 1) {
      cells[cell] = this.#differs(other, cell);
      if (cells[cell]) differing += 1;
    }
    return { cells, differing };
  }

  // As `changes`, without arrays of its own: it is asked of every cell.
  #differs(other, cell) {
    let one = this.first[cell];
    let two = other.first[cell];
    const [end, otherEnd] = [this.first[cell + 1], other.first[cell + 1]];
    let left = 0;
    while (one < end) {
      if (two >= otherEnd || this.held[one] < other.held[two]) return 2;
      if (this.held[one] === other.held[two]) one += 1;
      else left = 1;
      two += 1;
    }
    return two < otherEnd ? 1 : left;
  }

  /** Experts that a cell has and another placement's has not, and the other way round. */
  changes(other, cell) {
    const here = this.in(cell);
    const there = other.in(cell);
    const came = [];
    const left = [];
    let one = 0;
    let two = 0;
    while (one < here.length || two < there.length) {
      if (two >= there.length || (one < here.length && here[one] < there[two])) came.push(here[one++]);
      else if (one >= here.length || there[two] < here[one]) left.push(there[two++]);
      else { one += 1; two += 1; }
    }
    return { came, left };
  }

  /** What is known at a glance: names and values. */
  overview() {
    const spare = this.slots - this.experts;
    const told = [
      ["Model", this.model ?? "not named"],
      ["MoE layers", String(this.layers)],
      ["Experts per layer", String(this.experts)],
      ["Devices", String(this.devices)],
      [spare > 0 ? `Slots per layer, ${spare} spare` : "Slots per layer", String(this.slots)],
    ];
    if (this.balances) {
      const mean = this.balances.reduce((sum, value) => sum + value, 0) / this.balances.length;
      const worst = this.balances.indexOf(Math.max(...this.balances));
      told.push(["Fullest device / mean, over layers", fixed(mean, 3)]);
      told.push(["Worst layer", `${this.layerName(worst)} (${fixed(this.balances[worst], 3)})`]);
    }
    return told;
  }
}
