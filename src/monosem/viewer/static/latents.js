// The table of latents: j and k walk its rows, Enter opens one; empty filters stay out of the address.

export function startLatents() {
  const form = document.getElementById("filters");
  form?.addEventListener("submit", () => {
    for (const input of form.querySelectorAll("input, select")) if (!input.value) input.disabled = true;
    setTimeout(() => { for (const input of form.querySelectorAll("input, select")) input.disabled = false; });
  });
  const links = [...document.querySelectorAll(".grid tbody th a")];
  let at = -1;
  document.addEventListener("keydown", (event) => {
    const step = { j: 1, k: -1 }[event.key];
    if (!step || !links.length || event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, textarea, dialog")) return;
    links[at]?.closest("tr").classList.remove("at");
    at = Math.min(Math.max(at + step, 0), links.length - 1);
    links[at].closest("tr").classList.add("at");
    links[at].focus();
  });
}
