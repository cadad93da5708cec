// Comparing: where the matching takes longer than a page may, wait for it and show the page again.

import { load } from "./data.js";

export function startCompare() {
  const choice = document.getElementById("with");
  choice?.addEventListener("change", () => choice.value && choice.form.requestSubmit());
  const waiting = document.getElementById("compare-waiting");
  if (!waiting) return;
  load("compare", { with: choice.value }).then(() => location.reload(), (error) => {
    waiting.className = "missing";
    waiting.textContent = error.message;
  });
}
