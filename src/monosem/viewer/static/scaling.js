// The figures of the scaling laws.

import { load } from "./data.js";
import { colour, draw, failed } from "./chart.js";

export async function startScaling() {
  const places = [...document.querySelectorAll("[data-figure]")];
  if (!places.length) return;
  try {
    const { figures } = await load("figures");
    const byName = Object.fromEntries(figures.map((figure) => [figure.name, figure]));
    for (const place of places) await draw(place, () => lawPicture(byName[place.dataset.figure]));
  } catch (error) {
    for (const place of places) failed(place, error);
  }
}

function lawPicture(figure) {
  const shown = new Set();
  const traces = figure.series.map((series) => lawTrace(series, shown));
  const axis = (title, log) => ({ title: { text: title }, type: log ? "log" : "linear", exponentformat: "power", dtick: log ? "D1" : undefined, nticks: 6 });
  const layout = { xaxis: axis(figure.x, figure.log_x), yaxis: axis(figure.y, figure.log_y), legend: { font: { size: 11 } } };
  delete layout.xaxis.dtick;
  delete layout.yaxis.dtick;
  return { traces, layout };
}

function lawTrace(series, shown) {
  const label = series.label || "fit";
  const first = Boolean(series.label) && !shown.has(series.label);
  shown.add(series.label);
  const tint = series.colour < 0 ? colour("--ink") : colour(`--series-${series.colour % 8}`);
  const bars = series.low && series.high ? {
    type: "data", symmetric: false, thickness: 1, width: 3,
    array: series.high.map((high, i) => high - series.y[i]), arrayminus: series.low.map((low, i) => series.y[i] - low),
  } : undefined;
  return {
    type: "scatter", x: series.x, y: series.y, name: label, legendgroup: series.label, showlegend: first, error_y: bars,
    mode: { points: "markers", line: "lines", curve: "lines+markers" }[series.mode],
    line: { color: tint, width: 1.5 }, marker: { color: tint, size: 6 },
    hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>" + label.replace(/[<&]/g, " ") + "</extra>",
  };
}
