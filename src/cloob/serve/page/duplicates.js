// The view "Duplicates": groups of pictures that look alike, the best of each first, to mark what may go.
import * as api from "./api.js";
import * as detail from "./detail.js";
import { $, announce, bytes, h, number, pictures, score } from "./dom.js";
import { Grid } from "./grid.js";
import * as marks from "./marks.js";
import * as state from "./state.js";

const view = $("view-duplicates");
const LEAST = 164;
const PAGE = 40; // groups that are drawn at once
let parts = null;
let asking = null;
let asked = "";
let grids = [];

function build() {
  const threshold = h("select", { "aria-label": "How alike" }, ...state.THRESHOLDS.map((value) => new Option(`Cosine ${value} and above`, value)));
  threshold.addEventListener("change", () => state.change({ threshold: Number(threshold.value) }));
  const note = h("p.quiet");
  const answers = h("div");
  view.replaceChildren(h("div.heading", {}, h("h1", { id: "duplicates-title" }, "Duplicates"), note, threshold), answers);
  return { threshold, note, answers };
}

export async function draw({ force = false } = {}) {
  parts ??= build();
  const { threshold, where, models } = state.get();
  parts.threshold.value = threshold;
  const words = JSON.stringify([threshold, where, models[0], api.round]);
  if (words === asked && !force) return;
  asked = words;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const slow = setTimeout(() => (parts.note.textContent = "Comparing all pictures …"), 150);
  try {
    fill(await api.duplicates({ threshold, where, model: models[0] }, signal));
  } catch (problem) {
    if (problem.name === "AbortError") return;
    asked = "";
    fill({ groups: [], stale: 0 });
    parts.note.textContent = "";
    parts.answers.replaceChildren(h("p.wrong", { role: "alert" }, problem.message));
  } finally {
    clearTimeout(slow);
  }
}

const count = (groups) => `${number(groups.length)} ${groups.length === 1 ? "group" : "groups"}, ${pictures(groups.flatMap((group) => group.ids).length)}`;

function fill({ groups, stale }) {
  for (const grid of grids) grid.close();
  grids = [];
  const gone = stale ? `; ${number(stale)} left out: gone, or changed since the last cloob index` : "";
  parts.note.textContent = `${groups.length ? count(groups) : "No pictures look alike"}${gone}`;
  announce(parts.note.textContent);
  const isSame = ({ ids, equal }) => equal.every((id) => id === ids[0]);
  const same = groups.filter(isSame);
  const alike = groups.filter((group) => !isSame(group));
  const copies = same.flatMap(({ ids, shot }) => ids.filter((_, place) => shot[place] !== shot[0]));
  const mark = h("button.button", { type: "button", onclick: () => marks.add(copies) }, "Mark all but the first of each");
  parts.answers.replaceChildren(section("Equal byte by byte", same, mark), section("Look alike", alike, h("p.quiet", {}, "These need not be copies: look before you delete.")));
}

function section(title, groups, tool) {
  if (!groups.length) return "";
  const list = h("div.groups");
  const more = h("button.button", { type: "button" }, "More groups");
  const show = () => {
    const from = list.children.length;
    list.append(...groups.slice(from, from + PAGE).map(group));
    more.hidden = list.children.length === groups.length;
  };
  more.addEventListener("click", show);
  show();
  return h("section.label", { "aria-label": title }, h("div.group-head", {}, h("h2", {}, title), h("p.quiet", {}, count(groups)), tool), list, more);
}

/** The end of a picture's folder, which tells copies of one name apart. */
function folder(item) {
  const words = item.path.slice(0, -item.name.length);
  return words.length > 22 ? `…${words.slice(-21)}` : words;
}

function group({ ids, scores, equal }) {
  const isCopy = (place) => equal[place] !== ids[place] && new Set(equal).size > 1; // of one that looks alike
  const facts = (item, place) => [
    `${number(item.width)} × ${number(item.height)} · ${bytes(item.bytes)}`,
    item.date ? `${item.date.slice(0, 19).replace("T", " ")} ${item.date_from}` : "no date",
    folder(item),
    ...(isCopy(place) ? ["same bytes as another"] : []),
  ];
  const grid = new Grid({ label: `${ids.length} pictures`, open: detail.show, least: LEAST, narrow: 2, lines: ids.some((_, place) => isCopy(place)) ? 4 : 3, facts });
  grids.push(grid);
  grid.set(ids, scores, (value, place) => (place ? score(value) : "best"));
  const element = h("div.group", {}, grid.element);
  element.style.setProperty("--n", ids.length);
  return element;
}
