// The look of every chart: drawn in the colours of the style sheet, on reports and on the dashboard.
const Charts = (() => {
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
    // No buttons inside: a chart is one picture to a screen reader. Sharing would send the data to a server.
    displayModeBar: false,
    showSendToCloud: false,
    plotlyServerURL: "",
  };

  // Draws, or redraws in place, a figure as plotly writes it.
  const draw = (element, figure) =>
    Plotly.react(element, figure.data, { ...figure.layout, template: template() }, config);

  const restyle = () => {
    for (const element of document.querySelectorAll(".js-plotly-plot")) {
      Plotly.relayout(element, { template: template() });
    }
  };

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);

  // Paper is white and narrower than most screens: A4 within its margins, in CSS pixels.
  const PAPER_WIDTH = 680;

  const print = (on) => {
    document.documentElement.classList.toggle("printing", on);
    for (const element of document.querySelectorAll(".js-plotly-plot")) {
      const size = on ? { width: PAPER_WIDTH } : { width: null, autosize: true };
      Plotly.relayout(element, { template: template(), ...size });
    }
  };

  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  const save = (element, filename) =>
    Plotly.downloadImage(element, {
      format: "png",
      filename,
      width: element.clientWidth,
      height: element.clientHeight,
      scale: 2,
    });

  return { colour, draw, restyle, save };
})();
