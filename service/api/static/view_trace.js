// `#/traces/ID`: what a trace holds, as facts and figures.

import { ask, until } from "./api.js";
import { el, facts, put, say, section } from "./dom.js";
import { figureBlock, showFigure } from "./figures.js";
import { bytes, count, when } from "./words.js";

const known = (trace) => [
  ["Id", el("span", { class: "id wrap" }, trace.id)], ["Model", trace.model_name ?? "not named"], ["Format", trace.format],
  ["MoE layers", count(trace.num_layers)], ["Experts per layer", count(trace.num_experts)], ["Experts per token", count(trace.top_k)],
  ["Tokens", count(trace.num_tokens)], ["Size", bytes(trace.size_bytes)], ["Stored", when(trace.created_at)], ["By", trace.created_by],
];

export const title = () => "Trace";

/** Show the view. */
export async function show({ root, parameters: [id], signal, ready, failed }) {
  const place = el("div", {});
  const note = el("p", { id: "figures-note", class: "soft", role: "status" }, "Reading the trace ...");
  const figures = el("div", { class: "figures" });
  const path = `v1/traces/${encodeURIComponent(id)}`;
  root.append(el("div", { class: "buttons start" }, el("a", { class: "button primary", href: `#/solves/new?trace=${id}` }, "Solve with this trace")),
    section("Facts", {}, place), section("Figures", {}, note, figures));
  const trace = await until(() => ask(path, { signal }), { signal, failed });
  const list = facts(known(trace), { id: "facts", class: "facts panel" });
  place.replaceChildren(list);
  ready();
  const told = await until(() => ask(`${path}/figures`, { signal }), {
    signal,
    failed: (error) => {
      if (error.status && error.status !== 401) say(note, `The figures cannot be drawn: ${error.message}`);
      else failed(error);
    },
  });
  const names = new Set(known(trace).map(([name]) => name.toLowerCase()));
  const more = Object.entries(told.facts ?? {}).filter(([name]) => !names.has(name.toLowerCase()));
  put(list, more.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
  say(note, told.figures.length ? "" : "There is nothing to draw.");
  for (const one of told.figures) {
    if (signal.aborted) return;
    const block = figureBlock(one.name, one.title, { level: "h3" });
    figures.append(block.block);
    await showFigure(block, one, signal);
  }
}
