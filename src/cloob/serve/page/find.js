// The view "Find": all pictures, or what a query finds.
import * as api from "./api.js";
import { query } from "./chips.js";
import * as detail from "./detail.js";
import { $, announce, h, month, number, pictures, score } from "./dom.js";
import { Grid } from "./grid.js";
import * as marks from "./marks.js";
import * as state from "./state.js";

const TOP = 500;
const grid = new Grid({ label: "Pictures", open: detail.open });
const body = $("found");
let asking = null;
let asked = "";

const written = (part) => (part.words !== undefined ? `“${part.words}”` : part.item !== undefined ? "a picture like this" : "your picture");

function heading(parts) {
  if (!parts.length) return state.get().where ? "Pictures that pass the filter" : "The collection";
  return parts.map((part, i) => `${part.weight < 0 ? "− " : i ? "+ " : ""}${written(part)}`).join(" ");
}

/** Fetches and shows what the state asks for. */
export function draw({ force = false } = {}) {
  const { where, cutoff, order } = state.get();
  const parts = query();
  $("order").hidden = !parts.length;
  $("order").value = order;
  const words = JSON.stringify([parts, where, cutoff, order, api.round]);
  if (words !== asked || force) answer(words, parts, where, cutoff);
}

async function answer(words, parts, where, cutoff) {
  asked = words;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  $("found-title").textContent = heading(parts);
  $("mark-all").disabled = true;
  let waits = true;
  const busy = setTimeout(() => wait(() => waits && !signal.aborted), 150);
  const answered = () => {
    waits = false;
    body.classList.remove("busy");
  };
  try {
    if (parts.length) await search(parts, where, cutoff, signal, answered);
    else await browse(where, signal, answered);
  } catch (problem) {
    if (!signal.aborted) failed(problem);
  } finally {
    clearTimeout(busy);
    waits = false;
    if (asking.signal === signal) answered();
  }
}

/** Says that an answer takes its time, and that the model is loaded for the first one. */
function wait(waits) {
  body.classList.add("busy");
  api.sayProgress("Searching …", waits, (words) => ($("found-note").textContent = words));
  if (!body.querySelector(".tile")) body.replaceChildren(h("div.skeleton", { "aria-hidden": "true" }, ...Array.from({ length: 24 }, () => h("span.tile"))));
}

async function browse(where, signal, answered) {
  const [found, { months }] = await Promise.all([api.ids(where, signal), api.months(where, signal)]);
  answered();
  const sections = inMonths(months, found.ids.length);
  const words = where ? `${pictures(found.ids.length)} in all` : `${pictures(found.ids.length)}`;
  $("found-note").textContent = words;
  if (found.ids.length) show(found.ids, { sections });
  else body.replaceChildren(empty(where ? "No picture passes the filter" : "The collection is empty", where ? "Change the filter, or take it away." : "cloob index adds pictures; they appear here while this page is open."));
  announce(words);
}

async function search(parts, where, cutoff, signal, answered) {
  const found = await api.search({ parts, top: TOP, cutoff, ...(where && { where }) }, signal);
  answered();
  const isByDate = state.get().order === "newest";
  if (isByDate) found.hits.sort((one, other) => (other.date ?? "").localeCompare(one.date ?? ""));
  api.remember(found.hits);
  const note = noteFor(found, cutoff);
  $("found-note").textContent = note;
  if (found.hits.length) {
    const sections = isByDate ? inMonths(countMonths(found.hits), found.hits.length) : undefined;
    show(found.hits.map((hit) => hit.id), { sections, facts: (place) => fitOf(found.hits[place]) }, endOf(found, cutoff));
  } else body.replaceChildren(nothing(found));
  announce(found.hits.length ? note : "Nothing fits");
}

function noteFor(found, cutoff) {
  if (!cutoff) return `the nearest ${number(found.hits.length)} of ${number(found.searched)}, fitting or not`;
  const more = found.hits.length === TOP ? "the best " : "";
  return `${more}${number(found.hits.length)} of ${pictures(found.searched)} ${found.hits.length === 1 ? "fits" : "fit"}`;
}

/** How well a picture fits the query, as its detail says it. */
function fitOf({ score: cosine, margin }) {
  const above = margin === null ? [] : [["Fits by", `${margin.toFixed(1).replace("-", "−")} deviations above unrelated words`]];
  return [["Score", score(cosine)], ...above];
}

/** Sections of {month, count}, where they count these pictures: else the collection has changed meanwhile. */
function inMonths(months, total) {
  const sum = months.reduce((before, { count }) => before + count, 0);
  if (sum !== total) return undefined;
  return months.map(({ month: date, count }) => ({ title: month(date) || "Without a date", count }));
}

/** {month, count} of hits that are ordered by date. */
function countMonths(hits) {
  const months = [];
  for (const hit of hits) {
    const name = hit.date?.slice(0, 7) ?? null;
    if (months.at(-1)?.month === name) months.at(-1).count += 1;
    else months.push({ month: name, count: 1 });
  }
  return months;
}

/** What stands below the pictures that a search has found. */
function endOf({ cut }, cutoff) {
  const button = (words, value) => h("button.button", { type: "button", onclick: () => state.change({ cutoff: value }) }, words);
  if (!cutoff) return h("p.end", {}, button("Only what fits", true));
  return cut ? h("p.end", {}, "The next ones fit no better than they fit unrelated words. ", button("Show them too", false)) : "";
}

function show(ids, how, end = "") {
  body.replaceChildren(grid.element, end);
  grid.set(ids, how);
  $("mark-all").disabled = false;
}

$("order").addEventListener("change", () => state.change({ order: $("order").value }));
$("mark-all").addEventListener("click", () => marks.add(grid.ids));

function empty(title, advice, ...more) {
  return h("div.empty", {}, h("p.empty-title", {}, title), h("p.quiet", {}, advice), ...more);
}

function nothing(found) {
  if (!found.searched) return empty("No picture passes the filter", "Change the filter, or take it away.");
  const anyway = h("button.button", { type: "button", onclick: () => state.change({ cutoff: false }) }, "Show the nearest anyway");
  return empty("Nothing fits", `The nearest of ${pictures(found.searched)} fit this no better than they fit unrelated words.`, anyway);
}

function failed(problem) {
  asked = "";
  $("found-note").textContent = "";
  const again = h("button.button", { type: "button", onclick: () => draw({ force: true }) }, "Try again");
  body.replaceChildren(h("div.empty", { role: "alert" }, h("p.empty-title", {}, "That did not work"), h("p.quiet", {}, problem.message), again));
}
