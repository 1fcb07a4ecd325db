// The view "Map": a sample of the collection on a plane to wander in; near by, points become pictures.
import * as api from "./api.js";
import * as detail from "./detail.js";
import { $, announce, h, icon, number, pictures, title } from "./dom.js";
import { hits, why } from "./find.js";
import { MapCanvas } from "./mapcanvas.js";
import * as state from "./state.js";

const view = $("view-map");
const NOTE = "Neighbours look alike to the model.";
let parts = null;
let asking = null;
let asked = "";
let says = 0; // counts the calls of `say`: only the latest one is heard

function build() {
  const canvas = h("canvas", {
    tabIndex: 0,
    role: "application",
    "aria-label": "Map of the collection: arrow keys move, plus and minus zoom, Enter opens the picture in the middle",
    "aria-roledescription": "map",
  });
  const card = h("div.map-card", { hidden: true, "aria-hidden": "true" }, h("img", { alt: "", width: 148, height: 148 }), h("span"));
  const status = h("p.map-status", { hidden: true });
  const map = new MapCanvas(canvas, { hover: (id, x, y) => hover(card, id, x, y), open: (id) => detail.showOne(id), looked: say });
  const method = h("select", { "aria-label": "Projection" }, new Option("Main directions (PCA)", "pca"), new Option("Neighbourhoods (t-SNE)", "tsne"));
  method.addEventListener("change", () => state.change({ method: method.value }));
  const zoom = (factor, label, sign) => h("button.round", { type: "button", "aria-label": label, title: label, onclick: () => map.zoom(factor) }, icon(sign));
  const home = h("button.round", { type: "button", "aria-label": "The whole map", title: "The whole map", onclick: () => map.home() }, icon("home"));
  view.replaceChildren(
    h("div.heading", {}, h("h1", { id: "map-title" }, "Map of the collection"), h("p.quiet", { id: "map-note" }, NOTE), method),
    h("div.map", {}, canvas, card, status, h("div.map-tools", {}, zoom(1.6, "Nearer", "plus"), zoom(1 / 1.6, "Further", "minus"), home)),
  );
  return { map, method, status };
}

async function hover(card, id, x, y) {
  card.hidden = !id;
  if (!id) return;
  const { clientWidth, clientHeight } = card.parentElement;
  card.style.transform = `translate(${Math.min(x + 16, clientWidth - 172)}px, ${y + 210 > clientHeight ? y - 206 : y + 16}px)`;
  const [image, words] = card.children;
  const address = api.thumbnail(id, 256);
  if (card.dataset.shows === address) return;
  card.dataset.shows = address;
  image.src = address;
  words.textContent = "";
  const item = await api.item(id);
  if (item && card.dataset.shows === address) words.textContent = title(item);
}

async function say(id, inView) {
  const call = ++says;
  const item = id ? await api.item(id) : null;
  if (call === says) announce(`${pictures(inView)} in view${item ? `; in the middle: ${title(item)}` : ""}`);
}

/** Lights up what the query found. */
export function light() {
  const { ids } = parts.map.points;
  $("map-note").textContent = NOTE;
  if (!ids.length) return;
  const found = hits();
  parts.map.light(found);
  const n = ids.filter((id) => parts.map.lit.has(id)).length;
  const words = found.length ? `${number(n)} of the ${number(found.length)} found are on the map, lit up. ` : why() && `${why()} · `;
  $("map-note").textContent = `${words}${pictures(ids.length)}; neighbours look alike to the model.`;
}

export async function draw({ force = false } = {}) {
  parts ??= build();
  const { method, where, models } = state.get();
  parts.method.value = method;
  const words = JSON.stringify([method, where, models[0], api.round]);
  parts.map.resize();
  if (words === asked && !force) return light();
  asked = words;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  tell(method === "tsne" ? "Laying out the map; t-SNE takes its time once …" : "Laying out the map …");
  try {
    parts.map.set(await api.map({ method, where, model: models[0], sample: 5000 }, signal));
    const none = where ? "No picture passes the filter" : "The collection is empty";
    tell(parts.map.points.ids.length ? "" : none);
    light();
  } catch (problem) {
    if (problem.name === "AbortError") return;
    asked = "";
    parts.map.set({ ids: [], x: [], y: [] });
    light();
    tell(problem.message);
  }
}

function tell(words) {
  parts.status.textContent = words;
  parts.status.hidden = !words;
}
