// Listens to a solve: server-sent events over fetch, since EventSource cannot send a token.

import { NoAnswer, isAborted, problemOf, request, session } from "./api.js";

const SILENCE_MS = 45000;
const LONGEST_WAIT_MS = 5000;

/** Parts of a stream of events: feed text, get events. */
class Parser {
  #rest = "";
  #event = { kind: "message", data: [], id: null };
  retry = 1000;

  *feed(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        if (this.#event.data.length) yield { ...this.#event, data: JSON.parse(this.#event.data.join("\n")) };
        this.#event = { kind: "message", data: [], id: null };
      } else this.#field(line);
    }
  }

  #field(line) {
    const at = line.indexOf(":");
    if (at === 0) return;
    const name = at < 0 ? line : line.slice(0, at);
    const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
    if (name === "event") this.#event.kind = value;
    else if (name === "data") this.#event.data.push(value);
    else if (name === "id") this.#event.id = Number(value);
    else if (name === "retry") this.retry = Number(value) || this.retry;
  }
}

const pause = (ms, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
});

const nextToken = (signal) => new Promise((resolve) => {
  session.addEventListener("token", resolve, { once: true, signal });
  signal.addEventListener("abort", resolve, { once: true });
});

/**
 * Follow a solve to its last event. What is lost on the way is asked for again by the number of the last event that
 * came, so that none is missed and none comes twice.
 *
 * onEvent: called with {kind, id, data}. onState: called with "live", "reconnecting" or "ended".
 */
export async function follow(solveId, { signal, onEvent, onState }) {
  let last = 0;
  let failures = 0;
  while (!signal.aborted) {
    const silence = new AbortController();
    const both = AbortSignal.any([signal, silence.signal]);
    let retry = 1000;
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": String(last) } : {}) };
      const answer = await request(`v1/solves/${solveId}/events`, { headers, signal: both, patience: 0 });
      if (answer.status === 204) { onState("ended"); return; }
      if (!answer.ok) throw await problemOf(answer);
      onState("live");
      failures = 0;
      const parser = new Parser();
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let timer = setTimeout(() => silence.abort(), SILENCE_MS);
      try {
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          clearTimeout(timer);
          timer = setTimeout(() => silence.abort(), SILENCE_MS);
          for (const event of parser.feed(value)) {
            if (event.id !== null && event.id <= last) continue;
            last = event.id ?? last;
            onEvent(event);
            if (event.kind === "done") { onState("ended"); return; }
          }
        }
      } finally {
        clearTimeout(timer);
        retry = parser.retry;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) {
        onState("reconnecting");
        await nextToken(signal);
        continue;
      }
      if (error.status === 404 || error.status === 403) { onState("ended"); return; }
      // A service that was set back knows fewer events than we do.
      if (error.status === 422) last = 0;
      const expected = error instanceof NoAnswer || error instanceof TypeError || isAborted(error) || error.status >= 400;
      if (!expected) throw error;
    }
    if (signal.aborted) return;
    onState("reconnecting");
    await pause(Math.min(retry * 1.5 ** failures, LONGEST_WAIT_MS), signal);
    failures += 1;
  }
}
