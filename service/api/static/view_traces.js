// `#/traces`: what is stored, and a way to store more.

import { ask, poll, upload } from "./api.js";
import { needsSubmit, told } from "./dialogs.js";
import { command, el, empty, field, fill, row, say, table } from "./dom.js";
import { bytes, count, several, short, when } from "./words.js";

const EVERY_MS = 5000;

function traceRow(one) {
  return row([
    [el("a", { href: `#/traces/${one.id}`, title: one.id }, short(one.id)), "id"],
    one.model_name ?? "not named", one.format, [count(one.num_layers), "n"], [count(one.num_experts), "n"],
    [count(one.top_k), "n"], [count(one.num_tokens), "n"], [bytes(one.size_bytes), "n"], one.created_by, [when(one.created_at), "t"],
  ]);
}

/** A field that stores files of one kind. */
export function uploader({ label, help, path, done, signal }) {
  const control = needsSubmit(el("input", { type: "file" }), signal);
  const note = el("p", { class: "help", role: "status" });
  const made = el("div", { class: "panel upload" }, field("file", label, control, help), note);
  control.addEventListener("change", async () => {
    const [file] = control.files;
    if (!file) return;
    const error = made.querySelector("#file-error");
    say(error, "");
    say(note, `Uploading ${file.name} ...`);
    try {
      const stored = await upload(path, file, { signal });
      say(note, `${file.name} is stored as ${short(stored.id)}.`);
      done(stored);
    } catch (problem) {
      if (signal.aborted) return;
      say(note, "");
      say(error, told(problem, "the service"));
    }
    control.value = "";
  });
  return made;
}

export const title = () => "Traces";

/** Show the view. */
export function show({ root, signal, ready, failed }) {
  const listed = table("traces", "Traces", ["trace", "model", "format", "#layers", "#experts", "#top k", "#tokens", "#size", "by", "stored"]);
  const none = empty("No trace yet", el("p", {}, "A trace says which experts the router chose. Record one, then upload it here or by submit:"),
    command("moe-placement trace record --model DIR --text FILE -o trace"));
  const summary = el("p", { class: "soft", role: "status" });
  listed.hidden = none.hidden = true;
  const storing = uploader({ label: "Trace file", help: "Any format that the command line reads, or a data set as one .tar or .zip.", path: "v1/traces", done: () => renew(), signal });
  root.append(el("p", { class: "lead" }, "What the models' routers did: the ground of every placement."), storing, none, listed, summary);
  const renew = poll(async () => {
    try {
      const found = await ask("v1/traces?limit=200", { signal });
      none.hidden = found.items.length > 0;
      listed.hidden = found.items.length === 0;
      say(summary, found.next_cursor ? `The newest ${several(found.items.length, "trace")}.` : "");
      fill(listed, found.items, (one) => one.id, traceRow);
      ready();
    } catch (error) { failed(error); }
  }, { every: EVERY_MS, signal });
}
