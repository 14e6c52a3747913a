// Speaks with the service: requests with the reader's token, and what became of them.

const TOKEN = "moe-placement-token";
const PATIENCE_MS = 30000;

/** An answer that says what is wrong (RFC 9457). */
export class Problem extends Error {
  constructor(status, told) {
    super(told.detail ?? `HTTP ${status}`);
    this.status = status;
    this.code = told.code ?? "";
    this.errors = told.errors ?? [];
  }
}

/** Nobody answered: the service is away, or the connection is. */
export class NoAnswer extends Error {}

/** The request was given up, since its view is gone. */
export const isAborted = (error) => error instanceof DOMException && error.name === "AbortError";

/** Tells the page: "answered", "away", "refused" (detail: why), "token", "scope". */
export const session = new EventTarget();

const tell = (name, detail) => session.dispatchEvent(new CustomEvent(name, { detail }));

let lacksSubmit = false;
let isRefused = false;

const held = () => sessionStorage.getItem(TOKEN);
const bearer = (text) => (text === null ? {} : { Authorization: `Bearer ${text}` });

export const token = {
  get held() { return held() !== null; },
  /** Whether the service wants another token than it was given; nothing is asked by itself until it has it. */
  get isRefused() { return isRefused; },
  /** Whether it is known that it may not change anything. */
  get lacksSubmit() { return lacksSubmit; },
  /** Keep a token once it has been taken; rejects with why it was not. */
  async use(text) {
    const answer = await request("v1/status", { headers: bearer(text) });
    if (!answer.ok) throw await problemOf(answer);
    const { scopes } = await answer.json();
    sessionStorage.setItem(TOKEN, text);
    changed();
    token.learn(scopes);
  },
  /** Take what the service says that the reader may do. */
  learn(scopes) {
    lacksSubmit = !scopes.includes("submit");
    tell("scope");
  },
  forget() {
    sessionStorage.removeItem(TOKEN);
    changed();
  },
};

function changed() {
  lacksSubmit = isRefused = false;
  tell("token");
  tell("scope");
}

/** Send a request; resolves to the response, whatever its status. */
export async function request(path, { method = "GET", headers = {}, body, signal, patience = PATIENCE_MS } = {}) {
  const signals = [signal, patience ? AbortSignal.timeout(patience) : undefined].filter(Boolean);
  const sent = held();
  let answer;
  try {
    answer = await fetch(path, {
      method,
      body,
      headers: { ...bearer(sent), ...headers },
      credentials: "omit",
      cache: "no-cache",
      signal: signals.length ? AbortSignal.any(signals) : undefined,
    });
  } catch (error) {
    if (isAborted(error)) throw error;
    tell("away");
    throw new NoAnswer("The service does not answer.");
  }
  // Of a proxy that does not reach the service.
  if (answer.status === 502 || answer.status === 504) {
    tell("away");
    throw new NoAnswer("The service does not answer.");
  }
  tell("answered");
  answer.sent = headers.Authorization === undefined ? sent : undefined;
  return answer;
}

/** The problem that an answer tells of; that another token is needed is made known to the page. */
export async function problemOf(answer) {
  let told = {};
  try {
    told = await answer.json();
  } catch {
    told = { detail: `HTTP ${answer.status} ${answer.statusText}`.trim() };
  }
  const problem = new Problem(answer.status, told);
  // An answer to a token that has been replaced meanwhile says nothing of the new one.
  if (answer.status === 401 && answer.sent === held()) {
    isRefused = true;
    sessionStorage.removeItem(TOKEN);
    tell("refused", answer.sent === null ? "" : problem.message);
  }
  if (answer.status === 403 && /scope submit/.test(problem.message)) {
    lacksSubmit = true;
    tell("scope");
  }
  return problem;
}

async function checked(path, options, taken = []) {
  const answer = await request(path, options);
  if (!answer.ok && !taken.includes(answer.status)) throw await problemOf(answer);
  return answer;
}

/** Get JSON. `taken` are statuses that are answers, too. */
export async function ask(path, { signal, taken } = {}) {
  const answer = await checked(path, { signal }, taken);
  try {
    return await answer.json();
  } catch (error) {
    if (isAborted(error)) throw error;
    // The connection ended within the answer.
    tell("away");
    throw new NoAnswer("The service does not answer.");
  }
}

/** Send JSON; resolves to the JSON of the answer. */
export async function send(method, path, document, { headers = {}, signal } = {}) {
  const body = document === undefined ? undefined : JSON.stringify(document);
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await checked(path, { method, body, headers: { ...type, ...headers }, signal, patience: 120000 });
  return answer.status === 204 ? null : answer.json();
}

/** Send a file as it is; resolves to the JSON of the answer. */
export async function upload(path, file, { signal } = {}) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await checked(path, { method: "POST", body: file, headers, signal, patience: 0 })).json();
}

// A link cannot carry the token: fetched here, and handed over as a file.
/** Save what is at a path under a name. */
export async function save(path, name) {
  const blob = await (await checked(path, {})).blob();
  const made = document.createElement("a");
  made.href = URL.createObjectURL(blob);
  made.download = name;
  made.click();
  URL.revokeObjectURL(made.href);
}

/**
 * Call something now and again until the signal; a hidden page rests, a return wakes it. Without a token that is taken
 * it waits for one, unless it is `open` to all.
 */
export function poll(action, { every, signal, open = false }) {
  let timer = null;
  let running = false;
  let again = false;
  const round = async () => {
    clearTimeout(timer);
    if (running) { again = true; return; }
    if (isRefused && !open) return;
    running = true;
    try {
      await action();
    } finally {
      running = false;
    }
    if (signal.aborted) return;
    if (again) { again = false; round(); return; }
    if (!document.hidden) timer = setTimeout(round, every);
  };
  const wake = () => { if (!document.hidden) round(); };
  document.addEventListener("visibilitychange", wake, { signal });
  session.addEventListener("token", wake, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  round();
  return round;
}

/** Do something once, however often the service is away or wants another token in between. */
export function until(action, { signal, failed }) {
  return new Promise((resolve) => {
    const attempt = async () => {
      try {
        resolve(await action());
      } catch (error) {
        if (signal.aborted) return;
        failed(error);
        if (error instanceof NoAnswer || error.status >= 500) setTimeout(() => { if (!signal.aborted) attempt(); }, 2000);
        else if (error.status === 401) session.addEventListener("token", attempt, { once: true, signal });
      }
    };
    attempt();
  });
}
