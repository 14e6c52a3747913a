// Draws the service's figures; plotly is loaded by the first view that has any.

import { el } from "./dom.js";

let loading = null;

function load(source) {
  return new Promise((resolve, reject) => {
    const made = el("script", { src: source });
    made.addEventListener("load", resolve);
    made.addEventListener("error", () => {
      made.remove();
      reject(new Error(`${source} could not be loaded`));
    });
    document.head.append(made);
  });
}

// The page's policy allows no style attributes in markup, which setting one counts as. Plotly sets some (of a hidden
// image, of pictures of heat maps); by the object model they are allowed, and do the same.
function styleByObjectModel() {
  const set = SVGElement.prototype.setAttribute;
  SVGElement.prototype.setAttribute = function setAttribute(name, value) {
    if (name === "style") this.style.cssText = value;
    else set.call(this, name, value);
  };
}

async function loaded() {
  styleByObjectModel();
  await load("assets/plotly.js");
  // The buttons above figures would bring a style element each.
  window.Plotly.setPlotConfig({ displayModeBar: false });
  await load("assets/charts.js");
}

/** Load what draws figures. */
export function plotting() {
  loading ??= loaded().catch((error) => { loading = null; throw error; });
  return loading;
}

/** Where a figure goes: heading, picture, caption. */
export function figureBlock(name, title, { id, level = "h2" } = {}) {
  const heading = el(level, { id: `figure-${name}` }, title);
  const chart = el("div", { class: "chart", id, role: "img", "aria-label": title });
  const caption = el("figcaption", {});
  const block = el("section", { class: "figure panel", "data-figure": name, "aria-labelledby": `figure-${name}` },
    heading, el("figure", {}, chart, caption));
  return { block, heading, chart, caption };
}

const NARROW = 480;
const LEGEND_LINE = 21;

// On a phone every entry of a legend takes a line of its own.
function heightFor(chart, { data, layout }) {
  const height = layout.height ?? 320;
  const entries = data.filter((trace) => trace.name && trace.showlegend !== false).length;
  return chart.clientWidth < NARROW && entries > 1 ? height + LEGEND_LINE * (entries - 1) : height;
}

/** Show a figure as the service answers it: title, caption, figure. Without a figure its caption says what to do. */
export async function showFigure(place, told, signal) {
  place.heading.textContent = told.title;
  place.caption.textContent = told.caption;
  place.chart.hidden = told.figure === null;
  if (told.figure === null) return;
  await plotting();
  if (signal.aborted) return;
  const fresh = place.chart.style.height === "";
  const height = heightFor(place.chart, told.figure);
  place.chart.style.height = `${height}px`;
  place.chart.setAttribute("aria-label", `${told.title}. ${told.caption}`);
  // Declared by a classic script: known to modules by its name, but no member of the window.
  await Charts.draw(place.chart, { ...told.figure, layout: { ...told.figure.layout, height } });
  if (fresh) signal.addEventListener("abort", () => window.Plotly.purge(place.chart), { once: true });
}
