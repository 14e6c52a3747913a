// The layer x device grid: one canvas for the cells, one above it for what is marked. No element per cell, so that
// fifty thousand of them answer within a frame.

import { el, say } from "./dom.js";

const LEAST_WIDTH = 4;
const MOST_WIDTH = 72;
const LEAST_HEIGHT = 9;
const MOST_HEIGHT = 34;
const LEFT = 46;
const TOP = 22;
const EDGE = 3;
const PAGE = 10;
const MOST_FRAMED = 4000;

const KEYS = {
  ArrowLeft: (at) => [at.layer, at.device - 1],
  ArrowRight: (at) => [at.layer, at.device + 1],
  ArrowUp: (at) => [at.layer - 1, at.device],
  ArrowDown: (at) => [at.layer + 1, at.device],
  PageUp: (at) => [at.layer - PAGE, at.device],
  PageDown: (at) => [at.layer + PAGE, at.device],
  Home: (at, all) => [all ? 0 : at.layer, 0],
  End: (at, all) => [all ? Infinity : at.layer, Infinity],
};

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

function measured(name, action) {
  const began = performance.now();
  action();
  performance.measure(name, { start: began, end: performance.now() });
}

const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

/** Colours of 256 steps between some of the style sheet. */
function ramp(names) {
  const style = getComputedStyle(document.documentElement);
  const stops = names.map((name) => channels(style.getPropertyValue(name).trim()));
  const table = new Uint32Array(256);
  for (let step = 0; step < 256; step += 1) {
    const at = (step / 255) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    const mix = stops[from].map((low, part) => Math.round(low + (stops[from + 1][part] - low) * (at - from)));
    table[step] = (255 << 24) | (mix[2] << 16) | (mix[1] << 8) | mix[0];
  }
  return table;
}

export const DIVERGING = ["--below-far", "--below", "--even", "--above", "--above-far"];
export const RISING = ["--even", "--rising", "--rising-far"];

export class Grid {
  #cells = el("canvas", { "aria-hidden": "true" });
  #marks = el("canvas", { "aria-hidden": "true", class: "marks" });
  #rings = el("canvas", { "aria-hidden": "true", class: "marks" });
  #sides = el("canvas", { "aria-hidden": "true", class: "sides" });
  #said = el("div", { role: "gridcell", id: "grid-cell" });
  #row = el("div", { role: "row", class: "sr" });
  #placing = null;
  #steps = null;
  #names = DIVERGING;
  #marked = null;
  #from = null;
  #at = { layer: 0, device: 0 };
  #hovered = null;
  #waiting = false;

  /** `host` is the element with role grid; `onCell` is called with the cell that is shown. */
  constructor(host, { onCell, signal }) {
    this.host = host;
    this.onCell = onCell;
    this.#row.append(this.#said);
    host.replaceChildren(this.#sides, el("div", { class: "stack" }, this.#cells, this.#marks, this.#rings), this.#row);
    host.setAttribute("aria-activedescendant", "grid-cell");
    const listen = (target, name, action) => target.addEventListener(name, action, { signal });
    listen(this.#rings, "pointermove", (event) => this.#hover(event));
    listen(this.#rings, "pointerleave", () => this.#leave());
    listen(this.#rings, "click", (event) => { const at = this.#under(event); if (at) { this.go(at.layer, at.device); } });
    listen(host, "keydown", (event) => this.#key(event));
    listen(host, "focus", () => this.#drawRings());
    listen(host, "blur", () => this.#drawRings());
    listen(matchMedia("(prefers-color-scheme: dark)"), "change", () => this.draw());
    const watcher = new ResizeObserver(() => { if (this.#placing && this.host.clientWidth !== this.drawnWidth) this.draw(); });
    watcher.observe(host);
    signal.addEventListener("abort", () => watcher.disconnect());
  }

  get cell() { return this.#at.layer * this.#placing.devices + this.#at.device; }

  /** Show a placement; `values` of every cell are 0 to 1 along the colours of `names`. */
  show(placing, values, names) {
    this.#placing = placing;
    this.#names = names;
    this.#steps = Uint8Array.from(values, (value) => Math.round(255 * clamp(value, 0, 1)));
    this.host.setAttribute("aria-rowcount", String(placing.layers));
    this.host.setAttribute("aria-colcount", String(placing.devices));
    this.#at = { layer: clamp(this.#at.layer, 0, placing.layers - 1), device: clamp(this.#at.device, 0, placing.devices - 1) };
    this.draw();
    this.#tell(this.#at);
  }

  /** Mark cells (1, or 2 with a frame as long as these are not too many), let the others step back; null for none. */
  mark(cells) {
    this.#marked = cells;
    this.framed = cells !== null && cells.reduce((sum, kind) => sum + (kind === 2 ? 1 : 0), 0) <= MOST_FRAMED;
    this.#drawMarks();
  }

  /** Go to a cell, and show where it comes from (a device of the same layer, or null). */
  go(layer, device, from = null) {
    const placing = this.#placing;
    this.#at = { layer: clamp(layer, 0, placing.layers - 1), device: clamp(device, 0, placing.devices - 1) };
    this.#from = from;
    this.#hovered = null;
    this.#reveal();
    this.#drawRings();
    this.#tell(this.#at);
  }

  /** Draw everything anew: another placement, size or theme. */
  draw() { measured("grid:draw", () => this.#drawAll()); }

  #drawAll() {
    const { layers, devices } = this.#placing;
    const style = getComputedStyle(this.host);
    this.drawnWidth = this.host.clientWidth;
    this.ink = style.getPropertyValue("--text").trim();
    this.soft = style.getPropertyValue("--muted").trim();
    this.ground = style.getPropertyValue("--panel").trim();
    this.font = `11px ${style.getPropertyValue("--font").trim()}`;
    this.width = clamp(Math.floor((this.drawnWidth - LEFT - 2 * EDGE) / devices), LEAST_WIDTH, MOST_WIDTH);
    this.height = clamp(Math.floor(560 / layers), LEAST_HEIGHT, MOST_HEIGHT);
    this.scale = Math.min(window.devicePixelRatio || 1, 2);
    const tall = TOP + this.height * layers + EDGE;
    for (const canvas of [this.#cells, this.#marks, this.#rings]) {
      this.#size(canvas, this.width * devices + 2 * EDGE, tall);
      canvas.getContext("2d").translate(EDGE, 0);
    }
    this.#size(this.#sides, LEFT, tall);
    this.#drawCells();
    this.#drawSides();
    this.#drawMarks();
    this.#drawRings();
  }

  #size(canvas, width, height) {
    canvas.width = width * this.scale;
    canvas.height = height * this.scale;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.getContext("2d").scale(this.scale, this.scale);
  }

  // One pixel a cell, drawn larger: a single copy, however many cells.
  #drawCells() {
    const { layers, devices } = this.#placing;
    const colours = ramp(this.#names);
    const image = new ImageData(devices, layers);
    const pixels = new Uint32Array(image.data.buffer);
    for (let cell = 0; cell < pixels.length; cell += 1) pixels[cell] = colours[this.#steps[cell]];
    const small = new OffscreenCanvas(devices, layers);
    small.getContext("2d").putImageData(image, 0, 0);
    const pen = this.#cells.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, 0, TOP, devices * this.width, layers * this.height);
    pen.fillStyle = this.ground;
    if (this.width >= 8) for (let device = 0; device <= devices; device += 1) pen.fillRect(device * this.width - 0.5, TOP, 1, layers * this.height);
    if (this.height >= 8) for (let layer = 0; layer <= layers; layer += 1) pen.fillRect(0, TOP + layer * this.height - 0.5, devices * this.width, 1);
    this.#drawDevices(pen);
  }

  #drawDevices(pen) {
    const { devices } = this.#placing;
    const every = [1, 2, 4, 8, 16, 32, 64, 128].find((step) => step * this.width >= 30) ?? 128;
    pen.font = this.font;
    pen.fillStyle = this.soft;
    pen.textAlign = "center";
    pen.textBaseline = "alphabetic";
    for (let device = 0; device < devices; device += every) {
      const centre = (device + 0.5) * this.width;
      const text = String(device);
      const half = pen.measureText(text).width / 2;
      if (centre + half <= devices * this.width) pen.fillText(text, Math.max(centre, half), TOP - 7);
    }
  }

  #drawSides() {
    const { layers } = this.#placing;
    const pen = this.#sides.getContext("2d");
    const every = Math.max(1, Math.ceil(13 / this.height));
    pen.font = this.font;
    pen.fillStyle = this.ground;
    pen.fillRect(0, 0, LEFT, TOP + layers * this.height + EDGE);
    pen.fillStyle = this.soft;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText("layer", LEFT - 8, TOP - 11);
    for (let layer = 0; layer < layers; layer += every) {
      pen.fillText(this.#placing.layerName(layer), LEFT - 8, TOP + (layer + 0.5) * this.height + 0.5);
    }
  }

  #drawMarks() {
    if (!this.#placing) return;
    const { layers, devices } = this.#placing;
    const pen = this.#marks.getContext("2d");
    pen.clearRect(-EDGE, 0, devices * this.width + 2 * EDGE, TOP + layers * this.height + EDGE);
    if (this.#marked) this.#drawMarked(pen, layers, devices);
  }

  // What moves with every key and the pointer has a canvas of its own.
  #drawRings() {
    if (!this.#placing) return;
    const pen = this.#rings.getContext("2d");
    pen.clearRect(-EDGE, 0, this.#placing.devices * this.width + 2 * EDGE, TOP + this.#placing.layers * this.height + EDGE);
    if (this.#from !== null) this.#drawSource(pen);
    if (this.#hovered) this.#ring(pen, this.#hovered, 1.5);
    this.#ring(pen, this.#at, document.activeElement === this.host ? 3 : 2);
  }

  #drawMarked(pen, layers, devices) {
    pen.globalAlpha = 0.82;
    pen.fillStyle = this.ground;
    pen.fillRect(0, TOP, devices * this.width, layers * this.height);
    pen.globalAlpha = 1;
    for (let layer = 0; layer < layers; layer += 1) {
      const top = TOP + layer * this.height;
      this.#runs(layer, 1, (from, to) => pen.clearRect(from * this.width, top, (to - from) * this.width, this.height));
    }
    if (this.framed) this.#frame(pen, layers, devices);
  }

  // Neighbours in one piece: where nearly all cells are marked, there are few.
  #runs(layer, least, action) {
    const { devices } = this.#placing;
    const first = layer * devices;
    let from = -1;
    for (let device = 0; device <= devices; device += 1) {
      const marked = device < devices && this.#marked[first + device] >= least;
      if (marked && from < 0) from = device;
      else if (!marked && from >= 0) {
        action(from, device);
        from = -1;
      }
    }
  }

  // A cell near the mean is as pale as those that step back.
  #frame(pen, layers, devices) {
    pen.fillStyle = this.ink;
    for (let cell = 0; cell < this.#marked.length; cell += 1) {
      if (this.#marked[cell] < 2) continue;
      const layer = Math.floor(cell / devices);
      const left = (cell - layer * devices) * this.width;
      const top = TOP + layer * this.height;
      pen.fillRect(left, top, this.width - 1, this.height - 1);
      pen.clearRect(left + 1, top + 1, this.width - 3, this.height - 3);
    }
  }

  #drawSource(pen) {
    const y = TOP + (this.#at.layer + 0.5) * this.height;
    const [from, to] = [this.#from, this.#at.device].map((device) => (device + 0.5) * this.width);
    this.#ring(pen, { layer: this.#at.layer, device: this.#from }, 1.5);
    for (const [colour, line] of [[this.ground, 5], [this.ink, 2]]) {
      pen.strokeStyle = pen.fillStyle = colour;
      pen.lineWidth = line;
      pen.beginPath();
      pen.moveTo(from, y);
      pen.lineTo(to, y);
      pen.stroke();
    }
  }

  #ring(pen, { layer, device }, line) {
    const place = [device * this.width - 1, TOP + layer * this.height - 1, this.width + 2, this.height + 2];
    pen.lineWidth = line + 2;
    pen.strokeStyle = this.ground;
    pen.strokeRect(...place);
    pen.lineWidth = line;
    pen.strokeStyle = this.ink;
    pen.strokeRect(...place);
  }

  #under(event) {
    const device = Math.floor((event.offsetX - EDGE) / this.width);
    const layer = Math.floor((event.offsetY - TOP) / this.height);
    const inside = device >= 0 && layer >= 0 && device < this.#placing?.devices && layer < this.#placing?.layers;
    return inside ? { layer, device } : null;
  }

  #hover(event) {
    const at = this.#under(event);
    const known = this.#hovered;
    if (at?.layer === known?.layer && at?.device === known?.device) return;
    this.#hovered = at;
    if (this.#waiting) return;
    this.#waiting = true;
    requestAnimationFrame(() => {
      this.#waiting = false;
      measured("grid:hover", () => {
        this.#drawRings();
        this.#tell(this.#hovered ?? this.#at);
      });
    });
  }

  #leave() {
    if (!this.#hovered) return;
    this.#hovered = null;
    this.#drawRings();
    this.#tell(this.#at);
  }

  #key(event) {
    const step = KEYS[event.key];
    if (!step || event.altKey || event.metaKey || !this.#placing) return;
    event.preventDefault();
    measured("grid:key", () => this.go(...step(this.#at, event.ctrlKey)));
  }

  #reveal() {
    const left = LEFT + this.#at.device * this.width;
    if (left - LEFT < this.host.scrollLeft) this.host.scrollLeft = left - LEFT - this.width;
    const right = left + 2 * this.width;
    if (right > this.host.scrollLeft + this.host.clientWidth) this.host.scrollLeft = right - this.host.clientWidth;
    const top = TOP + this.#at.layer * this.height;
    if (top - TOP < this.host.scrollTop) this.host.scrollTop = top - TOP;
    if (top + this.height > this.host.scrollTop + this.host.clientHeight) this.host.scrollTop = top + this.height + 2 - this.host.clientHeight;
  }

  #tell(at) {
    const cell = at.layer * this.#placing.devices + at.device;
    this.#row.setAttribute("aria-rowindex", String(at.layer + 1));
    this.#said.setAttribute("aria-colindex", String(at.device + 1));
    say(this.#said, this.#placing.sentence(cell));
    this.onCell(cell);
  }
}
