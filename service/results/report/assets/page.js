"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 600px)");

// Plotly writes colours into SVG attributes, where style sheets have no effect. Read the page's
// colours from the CSS variables, so that the figures follow the light and the dark page.
function addTheme(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = (own) => ({
    gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--soft"),
    zeroline: false, automargin: true, exponentformat: "SI", ...own,
  });
  return {
    ...layout,
    shapes: (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: colour("--soft") } })),
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), size: narrow.matches ? 11 : 12, family: "system-ui, Liberation Sans, sans-serif" },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    margin: { l: 56, r: 16, t: 10, b: 44 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: axis(layout.xaxis),
    yaxis: axis(layout.yaxis),
  };
}

// A page shows only the figures that have an element: the id of the element is the figure's key.
function drawFigures() {
  for (const [place, figure] of Object.entries(figures)) {
    const element = document.getElementById(place);
    if (element) {
      Plotly.react(element, figure.data, addTheme(figure.layout), { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }
}

drawFigures();
// Colours and font sizes are in the figures, so a change of theme or width draws them again.
dark.addEventListener("change", drawFigures);
narrow.addEventListener("change", drawFigures);
