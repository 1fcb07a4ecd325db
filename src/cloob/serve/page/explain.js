// What a query retrieves from the collection as memory, with β as a slider.
import * as api from "./api.js";
import { query } from "./chips.js";
import * as detail from "./detail.js";
import { $, h, later, percent, title } from "./dom.js";
import * as state from "./state.js";

const panel = $("explain");
const button = $("explain-button");
const LEAST = Math.log(0.5);
const GREATEST = Math.log(200);
const SHOWN = 12;
let parts = null;
let asking = null;

function build() {
  const slider = h("input", { type: "range", id: "beta", min: 0, max: 100, step: 1, "aria-describedby": "beta-help" });
  const output = h("output", { for: "beta" });
  const note = h("p.quiet", { id: "beta-help" });
  const waiting = () => h("li", {}, h("span.tile"), h("span.bar"), h("span.quiet", {}, "\u00a0"));
  const list = h("ol.memories", {}, ...Array.from({ length: SHOWN }, waiting)); // its room is there from the start
  const soon = later((beta) => state.change({ beta }, { replace: true }), 120);
  slider.addEventListener("input", () => {
    const beta = Number(Math.exp(LEAST + (slider.value / 100) * (GREATEST - LEAST)).toPrecision(2));
    output.textContent = beta;
    slider.setAttribute("aria-valuetext", `β ${beta}`);
    soon(beta);
  });
  panel.replaceChildren(
    h("div.explain-head", {}, h("div", {}, h("h2", {}, "What the query calls to mind"), note), h("div.beta", {}, h("label", { for: "beta" }, "β"), slider, output)),
    list,
  );
  return { slider, output, note, list };
}

/** Fetches and shows the memories, where the panel is open and there is a query. */
export async function draw() {
  const { explain: open, beta, models, view, where } = state.get();
  const asked = query();
  button.disabled = !asked.length || view !== "find";
  const shown = open && !button.disabled;
  panel.hidden = !shown;
  button.setAttribute("aria-expanded", shown);
  if (!shown) return;
  parts ??= build();
  asking?.abort();
  asking = new AbortController();
  try {
    const found = await api.explain({ parts: asked, top: SHOWN, ...(beta && { beta }), ...(where && { where }), ...(models[0] && { model: models[0] }) }, asking.signal);
    fill(found);
  } catch (problem) {
    if (problem.name === "AbortError") return;
    parts.note.textContent = problem.message;
    parts.list.replaceChildren(); // they are another query's
  }
}

function fill(found) {
  const { slider, output, note, list } = parts;
  if (document.activeElement !== slider) {
    slider.value = (100 * (Math.log(found.beta) - LEAST)) / (GREATEST - LEAST);
    output.textContent = Number(found.beta.toPrecision(3));
    slider.setAttribute("aria-valuetext", `β ${output.textContent}`);
  }
  const share = found.memories.reduce((sum, memory) => sum + memory.weight, 0);
  const many = found.effective < 10 ? found.effective.toFixed(1) : Math.round(found.effective).toLocaleString("en");
  note.textContent = `About ${many} pictures share the weight; these ${found.memories.length} hold ${percent(share)} of it. A greater β retrieves fewer.`;
  const most = found.memories[0]?.weight || 1;
  api.remember(found.memories.map(({ weight, score, ...item }) => item));
  const ids = found.memories.map((memory) => memory.id);
  list.replaceChildren(
    ...found.memories.map((memory, place) => {
      const bar = h("span.bar");
      bar.style.setProperty("--share", memory.weight / most);
      const image = h("img", { src: api.thumbnail(memory.id, 256), alt: "", width: 96, height: 96 });
      const label = `${title(memory)}, ${percent(memory.weight)} of the weight`;
      const open = () => detail.show(place, { ids, focusAt: (at) => list.querySelectorAll("button")[at]?.focus() });
      return h("li", {}, h("button.tile", { type: "button", "aria-label": label, title: title(memory), onclick: open }, image), bar, h("span.quiet", { "aria-hidden": "true" }, percent(memory.weight)));
    }),
  );
}

export function start() {
  button.addEventListener("click", () => state.change({ explain: !state.get().explain }, { replace: true }));
}
