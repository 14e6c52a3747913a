// `#/placements`: what is stored, and a way to store more.

import { ask, poll } from "./api.js";
import { el, empty, fill, row, say, table } from "./dom.js";
import { uploader } from "./view_traces.js";
import { bytes, count, several, short, when } from "./words.js";

const EVERY_MS = 5000;

function placementRow(one) {
  return row([
    [el("a", { href: `#/placements/${one.id}`, title: one.id }, short(one.id)), "id"],
    one.model_name ?? "not named", [count(one.num_layers), "n"], [count(one.num_experts), "n"], [count(one.num_devices), "n"],
    [count(one.num_slots), "n"], [bytes(one.size_bytes), "n"], one.created_by, [when(one.created_at), "t"],
  ]);
}

export const title = () => "Placements";

/** Show the view. */
export function show({ root, signal, ready, failed }) {
  const listed = table("placements", "Placements", ["placement", "model", "#layers", "#experts", "#devices", "#slots", "#size", "by", "stored"]);
  const none = empty("No placement yet", el("p", {}, "Every solve stores the placements that it finds. ", el("a", { href: "#/solves/new" }, "Start a solve"), ", or upload a file above."));
  const summary = el("p", { class: "soft", role: "status" });
  listed.hidden = none.hidden = true;
  const storing = uploader({ label: "Placement file", help: "Ours, or that of an engine.", path: "v1/placements", done: () => renew(), signal });
  root.append(el("p", { class: "lead" }, "Which expert sits on which device: found by solves, or uploaded."), storing, none, listed, summary);
  const renew = poll(async () => {
    try {
      const found = await ask("v1/placements?limit=200", { signal });
      none.hidden = found.items.length > 0;
      listed.hidden = found.items.length === 0;
      say(summary, found.next_cursor ? `The newest ${several(found.items.length, "placement")}.` : "");
      fill(listed, found.items, (one) => one.id, placementRow);
      ready();
    } catch (error) { failed(error); }
  }, { every: EVERY_MS, signal });
}
