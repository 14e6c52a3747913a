// Numbers, times and names as people read them.

import { el } from "./dom.js";

export const number = (value, digits = 4) =>
  (typeof value === "number" && Number.isFinite(value) ? Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 }) : "");

export const fixed = (value, digits = 3) => (typeof value === "number" && Number.isFinite(value) ? value.toFixed(digits) : "");

export const count = (value) => (typeof value === "number" ? value.toLocaleString("en") : "");

export const percent = (value) => (typeof value === "number" && Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "");

/** "1 move", "2 moves". */
export const several = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

export function bytes(value) {
  if (typeof value !== "number") return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

export function span(seconds) {
  if (typeof seconds !== "number") return "";
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

/** A value of an objective with its unit: seconds in a unit that suits them. */
export function quantity(value, unit) {
  if (typeof value !== "number") return "";
  if (unit !== "s") return unit && unit !== "max/mean" ? `${number(value)} ${unit}` : number(value);
  if (value >= 1) return `${number(value)} s`;
  return value >= 1e-3 ? `${number(value * 1e3)} ms` : `${number(value * 1e6)} µs`;
}

function ago(seconds) {
  const passed = Date.now() / 1000 - seconds;
  return passed < 10 ? "just now" : `${span(Math.floor(passed))} ago`;
}

/** How long ago a time was; kept true by `tick`. */
export function when(seconds) {
  if (typeof seconds !== "number") return "";
  const moment = new Date(seconds * 1000);
  const made = el("time", { datetime: moment.toISOString(), title: moment.toLocaleString() }, ago(seconds));
  made.dataset.since = String(seconds);
  return made;
}

/** Renew all times on the page. */
export function tick() {
  for (const made of document.querySelectorAll("time[data-since]")) {
    const text = ago(Number(made.dataset.since));
    if (made.textContent !== text) made.textContent = text;
  }
}

/** The beginning of a digest, the end of a job's id: enough to tell them apart. */
export function short(id) {
  if (!id) return "";
  return id.startsWith("sha256:") ? id.slice(7, 17) : `${id.slice(0, 2)}…${id.slice(-6)}`;
}

export const STATUS = {
  queued: ["queued", ""],
  running: ["running", "busy"],
  succeeded: ["succeeded", "good"],
  stopped: ["stopped", "warn"],
  failed: ["failed", "bad"],
  timed_out: ["timed out", "bad"],
};

/** Topology as text: it may be an object. */
export const topologyText = (topology) => (typeof topology === "string" ? topology : "as given in a file");

/** Model as text: a preset's name, or the sizes that were given. */
export function modelText(model) {
  if (model === null || model === undefined) return "";
  if (typeof model === "string") return model;
  if (typeof model.name === "string") return model.name;
  return "layers" in model ? `${model.layers} layers, ${model.experts} experts, top ${model.top_k}` : "as given in a file";
}
