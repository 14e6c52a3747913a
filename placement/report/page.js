// Draws every chart from the JSON beside it, in the colours of the style sheet, and switches layers.
(() => {
  "use strict";

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // One look for all figures, taken from the style sheet so that it follows the theme.
  const template = () => {
    const axis = {
      automargin: true,
      ticklabelstandoff: 6,
      exponentformat: "none",
      separatethousands: true,
      gridcolor: colour("--grid"),
      linecolor: colour("--line"),
      zerolinecolor: colour("--line"),
      tickcolor: colour("--line"),
      title: { standoff: 10, font: { size: 13 } },
    };
    return {
      layout: {
        font: { family: colour("--font"), size: 13, color: colour("--text") },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: {
          bgcolor: colour("--panel"),
          bordercolor: colour("--line"),
          font: { color: colour("--text") },
        },
        modebar: {
          bgcolor: "rgba(0,0,0,0)",
          color: colour("--muted"),
          activecolor: colour("--text"),
        },
        // A finger that drags wants to scroll.
        dragmode: matchMedia("(hover: none)").matches ? false : "zoom",
        separators: ".,",
        xaxis: axis,
        yaxis: axis,
      },
    };
  };

  const config = {
    responsive: true,
    displaylogo: false,
    // Saving a picture is the one button; sharing would send the data to a server.
    modeBarButtons: [["toImage"]],
    showSendToCloud: false,
    plotlyServerURL: "",
  };

  const charts = [...document.querySelectorAll(".chart")];

  for (const chart of charts) {
    const spec = JSON.parse(document.getElementById(`${chart.id}-data`).textContent);
    Plotly.newPlot(chart, spec.data, { ...spec.layout, template: template() }, config);
  }

  for (const selector of document.querySelectorAll("select[data-chart]")) {
    const chart = document.getElementById(selector.dataset.chart);
    selector.addEventListener("change", () => {
      const layer = Number(selector.value);
      Plotly.restyle(chart, { visible: chart.data.map((trace) => trace.meta.layer === layer) });
    });
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of charts) Plotly.relayout(chart, { template: template() });
  });
})();
