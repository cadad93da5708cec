// Serious faults of a page: contrast below WCAG's 4.5, controls without a name, broken ARIA, headings out of order.
() => {
  const faults = [];
  const visible = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && !e.closest(".hidden, .skip, [aria-hidden=true], .main-svg");
  const rgba = (text) => {
    const n = (text.match(/-?[\d.]+(e-?\d+)?/g) || []).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [n[0] * scale, n[1] * scale, n[2] * scale, n.length > 3 ? n[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.unshift(rgba(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const name = (e) => (e.getAttribute("aria-label") || [...(e.labels || [])].map((l) => l.textContent).join(" ") || e.textContent || e.title || e.dataset.tip || "").trim();
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = words.nextNode(); node; node = words.nextNode()) {
    const e = node.parentElement;
    if (!node.textContent.trim() || !visible(e) || e.closest("svg, script, style, dialog, option, span.button")) continue;
    const found = contrast(over(rgba(getComputedStyle(e).color), behind(e)), behind(e));
    if (found < 4.5) faults.push(`contrast ${found.toFixed(2)}: ${e.tagName}.${e.className} ${node.textContent.trim().slice(0, 40)}`);
  }
  for (const e of document.querySelectorAll("a[href], button, input:not([type=hidden]), select, textarea, summary, [role=tab], [role=img]"))
    if (visible(e) && !name(e)) faults.push(`no name: ${e.outerHTML.slice(0, 100)}`);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i);
  if (ids.length) faults.push(`ids twice: ${ids}`);
  for (const e of document.querySelectorAll("[aria-labelledby], [aria-controls], [aria-describedby]"))
    for (const a of ["aria-labelledby", "aria-controls", "aria-describedby"])
      for (const id of (e.getAttribute(a) || "").split(" ").filter(Boolean)) if (!document.getElementById(id)) faults.push(`${a} leads nowhere: ${id}`);
  const levels = [...document.querySelectorAll("h1, h2, h3")].filter(visible).map((h) => Number(h.tagName[1]));
  if (levels.filter((l) => l === 1).length !== 1) faults.push(`h1: ${levels}`);
  levels.forEach((l, i) => { if (i && l > levels[i - 1] + 1) faults.push(`a heading skips a level: ${levels}`); });
  if (!document.documentElement.lang || !document.title || document.querySelectorAll("main").length !== 1) faults.push("language, title or main");
  for (const table of document.querySelectorAll("table")) if (!table.querySelector("th[scope]")) faults.push("a table without scoped headers");
  for (const e of document.querySelectorAll("[tabindex]")) if (e.tabIndex > 0) faults.push("a tabindex above 0");
  return faults;
}
