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
  const values = (name) => figure.series.flatMap((series) => series[name]);
  const axis = (title, log, along) => ({ title: { text: title }, type: log ? "log" : "linear", ...(log ? logTicks(along) : {}) });
  const legend = innerWidth < 700 ? { orientation: "h", y: -0.2 } : {};
  const layout = {
    xaxis: axis(figure.x, figure.log_x, values("x")), yaxis: axis(figure.y, figure.log_y, values("y")), legend: { font: { size: 11 }, ...legend },
  };
  return { traces, layout };
}

// 1, 2 and 5 times powers of ten within two decades, powers alone beyond; close to each other within half a decade.
function logTicks(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const steps = high / low > 100 ? [1] : high / low < 4 ? [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const step of steps) if (step * 10 ** power >= low * 0.95 && step * 10 ** power <= high * 1.05) ticks.push([step, power]);
  }
  const spelled = ([step, power]) => (power >= 6 || power < -3 ? `${step === 1 ? "" : step + "·"}10<sup>${power}</sup>` : Number((step * 10 ** power).toPrecision(3)).toLocaleString("en"));
  return { tickvals: ticks.map(([step, power]) => step * 10 ** power), ticktext: ticks.map(spelled) };
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
