// What the server does for the pages, done here: the table's order, filters and search, and state in the address.

import { load } from "./data.js";
import { startLatents } from "./latents.js";
import { startPage } from "./main.js"; // which starts what the pages have anyway
import { matching } from "./rank.js";

const state = new URLSearchParams(location.search);

export async function startExport() {
  const own = { latents: showTable, latent: showLatent, random: goAnywhere, absent: sayWhat };
  await own[document.body.dataset.page]?.();
}

function sayWhat() {
  const what = state.has("latent") ? `Latent ${Number(state.get("latent"))} is not in this export.` : "This page needs the model.";
  document.getElementById("absent").prepend(`${what} `);
}

async function goAnywhere() {
  const { rows } = await load("latents");
  const alive = rows.filter((row) => row.density === undefined || row.density > 0);
  const chosen = alive.length ? alive : rows;
  location.replace(`${chosen[Math.floor(Math.random() * chosen.length)].latent}.html`);
}

// Tabs and length as the address says, and the latents before and after within the export and its order.
async function showLatent() {
  const tab = document.getElementById(`tab-${state.get("show")}`);
  if (state.get("text") === "full") document.getElementById("full")?.click();
  document.querySelector(`[data-effect="${state.get("effect") === "loss" ? "loss" : "kl"}"]`)?.click();
  tab?.click();
  document.getElementById("up").href = address("../latents.html", { show: null, text: null, effect: null });
  const data = await load("latents");
  const { found } = select(data);
  const here = Number(/(\d+)\.html$/.exec(location.pathname)[1]);
  const at = found.findIndex((row) => row.latent === here);
  const count = document.querySelector(".latent-head .steps .soft");
  if (count) count.textContent = at < 0 ? `not among the ${found.length} listed` : `${(at + 1).toLocaleString("en")} of ${found.length.toLocaleString("en")}`;
  step("previous", found[at - 1], "←", "Previous");
  step("next", at < 0 ? found[0] : found[at + 1], "→", "Next");
}

function step(id, row, arrow, label) {
  const steps = document.querySelector(".latent-head .steps");
  const old = document.getElementById(id) ?? [...steps.querySelectorAll("span.button")].find((e) => e.textContent === arrow);
  const made = document.createElement(row ? "a" : "span");
  made.className = "button";
  made.textContent = arrow;
  if (row) {
    made.id = id;
    made.rel = id === "next" ? "next" : "prev";
    made.href = address(`${row.latent}.html`, {});
    made.setAttribute("aria-label", `${label} latent, ${row.latent}`);
  } else made.setAttribute("aria-hidden", "true");
  old?.replaceWith(made);
}

async function showTable() {
  const words = (state.get("q") ?? "").trim();
  const data = await load("latents");
  if (/^\d+$/.test(words) && data.rows.some((row) => row.latent === Number(words))) {
    location.replace(`latents/${Number(words)}.html`);
    return;
  }
  const { found, order } = select(data);
  const pages = Math.max(1, Math.ceil(found.length / data.page_rows));
  const page = Math.min(Math.max(1, Number(state.get("page")) || 1), pages);
  const body = document.querySelector("table.grid tbody");
  if (!body) return;
  const shown = found.slice((page - 1) * data.page_rows, page * data.page_rows);
  const cells = tableCells();
  body.replaceChildren(...shown.map((row) => tableRow(row, cells)));
  sayTable(data, found, order);
  markHeads(data);
  keepFilters();
  for (const nav of document.querySelectorAll("nav.pages")) turnPages(nav, page, pages);
  startLatents(); // the keys walk the new rows
}

// The latents that the address asks for, in its order, and that order in words.
function select(data) {
  const words = (state.get("q") ?? "").trim();
  const { rows, ranked } = words ? matching(data, words) : { rows: data.rows, ranked: false };
  const bounds = data.columns.map((name) => [name, bound(`min_${name}`, -Infinity), bound(`max_${name}`, Infinity)])
    .filter(([, low, high]) => low > -Infinity || high < Infinity);
  const found = rows.filter((row) =>
    bounds.every(([name, low, high]) => row[name] !== null && row[name] >= low && row[name] <= high) &&
    (!state.get("starred") || row.starred));
  const sort = state.get("sort");
  const down = state.get("order") === "desc";
  if (!data.columns.includes(sort)) return { found: down ? found.reverse() : found, order: ranked ? "best match first" : "by number" };
  found.sort((a, b) => {
    const [x, y] = [a[sort], b[sort]];
    if (x === null || y === null) return (x === null) - (y === null) || a.latent - b.latent;
    return (down ? y - x : x - y) || a.latent - b.latent;
  });
  return { found, order: `by ${sort}` };
}

function bound(name, otherwise) {
  const given = state.get(name);
  return given && Number.isFinite(Number(given)) ? Number(given) : otherwise;
}

// What each column of the rendered table shows, from its heading.
function tableCells() {
  return [...document.querySelectorAll("table.grid thead th")].map((head) => {
    const link = head.querySelector("a");
    const sort = link && new URL(link.href).searchParams.get("sort");
    return sort ?? head.textContent.trim();
  });
}

function tableRow(row, cells) {
  const line = document.createElement("tr");
  for (const name of cells) line.append(tableCell(row, name));
  return line;
}

function tableCell(row, name) {
  const cell = document.createElement(name === "latent" ? "th" : "td");
  if (name === "latent") {
    cell.scope = "row";
    cell.className = "num";
    const link = document.createElement("a");
    link.href = address(`latents/${row.latent}.html`, { page: null });
    link.textContent = row.latent;
    cell.append(link);
  } else if (name === "star") {
    if (row.starred) cell.innerHTML = '<span class="star" title="starred">★<span class="hidden">starred</span></span>';
  } else if (name === "fires on" || name === "votes for") {
    const chips = document.createElement("span");
    chips.className = "chips";
    for (const token of (name === "fires on" ? row.fires_on : row.votes_for) ?? []) {
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.textContent = token;
      chips.append(chip);
    }
    cell.append(chips);
  } else if (name === "explanation" || name === "note") {
    cell.className = "words";
    cell.textContent = (row[name] ?? "").slice(0, 400);
  } else {
    cell.className = "num";
    cell.textContent = shownNumber(row[name], name.endsWith("density"));
  }
  return cell;
}

// Three digits, as the server shows numbers.
function shownNumber(value, share) {
  if (value === null || value === undefined) return "–";
  const v = share ? 100 * value : value;
  const size = Math.abs(v);
  const text = v === Math.round(v) && size < 1e15 ? v.toLocaleString("en") : size >= 1e-4 && size < 1e6
    ? (size >= 1000 ? Math.round(v).toLocaleString("en") : v.toPrecision(3)) : v.toExponential(2);
  return text.replace("-", "−") + (share ? "%" : "");
}

function sayTable(data, found, order) {
  const lead = document.querySelector(".head .lead");
  const all = found.length === data.rows.length;
  const of = `${found.length.toLocaleString("en")}${all ? "" : ` of ${data.rows.length.toLocaleString("en")}`}`;
  lead.textContent = `${of} latents of this export; the autoencoder has ${data.n_latents.toLocaleString("en")}. ${order === "best match first" ? "Best match first. " : ""}`;
  if ([...state.keys()].length) {
    const link = document.createElement("a");
    link.href = "latents.html";
    link.textContent = "Show all";
    lead.append(link);
  }
}

function markHeads(data) {
  for (const head of document.querySelectorAll("table.grid thead th")) {
    const link = head.querySelector("a");
    if (!link) continue;
    const name = new URL(link.href).searchParams.get("sort");
    const active = name ? state.get("sort") === name : !data.columns.includes(state.get("sort"));
    const down = active && state.get("order") === "desc";
    head.setAttribute("aria-sort", active ? (down ? "descending" : "ascending") : "none");
    link.querySelector("span")?.remove();
    if (active && name) link.insertAdjacentHTML("beforeend", `<span aria-hidden="true"> ${down ? "↓" : "↑"}</span>`);
    link.href = address("latents.html", { sort: name, order: name && !down ? "desc" : null, page: null });
  }
}

function keepFilters() {
  const form = document.getElementById("filters");
  for (const input of form.querySelectorAll("input, select")) {
    if (input.type === "checkbox") input.checked = state.get(input.name) === input.value;
    else input.value = state.get(input.name) ?? "";
  }
  form.querySelector("#sort option[value='']").textContent = state.get("q") ? "relevance" : "number";
  const details = form.querySelector("details");
  if (details) details.open = [...state.keys()].some((name) => /^(min|max)_/.test(name));
}

function turnPages(nav, page, pages) {
  const turn = (to, text) => {
    const made = document.createElement(to >= 1 && to <= pages ? "a" : "span");
    if (made.tagName === "A") made.href = address("latents.html", { page: to > 1 ? to : null });
    else made.className = "soft";
    made.textContent = text;
    return made;
  };
  const count = document.createElement("span");
  count.textContent = `${page.toLocaleString("en")} of ${pages.toLocaleString("en")}`;
  nav.replaceChildren(turn(page - 1, "← Previous"), count, turn(page + 1, "Next →"));
}

// A file with the state of this address, changed; null takes a part away.
function address(file, changes) {
  const made = new URLSearchParams(state);
  for (const [name, value] of Object.entries(changes)) value === null ? made.delete(name) : made.set(name, value);
  const query = made.toString();
  return query ? `${file}?${query}` : file;
}

startExport();
