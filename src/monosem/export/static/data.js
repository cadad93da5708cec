// Where pages get their numbers in an export: scripts in data/, each of which calls monosemData with its name.

const waiting = {};
window.monosemData = (name, value) => waiting[name](value);

export function load(name, params = {}) {
  const key = params.colour ? `${name}-${params.colour}` : name;
  return new Promise((resolve, reject) => {
    waiting[key] = resolve;
    const script = document.createElement("script");
    script.src = document.body.dataset.plotly.replace("static/plotly.min.js", `data/${key}.js`);
    script.onerror = () => reject(new Error(`${key} is not in this export`));
    document.head.append(script);
  });
}
