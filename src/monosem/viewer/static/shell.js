// What every page has: theme, tooltips, help, and keys.

export function startShell() {
  startTheme();
  startTips();
  startHelp();
  document.addEventListener("keydown", onKey);
}

function startTheme() {
  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme === "dark" ||
      (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("monosem-theme", root.dataset.theme); } catch { /* storage may be off */ }
    const address = new URL(location.href);
    address.searchParams.delete("theme");
    history.replaceState(null, "", address);
    document.dispatchEvent(new Event("themechange"));
  });
}

// A title becomes a tooltip that the keyboard reaches too.
function startTips() {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const on = event.target.closest?.("[title], [data-tip]");
    if (!on || on.closest("svg")) return hide();
    if (on.title) {
      on.dataset.tip = on.title;
      on.removeAttribute("title");
    }
    tip.textContent = on.dataset.tip;
    tip.hidden = false;
    on.setAttribute("aria-describedby", "tip");
    const box = on.getClientRects()[0] ?? on.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true, capture: true });
}

function startHelp() {
  const button = document.getElementById("help-open");
  button.hidden = false;
  button.addEventListener("click", () => document.getElementById("help").showModal());
}

function onKey(event) {
  if (event.key === "Escape") document.getElementById("tip").hidden = true;
  const typing = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (event.ctrlKey || event.metaKey || event.altKey || typing || document.querySelector("dialog[open]")) return;
  const press = { t: "theme", "?": "help-open", s: "star", r: "random", u: "up", f: "full", 1: "tab-top", 2: "tab-random", 3: "tab-quantile",
    j: "next", k: "previous", ArrowRight: "next", ArrowLeft: "previous" };
  const inScroll = event.key.startsWith("Arrow") && event.target.closest?.(".scroll, [role=tablist], .tokens");
  const target = event.key === "/" ? document.getElementById("find") : document.getElementById(press[event.key] ?? "");
  if (!target || inScroll) return;
  event.preventDefault();
  event.key === "/" ? target.focus() : target.click();
}
