// Plotly, fetched when a page first draws, and dressed in the page's colours. SVG traces and heat maps only: the
// WebGL ones need eval, which the page's Content-Security-Policy refuses.

export function plotly() {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = document.body.dataset.plotly;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("plotly is not installed: pip install 'monosem[viewer]'"));
    document.head.append(script);
  });
}

// A colour of the style sheet, as rgb.
export function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// Draw now and again whenever the theme changes; `describe` gives traces and layout.
export async function draw(element, describe) {
  const library = await plotly();
  const paint = () => {
    const { traces, layout } = describe();
    return library.react(element, traces, dressed(layout), { displayModeBar: false, responsive: true });
  };
  document.addEventListener("themechange", paint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  await paint();
  element.dataset.drawn = "true";
  return library;
}

export function failed(element, error) {
  const line = document.createElement("p");
  line.className = "missing";
  line.textContent = error.message;
  element.replaceChildren(line);
}

function dressed(layout) {
  const ink = colour("--ink");
  const axis = { gridcolor: colour("--line"), linecolor: colour("--strong-line"), zeroline: false, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 52, r: 8, t: 8, b: 44 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--strong-line"), font: { color: ink } },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}
