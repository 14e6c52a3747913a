// `#/solves/new`: ask for a solve; what is wrong is said beside its field.

import { ask, send, until, upload } from "./api.js";
import { needsSubmit, told } from "./dialogs.js";
import { el, field, option, say } from "./dom.js";
import { count, several, short } from "./words.js";

const OBJECTIVES = [
  ["step-time", "step time (needs the model's sizes)"],
  ["balance", "balance: fullest device / mean"],
  ["traffic", "traffic between devices"],
];
const SEMANTICS = ["dispatch", "dispatch-nodedup", "stay-put", "allgather"];

/** Which field a problem without a place is about, by its words. */
const ABOUT = [
  [/trace/i, "trace_id"], [/device kind|topology|nodes/i, "topology"], [/sizes|model/i, "model"], [/slot/i, "spare_slots"],
  [/window/i, "window"], [/moves/i, "max_moves"], [/start|placement/i, "start_placement_id"], [/time.limit|seconds/i, "time_limit"],
  [/thread/i, "threads"],
];

const input = (type, attributes = {}) => el("input", { type, autocomplete: "off", ...attributes });

/** What a trace is, in a line of a select. */
export const traceText = (one) =>
  `${one.model_name ?? "unnamed model"}: ${one.num_layers} layers, ${one.num_experts} experts, ${count(one.num_tokens)} tokens (${short(one.id)})`;

class Form {
  #traces = [];

  constructor({ signal, chosen }) {
    this.signal = signal;
    this.chosen = chosen;
    this.controls = {
      trace_id: el("select", { required: true, onchange: () => this.#traceChosen() }),
      file: input("file", { onchange: () => this.#upload() }),
      topology: input("text", { required: true, placeholder: "h100:1x8", list: "topologies", spellcheck: "false" }),
      objective: el("select", {}, OBJECTIVES.map(([value, text]) => option(value, text))),
      spare_slots: input("number", { min: "0", value: "0" }),
      time_limit: input("number", { min: "0.1", step: "any", value: "30" }),
      model: input("text", { placeholder: "the trace's own", spellcheck: "false" }),
      semantics: el("select", {}, SEMANTICS.map((value) => option(value, value))),
      window: input("number", { min: "1", placeholder: "4096, less for short traces" }),
      threads: input("number", { min: "1", value: "1" }),
      seed: input("number", { min: "0", value: "0" }),
      start_placement_id: input("text", { placeholder: "none", spellcheck: "false" }),
      max_moves: input("number", { min: "0", placeholder: "any number" }),
    };
    this.error = el("p", { id: "submit-error", class: "error", role: "alert" });
    this.note = el("p", { id: "submit-note", class: "help", role: "status" });
    this.check = needsSubmit(el("button", { type: "button", onclick: () => this.#send(true) }, "Check"), signal);
    this.solve = needsSubmit(el("button", { class: "primary" }, "Solve"), signal);
    this.more = el("details", {}, el("summary", {}, "More options"), el("div", { class: "fields" }, ...this.#moreFields()));
    // Checked by the service, which says it in full.
    this.form = el("form", { id: "submit-form", class: "panel", novalidate: true, "aria-label": "New solve", onsubmit: (event) => { event.preventDefault(); this.#send(false); } },
      el("div", { class: "fields" }, ...this.#fields()), this.more,
      el("datalist", { id: "topologies" }, ["h100:1x8", "h100:2x8", "h200:4x8", "b200:8x8", "mi300x:1x8"].map((one) => el("option", { value: one }))),
      this.error, this.note, el("div", { class: "buttons" }, this.check, this.solve));
  }

  #fields() {
    const { controls } = this;
    return [
      field("trace_id", "Trace", controls.trace_id, "The recorded routing that the placement is to suit."),
      field("file", "Trace file", controls.file, "Or upload one: any format that the command line reads."),
      field("topology", "Topology", controls.topology, "KIND:NODESxDEVICES, such as h100:2x8 or a40:1x2+v100:1x2."),
      field("objective", "Objective", controls.objective, "What is to become small."),
      field("spare_slots", "Spare slots", controls.spare_slots, "Per layer, beyond one per expert: room for replicas."),
      field("time_limit", "Time limit", controls.time_limit, "Seconds; it can be stopped earlier."),
    ];
  }

  #moreFields() {
    const { controls } = this;
    return [
      field("model", "Model", controls.model, "Name of a preset with the sizes, such as deepseek-v3."),
      field("semantics", "Semantics", controls.semantics, "How the engine sends tokens to experts."),
      field("window", "Window", controls.window, "Tokens of one step."),
      field("threads", "Threads", controls.threads),
      field("seed", "Seed", controls.seed),
      field("start_placement_id", "Start from placement", controls.start_placement_id, "Id of a placement or a solve."),
      field("max_moves", "Most moves", controls.max_moves, "Expert copies, away from the start."),
    ];
  }

  /** Fill in the stored traces. */
  async load() {
    this.#traces = (await ask("v1/traces?limit=200", { signal: this.signal })).items;
    const kept = this.controls.trace_id.value || this.chosen;
    const none = this.#traces.length ? "choose one" : "none stored yet: upload one";
    this.controls.trace_id.replaceChildren(option("", none), ...this.#traces.map((one) => option(one.id, traceText(one), one.id === kept)));
    if (this.controls.trace_id.value) this.#traceChosen();
  }

  #traceChosen() {
    const trace = this.#traces.find((one) => one.id === this.controls.trace_id.value);
    this.#wrong("trace_id", "");
    // Without sizes there is no step time: what works is proposed.
    if (trace && !trace.model_name && !this.controls.model.value) this.controls.objective.value = "balance";
  }

  async #upload() {
    const [file] = this.controls.file.files;
    if (!file) return;
    this.#wrong("file", "");
    say(this.note, `Uploading ${file.name} ...`);
    try {
      const stored = await upload("v1/traces", file, { signal: this.signal });
      this.chosen = stored.id;
      this.controls.trace_id.value = "";
      await this.load();
      say(this.note, `${file.name} is stored: ${several(stored.num_layers, "layer")}, ${count(stored.num_experts)} experts, ${count(stored.num_tokens)} tokens.`);
    } catch (error) {
      if (this.signal.aborted) return;
      say(this.note, "");
      this.#wrong("file", told(error, "the service"));
    }
  }

  #body() {
    const { controls } = this;
    const numberOf = (name) => (controls[name].value === "" ? null : Number(controls[name].value));
    return {
      trace_id: controls.trace_id.value,
      topology: controls.topology.value.trim(),
      model: controls.model.value.trim() || null,
      start_placement_id: controls.start_placement_id.value.trim() || null,
      options: {
        objective: controls.objective.value,
        semantics: controls.semantics.value,
        spare_slots: numberOf("spare_slots") ?? 0,
        time_limit: numberOf("time_limit"),
        window: numberOf("window"),
        threads: numberOf("threads") ?? 1,
        seed: numberOf("seed") ?? 0,
        max_moves: numberOf("max_moves"),
      },
    };
  }

  // What the service would only say about the form of an id is said in plain words.
  #lacks() {
    if (!this.controls.trace_id.value) this.#wrong("trace_id", "Choose a trace, or upload one.");
    if (!this.controls.topology.value.trim()) this.#wrong("topology", "Say which devices there are, such as h100:1x8.");
    return this.#focusWrong();
  }

  async #send(onlyCheck) {
    this.#clear();
    if (this.#lacks()) return;
    this.check.disabled = this.solve.disabled = true;
    say(this.note, onlyCheck ? "Checking ..." : "Queueing ...");
    try {
      const answer = await send("POST", "v1/solves", { ...this.#body(), validate_only: onlyCheck }, { signal: this.signal });
      if (onlyCheck) this.#checked(answer);
      else location.hash = `#/solves/${answer.id}`;
    } catch (error) {
      if (this.signal.aborted) return;
      say(this.note, "");
      this.#refused(error);
    } finally {
      this.check.disabled = this.solve.disabled = false;
    }
  }

  #checked({ valid, result }) {
    const what = valid ? `This can be solved: ${several(result.layers, "layer")}, ${count(result.experts)} experts in ${count(result.slots)} slots on ${several(result.devices, "device")}, ${several(result.windows, "window")}.`
      : "Not checked yet; the service is busy.";
    say(this.note, [what, ...(result?.notes ?? []).map((one) => `Note: ${one}.`)].join(" "));
  }

  #refused(problem) {
    for (const { where, what } of problem.errors ?? []) {
      const name = where.split(".").pop();
      if (name in this.controls) this.#wrong(name, what);
    }
    if (!this.#focusWrong()) {
      const about = problem.status >= 400 && problem.status < 500 && ![401, 403, 429].includes(problem.status)
        ? ABOUT.find(([words]) => words.test(problem.message)) : undefined;
      if (about) this.#wrong(about[1], problem.message);
      if (!this.#focusWrong()) say(this.error, told(problem, "the service"));
    }
  }

  #wrong(name, text) {
    say(this.form.querySelector(`#${name}-error`), text && text[0].toUpperCase() + text.slice(1));
    if (text) this.controls[name].setAttribute("aria-invalid", "true");
    else this.controls[name].removeAttribute("aria-invalid");
  }

  #clear() {
    say(this.error, "");
    for (const name of Object.keys(this.controls)) this.#wrong(name, "");
  }

  #focusWrong() {
    const wrong = this.form.querySelector("[aria-invalid=true]");
    if (wrong === null) return false;
    if (this.more.contains(wrong)) this.more.open = true;
    wrong.focus();
    return true;
  }
}

export const title = () => "New solve";

/** Show the view. */
export async function show({ root, signal, query, ready, failed }) {
  const form = new Form({ signal, chosen: query.get("trace") });
  if (query.has("start")) form.controls.start_placement_id.value = query.get("start");
  if (query.has("start")) form.more.open = true;
  root.append(el("p", { class: "lead" }, "Search the placement of experts that suits a recorded traffic and a cluster best."), form.form);
  await until(() => form.load(), { signal, failed });
  ready();
}
