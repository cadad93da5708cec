// Comparing: where the matching takes longer than a page may, wait for it and show the page again.

import { load } from "./data.js";

export function startCompare() {
  const choice = document.getElementById("with");
  choice?.addEventListener("change", () => choice.value && choice.form.requestSubmit());
  const waiting = document.getElementById("compare-waiting");
  if (!waiting) return;
  const ask = () => load("compare", { with: choice.value, wait: 0 }).then((found) => {
    if (found.table || found.unlike) return location.reload();
    document.getElementById("compare-done").textContent = `${Math.floor(100 * found.done)}%`;
    setTimeout(ask, 1000);
  }, (error) => {
    waiting.className = "missing";
    waiting.textContent = error.message;
  });
  ask();
}
