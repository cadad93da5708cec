// A latent: tabs over its examples, and whole contexts or only the words around the peak, without leaving the page.

export function startLatent() {
  const tabs = [...document.querySelectorAll("[data-tab]")];
  const section = document.getElementById("examples");
  const full = document.getElementById("full");
  startTabs(tabs);
  full?.addEventListener("click", (event) => {
    event.preventDefault();
    const short = section.classList.toggle("short");
    full.textContent = short ? "Whole contexts" : "Around the peak";
    setState("text", short ? null : "full");
  });
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
