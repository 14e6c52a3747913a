// Makes elements. Everything that comes from outside is put in as text, never as markup.

/** Make an element: attributes, listeners (functions, as `onclick`), then children as nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  put(made, ...children);
  return made;
}

/** Append nodes or text; null and undefined are nothing. */
export function put(parent, ...children) {
  for (const child of children.flat()) {
    if (child !== undefined && child !== null) parent.append(child);
  }
  return parent;
}

/** Set a text, only where it is another: a live region speaks at every change. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A section with its heading. */
export function section(title, attributes = {}, ...children) {
  const id = `h-${title.toLowerCase().replace(/[^a-z0-9]+/g, "-")}`;
  return el("section", { "aria-labelledby": id, ...attributes }, el("h2", { id }, title), ...children);
}

/** A table that scrolls within itself, with an empty body. "#" before a column's name: numbers; "." : not shown. */
export function table(id, caption, columns) {
  const heads = columns.map((name) => {
    if (name.startsWith(".")) return el("th", { scope: "col" }, el("span", { class: "sr" }, name.slice(1)));
    return name.startsWith("#") ? el("th", { scope: "col", class: "n" }, name.slice(1)) : el("th", { scope: "col" }, name);
  });
  const made = el("table", { id }, el("caption", { class: "sr" }, caption), el("thead", {}, el("tr", {}, heads)), el("tbody"));
  return el("div", { class: "scroll", role: "group", "aria-label": caption, tabindex: "0" }, made);
}

/** A row of a table; a cell is text or a node, or a pair of it and its class. The first one names the row. */
export function row(cells, attributes = {}) {
  return el("tr", attributes, cells.map((cell, place) => {
    const [content, name] = Array.isArray(cell) ? cell : [cell, undefined];
    return el(place === 0 ? "th" : "td", { class: name, scope: place === 0 ? "row" : undefined }, content ?? "");
  }));
}

const FOCUSABLE = "a[href], button, input, select";

/** Show items as rows. Rows that stay the same stay in place, and the focus stays where it was. */
export function fill(wrapped, items, keyOf, rowOf) {
  const body = wrapped.querySelector("tbody");
  const known = new Map([...body.rows].map((one) => [one.dataset.key, one]));
  const rows = items.map((item) => {
    const key = String(keyOf(item));
    const signature = JSON.stringify(item);
    const before = known.get(key);
    if (before !== undefined && before.signature === signature) return before;
    const made = rowOf(item);
    made.dataset.key = key;
    made.signature = signature;
    if (before !== undefined && before.contains(document.activeElement)) {
      made.wantsFocus = [...before.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement);
    }
    return made;
  });
  const same = rows.length === body.rows.length && rows.every((one, place) => one === body.rows[place]);
  if (same) return;
  body.replaceChildren(...rows);
  for (const one of rows) {
    if (one.wantsFocus === undefined) continue;
    one.querySelectorAll(FOCUSABLE)[one.wantsFocus]?.focus();
    delete one.wantsFocus;
  }
}

/** A list of names and values; a value is text or a node. */
export function facts(entries, attributes = {}) {
  return el("dl", { class: "facts", ...attributes }, entries.map(([name, value, id]) =>
    el("div", {}, el("dt", {}, name), el("dd", { id }, value ?? "-"))));
}

/** A block that says that there is nothing yet, and what to do next. */
export function empty(title, ...children) {
  return el("div", { class: "empty" }, el("p", { class: "empty-title" }, title), ...children);
}

/** A command to copy. */
export const command = (text) => el("pre", { tabindex: "0", role: "group", "aria-label": "Command" }, el("code", {}, text));

export const badge = (text, tone = "") => el("span", { class: `badge ${tone}` }, text);

/** A field with its label, help and a place for what is wrong with it. */
export function field(id, label, control, help) {
  control.id = id;
  const described = [help ? `${id}-help` : null, `${id}-error`].filter(Boolean).join(" ");
  control.setAttribute("aria-describedby", described);
  return el("div", { class: "field" }, el("label", { for: id }, label), control,
    help ? el("p", { class: "help", id: `${id}-help` }, help) : null,
    el("p", { class: "error", id: `${id}-error` }));
}

export const option = (value, text, chosen = false) => el("option", { value, selected: chosen }, text);
