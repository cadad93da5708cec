// The one entry: what all pages have, then what this page adds.

import { startShell } from "./shell.js";
import { startOverview } from "./overview.js";
import { startLatents } from "./latents.js";
import { startLatent } from "./latent.js";
import { startTry } from "./try.js";
import { startCompare } from "./compare.js";
import { startScaling } from "./scaling.js";

export function startPage() {
  startShell();
  const own = { overview: startOverview, latents: startLatents, latent: startLatent, try: startTry, compare: startCompare, scaling: startScaling };
  own[document.body.dataset.page]?.();
}

startPage();
