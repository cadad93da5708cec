// A latent: tabs over its examples, and whole contexts or only the words around the peak, without leaving the page.

export function startLatent() {
  const tabs = [...document.querySelectorAll("[data-tab]")];
  const section = document.getElementById("examples");
  const full = document.getElementById("full");
  startTabs(tabs);
  startEffects(document.getElementById("effects"));
  full?.addEventListener("click", (event) => {
    event.preventDefault();
    const short = section.classList.toggle("short");
    full.textContent = short ? "Whole contexts" : "Around the peak";
    setState("text", short ? null : "full");
  });
}

// After an ablation: what colours the tokens, and below each text what the prediction of the token chosen turns to.
function startEffects(section) {
  const colours = [...section.querySelectorAll("[data-effect]")];
  for (const colour of colours) {
    colour.addEventListener("click", (event) => {
      event.preventDefault();
      section.classList.toggle("by-loss", colour.dataset.effect === "loss");
      for (const other of colours) other === colour ? other.setAttribute("aria-current", "true") : other.removeAttribute("aria-current");
      setState("effect", colour.dataset.effect === "kl" ? null : colour.dataset.effect);
    });
  }
  for (const effect of section.querySelectorAll(".effect")) startEffect(effect);
}

function startEffect(effect) {
  const tokens = [...effect.querySelectorAll("i[data-at]")];
  if (!tokens.length) return;
  const text = effect.querySelector(".tokens");
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Tokens after the ablation; arrow keys move");
  const panel = document.createElement("div");
  panel.className = "at";
  panel.setAttribute("aria-live", "polite");
  text.after(panel);
  const choose = (chosen) => {
    for (const token of tokens) {
      token.setAttribute("aria-pressed", String(token === chosen));
      token.tabIndex = token === chosen ? 0 : -1;
    }
    const about = effect.querySelector(`li[data-at="${chosen.dataset.at}"]`);
    panel.replaceChildren(...about.cloneNode(true).childNodes);
  };
  for (const token of tokens) {
    token.setAttribute("role", "button");
    token.removeAttribute("title"); // the panel says it
    for (const event of ["pointerenter", "focus", "click"]) token.addEventListener(event, () => choose(token));
  }
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = tokens.indexOf(event.target);
    if (!step || at < 0) return;
    event.preventDefault();
    tokens[Math.min(Math.max(at + step, 0), tokens.length - 1)].focus();
  });
  const size = (token) => Number(token.style.getPropertyValue("--a"));
  choose(tokens.reduce((best, token) => (size(token) > size(best) ? token : best)));
}

function startTabs(tabs) {
  if (!tabs.length) return;
  tabs[0].parentElement.setAttribute("role", "tablist");
  const choose = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      document.getElementById(`panel-${tab.dataset.tab}`).hidden = !on;
    }
  };
  for (const tab of tabs) {
    const panel = document.getElementById(`panel-${tab.dataset.tab}`);
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      choose(tab);
      setState("show", tab.dataset.tab === "top" ? null : tab.dataset.tab);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
      next.focus();
      next.click();
    });
  }
  choose(tabs.find((tab) => tab.hasAttribute("aria-current")) ?? tabs[0]);
  for (const tab of tabs) tab.removeAttribute("aria-current");
}

// What is shown stays in the address, and in the links to the latents before and after.
function setState(name, value) {
  const links = document.querySelectorAll("#previous[href], #next[href]");
  const set = (address) => {
    const url = new URL(address, location.href);
    value === null ? url.searchParams.delete(name) : url.searchParams.set(name, value);
    return url;
  };
  history.replaceState(null, "", set(location.href));
  for (const link of links) link.href = set(link.href).href;
}
