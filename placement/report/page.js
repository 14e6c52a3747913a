// Draws every chart from the JSON beside it, puts other layers into the load map, and saves pictures.
(() => {
  "use strict";

  const figures = new Map();

  for (const chart of document.querySelectorAll(".chart")) {
    const figure = JSON.parse(document.getElementById(`${chart.id}-data`).textContent);
    figures.set(chart.id, figure);
    Charts.draw(chart, figure);
  }

  // The maps of all layers: a byte for each cell, in steps of the mean load.
  const maps = ({ step, shape, bytes }, layer) => {
    const [policies, layers, rows, columns] = shape;
    const cells = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
    return Array.from({ length: policies }, (_, policy) =>
      Array.from({ length: rows }, (_, row) => {
        const start = ((policy * layers + layer) * rows + row) * columns;
        return Array.from(cells.subarray(start, start + columns), (count) => count * step);
      }),
    );
  };

  for (const selector of document.querySelectorAll("select[data-chart]")) {
    const figure = figures.get(selector.dataset.chart);
    selector.addEventListener("change", () => {
      const shown = maps(figure.choices, Number(selector.value));
      const data = figure.data.map((trace, place) => ({ ...trace, z: shown[place] }));
      Charts.draw(document.getElementById(selector.dataset.chart), { ...figure, data });
    });
  }

  for (const button of document.querySelectorAll("button[data-save]")) {
    button.hidden = false;
    const name = button.dataset.save;
    button.addEventListener("click", () => Charts.save(document.getElementById(name), name));
  }
})();
