// Before the first paint: the theme of the address, else the one chosen last, else the system's.
(function () {
  const asked = new URLSearchParams(location.search).get("theme");
  let kept = null;
  try { kept = localStorage.getItem("monosem-theme"); } catch { /* storage may be off */ }
  const theme = [asked, kept].find((name) => name === "light" || name === "dark");
  if (theme) document.documentElement.dataset.theme = theme;
})();
