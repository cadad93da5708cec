// Trying text: what is asked stands in the address, every change asks the model again, one request at a time.

import { load } from "./data.js";

export function startTry() {
  const page = tryParts();
  const state = stateOf(new URLSearchParams(location.search), Number(page.form.dataset.k));
  const view = { page, state, found: null, shown: 12, request: null, continued: "" };
  page.form.hidden = page.labelled.hidden = false;
  fillControls(view);
  listenToControls(view);
  listenToStrip(view);
  startLabelled(page);
  page.status.textContent = "Loading the model …";
  load("try").then((facts) => {
    view.facts = facts;
    page.status.textContent = `${facts.subject} is ready`;
    if (state.text) askModel(view);
  }, (error) => { page.status.textContent = ""; complain(page.error, error); });
}

function tryParts() {
  const found = {};
  for (const name of ["form", "text", "go", "k", "k-slide", "threshold", "status", "error", "result", "colour", "colour-latent",
    "colour-latent-field", "scale", "strip", "summary", "active-note", "active", "more", "edits", "add", "add-latent", "clear",
    "next-note", "next", "continue", "seed", "continuation"]) found[name] = document.getElementById(`try-${name}`);
  found.labelled = document.getElementById("labelled");
  return found;
}

// The address and back.

function stateOf(query, k) {
  const edits = (query.get("edits") ?? "").split(",").filter(Boolean).map((part) => {
    const [latent, kind, value] = part.split(":");
    return { latent: Number(latent), kind, value: value === undefined ? 0 : Number(value) };
  });
  const position = query.get("position");
  return { text: query.get("text") ?? "", k: numberOr(query.get("k"), k), threshold: numberOr(query.get("threshold"), null),
    edits: edits.filter((edit) => Number.isInteger(edit.latent) && ["ablate", "boost", "clamp"].includes(edit.kind)),
    position: position === null ? null : Number(position), colour: query.get("colour") ?? "error",
    continue: numberOr(query.get("continue"), null), seed: numberOr(query.get("seed"), null) };
}

function numberOr(given, otherwise) {
  return given === null || given === undefined || given.trim() === "" || Number.isNaN(Number(given)) ? otherwise : Number(given);
}

function keepState({ page, state }) {
  const address = new URL(location.href);
  const set = (name, value, usual) => {
    if (value === null || value === usual) address.searchParams.delete(name);
    else address.searchParams.set(name, value);
  };
  set("text", state.text, "");
  set("k", state.k, Number(page.form.dataset.k));
  set("threshold", state.threshold, null);
  set("edits", state.edits.map((e) => (e.kind === "ablate" ? `${e.latent}:ablate` : `${e.latent}:${e.kind}:${e.value}`)).join(","), "");
  set("position", state.position, null);
  set("colour", state.colour, "error");
  set("continue", state.continue, null);
  set("seed", state.seed, null);
  history.replaceState(null, "", address);
}

// Controls

function fillControls({ page, state }) {
  page.text.value = state.text;
  page.k.value = state.k;
  page["k-slide"].value = slideOf(state.k, page);
  if (page.threshold) page.threshold.value = state.threshold ?? "";
  const [colour, latent] = state.colour.split(":");
  page.colour.value = ["error", "delta_ce", "edit_delta_ce", "latent"].includes(colour) ? colour : "error";
  page["colour-latent"].value = latent ?? "";
  page["colour-latent-field"].hidden = colour !== "latent";
  page.continue.value = String(state.continue ?? (state.edits.length ? 16 : 0));
  page.seed.value = state.seed ?? "";
}

// The slider is logarithmic: most of what is interesting lies near the k trained with.
function slideOf(k, page) {
  return Math.round((100 * Math.log(k)) / Math.log(mostK(page)));
}

function mostK(page) {
  return Math.min(Number(page.form.dataset.n), Math.max(16 * Number(page.form.dataset.k), 64));
}

function listenToControls(view) {
  const { page, state } = view;
  const change = (element, event, then) => element?.addEventListener(event, () => { then(); keepState(view); askModel(view); });
  page.form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (page.text.value !== state.text) Object.assign(state, { text: page.text.value, position: null });
    keepState(view);
    askModel(view);
  });
  page.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); page.form.requestSubmit(); }
  });
  page["k-slide"].addEventListener("input", () => { page.k.value = Math.max(1, Math.round(mostK(page) ** (page["k-slide"].value / 100))); });
  const setK = (value) => {
    Object.assign(state, { k: numberOr(value, Number(page.form.dataset.k)), threshold: null });
    fillControls(view);
  };
  change(page["k-slide"], "change", () => setK(page.k.value));
  change(page.k, "change", () => setK(page.k.value));
  change(page.threshold, "change", () => { state.threshold = numberOr(page.threshold.value, null); });
  change(page.continue, "change", () => { state.continue = Number(page.continue.value); });
  change(page.seed, "change", () => { state.seed = numberOr(page.seed.value, null); });
  const recolour = () => {
    state.colour = page.colour.value === "latent" ? `latent:${page["colour-latent"].value.trim() || firstLatent(view)}` : page.colour.value;
    fillControls(view);
  };
  change(page.colour, "change", recolour);
  change(page["colour-latent"], "change", recolour);
  page.add.addEventListener("submit", (event) => {
    event.preventDefault();
    const latent = numberOr(page["add-latent"].value, null);
    page["add-latent"].value = "";
    if (latent !== null) setEdit(view, { latent, kind: "ablate", value: 0 });
  });
  page.clear.addEventListener("click", () => { state.edits = []; edited(view); page["add-latent"].focus(); });
  page.more.addEventListener("click", () => { view.shown = Infinity; showActive(view); });
}

function firstLatent({ found }) {
  return found?.tokens[found.position].latents[0]?.[0] ?? 0;
}

function setEdit(view, edit) {
  view.state.edits = [...view.state.edits.filter((other) => other.latent !== edit.latent), edit];
  edited(view);
}

function edited(view) {
  fillControls(view);
  keepState(view);
  showEdits(view);
  askModel(view);
}

// Asking

async function askModel(view) {
  const { page, state } = view;
  if (!state.text) return;
  view.request?.abort();
  const request = (view.request = new AbortController());
  const [colour, latent] = state.colour.split(":");
  const asked = { text: state.text, edits: state.edits, position: state.position, watch: colour === "latent" ? [Number(latent)] : [] };
  if (state.threshold !== null) asked.threshold = state.threshold;
  else asked.k = state.k;
  page.result.setAttribute("aria-busy", "true");
  page.status.textContent = "Reading …";
  page.error.hidden = true;
  try {
    view.found = await ask("try", asked, request.signal);
    page.result.hidden = false;
    page.status.textContent = `${view.found.tokens.length - 1} tokens, ${view.found.seconds.toFixed(2)} s`;
    showResult(view);
    await askContinuation(view, asked, request.signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    page.status.textContent = "";
    complain(page.error, error);
  }
  page.result.removeAttribute("aria-busy");
}

async function ask(name, body, signal) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
  const answer = await fetch(`/api/v1/${name}`, options);
  const said = await answer.text();
  const found = answer.headers.get("content-type").startsWith("application/json") ? JSON.parse(said) : { error: said };
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function askContinuation(view, asked, signal) {
  const { page, state } = view;
  const n = state.continue ?? (state.edits.length ? 16 : 0);
  const key = JSON.stringify([asked.text, asked.k, asked.threshold, asked.edits, n, state.seed]);
  if (key === view.continued) return;
  page.continuation.replaceChildren(...(n ? [element("p", "note", "Going on …")] : []));
  view.continued = "";
  if (n && view.found.next) {
    const found = await ask("try", { ...asked, watch: [], n_continue: n, seed: state.seed }, signal);
    const said = (kind, label) => {
      const block = element("p", `said ${kind}`);
      block.dir = "auto";
      block.append(element("small", "", label), found.continuation[kind]);
      return block;
    };
    page.continuation.replaceChildren(said("original", "as it is"), ...(state.edits.length ? [said("edited", "edited")] : []));
    if (!state.edits.length) page.continuation.append(element("p", "note", "Edit a latent to see it go on differently."));
  }
  view.continued = key;
}

// Showing

function showResult(view) {
  showStrip(view);
  showActive(view);
  showEdits(view);
  showNext(view);
}

function colourValues({ found, state }) {
  const [colour, latent] = state.colour.split(":");
  const difference = (name) => found.tokens.map((t) => (t[name] === null ? null : t[name] - t.loss));
  if (colour === "latent") return found.watch[latent] ?? found.tokens.map(() => null);
  return { delta_ce: () => difference("loss_recons"), edit_delta_ce: () => difference("loss_edited") }[colour]?.() ?? found.tokens.map((t) => t.error);
}

function showStrip(view) {
  const { page, found, state } = view;
  const values = colourValues(view);
  const scale = Math.max(...values.map((v) => Math.abs(v ?? 0)), state.colour === "error" ? 0.5 : 1e-6);
  const held = page.strip.contains(document.activeElement);
  page.strip.replaceChildren(...found.tokens.flatMap((token, i) => {
    const button = element("button", "", token.shown || "∅");
    button.type = "button";
    if (!token.shown.trim()) button.setAttribute("aria-label", shownAlone(token));
    button.tabIndex = i === found.position ? 0 : -1;
    button.dataset.position = i;
    button.setAttribute("aria-pressed", String(i === found.position));
    button.style.setProperty("--a", Math.min(1, Math.abs(values[i] ?? 0) / scale).toFixed(3));
    button.classList.toggle("less", (values[i] ?? 0) < 0);
    button.classList.toggle("outside", !token.trained);
    button.title = aboutToken(token, i, values[i], state.colour);
    return token.text.includes("\n") ? [button, document.createElement("br")] : [button];
  }));
  if (held) page.strip.querySelector('[tabindex="0"]').focus();
  const signed = values.some((v) => v < 0);
  const bar = element("i", signed ? "both" : "");
  page.scale.replaceChildren(signed ? `−${short(scale)}` : "0", bar, short(scale));
  page.summary.textContent = summaryOf(found);
}

function aboutToken(token, i, value, colour) {
  const parts = [`position ${i}`, `id ${token.id}`];
  if (!token.trained) parts.push(i === 0 ? "put before the text; the autoencoder was not trained on the first token" : "further in than the contexts that the autoencoder was trained on");
  if (token.error !== null) parts.push(`error ${short(token.error)}`, `${token.n_active} active`);
  if (token.loss !== null) parts.push(`loss ${short(token.loss)}`);
  if (token.loss_recons !== null) parts.push(`ΔCE ${signed(token.loss_recons - token.loss)}`);
  if (token.loss_edited !== null) parts.push(`edited ${signed(token.loss_edited - token.loss)}`);
  if (colour.startsWith("latent:")) parts.push(`latent ${colour.slice(7)}: ${value === null ? "not encoded" : short(value)}`);
  return parts.join(" · ");
}

function summaryOf(found) {
  const mean = (of) => { const v = found.tokens.map(of).filter((x) => x !== null); return v.length ? v.reduce((a, b) => a + b, 0) / v.length : null; };
  const inside = (of) => (t) => (t.trained ? of(t) : null);
  const parts = [`Mean over the text: error ${short(mean(inside((t) => t.error)))}`, `${short(mean(inside((t) => t.n_active)))} active latents`];
  const counted = found.tokens.filter((t) => t.loss_recons !== null);
  if (counted.length) {
    const loss = mean((t) => (t.loss_recons === null ? null : t.loss));
    parts.push(`loss ${short(loss)} nats, ${signed(mean((t) => t.loss_recons === null ? null : t.loss_recons - t.loss))} with the reconstruction`);
    if (counted.some((t) => t.loss_edited !== null)) parts.push(`${signed(mean((t) => t.loss_edited === null ? null : t.loss_edited - t.loss))} with the edits`);
  }
  const beyond = found.tokens.filter((t, i) => i > 0 && !t.trained).length;
  const control = found.control_tokens.length ? ` Read as control tokens: ${found.control_tokens.join(", ")}.` : "";
  return parts.join(", ") + "." + control + (beyond ? ` The last ${beyond} tokens are further in than the contexts it was trained on, and not in the means of error and active latents.` : "");
}

function showActive(view) {
  const { page, found, state } = view;
  const token = found.tokens[found.position];
  const pairs = token.latents.slice(0, view.shown);
  const largest = token.latents[0]?.[1] ?? 1;
  page["active-note"].replaceChildren("At ", element("span", "chip", shownAlone(token)), ` position ${found.position}: `,
    token.error === null ? "not read by the autoencoder, which was not trained on the first token."
      : `${token.n_active} active, error ${short(token.error)}.${token.n_active > token.latents.length ? ` The ${token.latents.length} largest:` : ""}`);
  page.active.replaceChildren(...pairs.map(([latent, activation]) => {
    const row = element("tr");
    const head = element("th", "num");
    head.scope = "row";
    head.append(latentLink(page, latent));
    const bar = element("td", "bar-cell");
    const fill = element("span", "fill");
    fill.style.setProperty("--w", (activation / largest).toFixed(3));
    bar.append(fill);
    const words = element("td");
    words.append(aboutLatent(found, latent));
    const edit = element("td");
    const is = state.edits.some((e) => e.latent === latent);
    const button = element("button", "quiet-button", is ? "edited" : "ablate");
    button.type = "button";
    button.disabled = is;
    button.setAttribute("aria-label", `Ablate latent ${latent}`);
    button.addEventListener("click", () => setEdit(view, { latent, kind: "ablate", value: 0 }));
    const paint = element("button", "quiet-button", "colour");
    paint.type = "button";
    paint.setAttribute("aria-label", `Colour the tokens by latent ${latent}`);
    paint.addEventListener("click", () => { state.colour = `latent:${latent}`; fillControls(view); keepState(view); askModel(view); });
    edit.append(button, " ", paint);
    row.append(head, element("td", "num", short(activation)), bar, words, edit);
    return row;
  }));
  page.more.hidden = token.latents.length <= view.shown;
  page.more.textContent = `Show all ${token.latents.length}`;
}

function aboutLatent(found, latent) {
  const about = found.about[latent];
  const line = element("span", "chips");
  if (about?.explanation) line.append(about.explanation);
  else line.append(...(about?.fires_on ?? []).map((token) => element("span", "chip", token)));
  return line;
}

function latentLink(page, latent) {
  const link = element("a", "", String(latent));
  link.href = page.form.dataset.latent.replace("0", String(latent));
  return link;
}

function showEdits(view) {
  const { page, state, found } = view;
  const held = document.activeElement?.closest?.("#try-edits [data-edit]")?.dataset.edit;
  page.edits.replaceChildren(...state.edits.map((edit) => {
    const item = element("li");
    const kind = element("select");
    for (const [value, label] of [["ablate", "ablate"], ["boost", "boost ×"], ["clamp", "clamp to"]]) kind.append(new Option(label, value, false, value === edit.kind));
    kind.setAttribute("aria-label", `What to do to latent ${edit.latent}`);
    kind.dataset.edit = `${edit.latent}-kind`;
    kind.addEventListener("change", () => {
      const usual = { ablate: 0, boost: 2, clamp: Math.round(10 * largestOf(found, edit.latent)) / 10 || 10 };
      Object.assign(edit, { kind: kind.value, value: usual[kind.value] });
      edited(view);
    });
    const value = element("input", "short-number");
    value.inputMode = "decimal";
    value.value = edit.value;
    value.hidden = edit.kind === "ablate";
    value.dataset.edit = `${edit.latent}-value`;
    value.setAttribute("aria-label", edit.kind === "boost" ? `Factor of latent ${edit.latent}` : `Activation of latent ${edit.latent}`);
    value.addEventListener("change", () => { edit.value = numberOr(value.value, edit.value); edited(view); });
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove the edit of latent ${edit.latent}`);
    remove.addEventListener("click", () => { state.edits = state.edits.filter((other) => other !== edit); edited(view); page["add-latent"].focus(); });
    item.append(latentLink(page, edit.latent), kind, value, remove);
    if (found?.about[edit.latent]) item.append(aboutLatent(found, edit.latent));
    return item;
  }));
  page.clear.hidden = state.edits.length < 2;
  if (held) page.edits.querySelector(`[data-edit="${held}"]`)?.focus();
}

function largestOf(found, latent) {
  return Math.max(0, ...(found?.tokens ?? []).flatMap((t) => t.latents.filter(([i]) => i === latent).map(([, a]) => a)));
}

function showNext({ page, found }) {
  if (!found.next) {
    page["next-note"].textContent = "The subject is an encoder and predicts no next token.";
    page.next.replaceChildren();
    return;
  }
  const kinds = ["original", "recons", "edited"].filter((kind) => `p_${kind}` in found.next.tokens[0]);
  const names = { original: "as it is", recons: "with the reconstruction", edited: "edited" };
  page["next-note"].replaceChildren("After ", element("span", "chip", shownAlone(found.tokens[found.position])), element("br"),
    ...kinds.map((kind) => {
      const key = element("span", "keyed");
      key.append(element("span", `key ${kind}`), names[kind] + (kind === "original" ? "" : ` (KL ${short(found.next[`kl_${kind}`])})`));
      return key;
    }));
  const likeliest = Math.max(...found.next.tokens.flatMap((token) => kinds.map((kind) => token[`p_${kind}`])));
  page.next.replaceChildren(...found.next.tokens.slice(0, 12).map((token) => {
    const item = element("li");
    item.append(element("span", "chip", shownAlone(token)));
    for (const kind of kinds) {
      const fill = element("span", `fill ${kind}`);
      fill.style.setProperty("--w", (token[`p_${kind}`] / likeliest).toFixed(4));
      const value = element("span", "num", percent(token[`p_${kind}`]));
      value.title = names[kind];
      item.append(fill, value);
    }
    return item;
  }));
}

function listenToStrip(view) {
  const { page, state } = view;
  const choose = (position) => { state.position = position; keepState(view); askModel(view); };
  page.strip.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(Number(button.dataset.position));
  });
  page.strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = [...page.strip.querySelectorAll("button")];
    const at = Math.min(Math.max(buttons.indexOf(document.activeElement) + step, 0), buttons.length - 1);
    for (const button of buttons) button.tabIndex = -1;
    buttons[at].tabIndex = 0;
    buttons[at].focus();
  });
}

// A labelled table

function startLabelled(page) {
  const at = (name) => document.getElementById(`labelled-${name}`);
  at("file").addEventListener("change", async () => {
    const [file] = at("file").files;
    if (!file) return;
    if (file.size > 1_000_000) return complain(at("error"), new Error(`${file.name} has ${file.size} bytes; give at most 1,000,000`));
    at("table").value = await file.text();
  });
  at("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    at("error").hidden = true;
    at("go").disabled = true;
    at("status").textContent = "Reading the texts …";
    try {
      showLabelled(page, at, await ask("try/labelled", { table: at("table").value }));
    } catch (error) {
      at("status").textContent = "";
      at("result").hidden = true;
      complain(at("error"), error);
    }
    at("go").disabled = false;
  });
}

function showLabelled(page, at, found) {
  const best = found.best[0];
  const chance = found.null.losses_train;
  at("status").textContent = `${found.n_train} texts to fit, ${found.n_held_out} to judge, ${found.seconds.toFixed(1)} s`;
  const verdict = found.null.n_as_good
    ? `Do not believe it: with shuffled labels the best of ${found.n_latents.toLocaleString("en")} latents fits as well in ${found.null.n_as_good} of ${chance.length} shuffles.`
    : `The best of ${found.n_latents.toLocaleString("en")} latents fits with loss ${short(best.loss_train)}; with shuffled labels, in ${chance.length} shuffles, the best had ${short(Math.min(...chance))} to ${short(Math.max(...chance))}.`;
  const more = [found.warning && `Beware: ${found.warning}.`, found.n_cut && `Of ${found.n_cut} texts only the last ${found.max_tokens} tokens were read.`,
    found.n_left_out && `${found.n_left_out} texts were left out, so that near-identical ones stay on one side.`].filter(Boolean);
  at("verdict").textContent = [verdict, ...more].join(" ");
  at("best").replaceChildren(...found.best.map((row) => {
    const line = element("tr");
    const head = element("th", "num");
    head.scope = "row";
    head.append(latentLink(page, row.latent));
    const words = element("td");
    words.append(aboutLatent(found, row.latent));
    const numbers = [short(row.auc), `${short(row.auc_low)} – ${short(row.auc_high)}`, percent(row.accuracy), short(row.loss), short(row.loss_train)];
    const label = element("td");
    label.append(element("span", "chip", found.labels[row.weight > 0 ? 1 : 0]));
    line.append(head, label, ...numbers.map((text) => element("td", "num", text)), words);
    return line;
  }));
  at("result").hidden = false;
}

// Small things

function element(name, kind = "", text = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text) made.textContent = text;
  return made;
}

function complain(line, error) {
  line.textContent = error.message;
  line.hidden = false;
}

function shownAlone(token) {
  return token.shown.replaceAll(" ", "␣") || "∅";
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "−");
  return (size >= 1e-4 && size < 1000 ? value.toPrecision(3) : size >= 1000 ? Math.round(value).toLocaleString("en") : value.toExponential(1)).replace("-", "−");
}

function signed(value) {
  return (value < 0 ? "" : "+") + short(value);
}

function percent(p) {
  return p < 0.0005 ? "<0.1%" : `${(100 * p).toPrecision(p < 0.1 ? 2 : 3)}%`;
}
