// The map of latents on the overview.

import { load } from "./data.js";
import { colour, draw, failed } from "./chart.js";

export async function startOverview() {
  const element = document.getElementById("map");
  if (!element) return;
  const choice = document.getElementById("colour");
  choice.value = new URLSearchParams(location.search).get("colour") ?? "";
  let found = null;
  const show = async () => {
    try {
      found = await load("map", { colour: choice.value });
      await draw(element, () => mapPicture(found, choice.selectedOptions[0].textContent));
    } catch (error) {
      failed(element, error);
    }
  };
  choice.addEventListener("change", () => {
    const address = new URL(location.href);
    choice.value ? address.searchParams.set("colour", choice.value) : address.searchParams.delete("colour");
    history.replaceState(null, "", address);
    show();
  });
  await show();
  element.on?.("plotly_click", (event) => openCell(element, found, event.points[0]));
}

function mapPicture(found, label) {
  const middles = (edges) => edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
  const values = found.mean ?? found.n.map((row) => row.map((n) => (n ? Math.log10(n) : null)));
  const roomy = innerWidth > 700;
  const trace = {
    type: "heatmap", x: middles(found.x_edges), y: middles(found.y_edges), z: values, customdata: found.n,
    colorscale: mapScale(), hoverongaps: false, xgap: roomy ? 1 : 0, ygap: roomy ? 1 : 0,
    hovertemplate: `%{customdata} latents<br>density 10^%{x:.2f}, max 10^%{y:.2f}${found.mean ? `<br>${label} %{z:.3g}` : ""}<extra></extra>`,
    colorbar: { thickness: 10, outlinewidth: 0, title: { text: found.mean ? label : "latents", side: "right" }, ...(found.mean ? {} : countTicks(values)) },
  };
  const layout = { xaxis: powers("density", found.x_edges), yaxis: powers("largest activation", found.y_edges) };
  return { traces: [trace], layout };
}

function mapScale() {
  return [[0, colour("--map-low")], [0.5, colour("--map-middle")], [1, colour("--map-high")]];
}

function countTicks(values) {
  const most = Math.max(...values.flat().filter((v) => v !== null));
  const counts = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000].filter((n) => Math.log10(n) <= most + 1e-9);
  return { tickvals: counts.map(Math.log10), ticktext: counts.map(String) };
}

// An axis of log10 values, marked with the values themselves.
function powers(title, edges) {
  const [low, high] = [edges[0], edges[edges.length - 1]];
  const steps = high - low > 2.2 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const step of steps) if (power + Math.log10(step) >= low && power + Math.log10(step) <= high) ticks.push([power, step]);
  }
  return {
    title: { text: title }, tickvals: ticks.map(([power, step]) => power + Math.log10(step)),
    ticktext: ticks.map(([power, step]) => (power < -3 ? `${step === 1 ? "" : step + "·"}10<sup>${power}</sup>` : String(Number((step * 10 ** power).toPrecision(2))))),
  };
}

// The latents of a cell, in the table.
function openCell(element, found, point) {
  const [row, column] = point.pointIndex ?? point.pointNumber;
  const ends = (edges, i) => [10 ** (edges[i] - 1e-4), 10 ** (edges[i + 1] + 1e-4)].map((v) => v.toPrecision(5));
  const [min_density, max_density] = ends(found.x_edges, column);
  const [min_max, max_max] = ends(found.y_edges, row);
  location.href = `${element.dataset.latents}?${new URLSearchParams({ min_density, max_density, min_max, max_max })}`;
}
