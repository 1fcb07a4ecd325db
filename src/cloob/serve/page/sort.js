// The view "Sort": all pictures by labels in the user's own words.
import * as api from "./api.js";
import * as detail from "./detail.js";
import { $, announce, h, number, percent, pictures } from "./dom.js";
import { Grid } from "./grid.js";
import * as marks from "./marks.js";
import * as state from "./state.js";

const view = $("view-sort");
const LEAST = 104;
const MOST = 1000; // pictures of a label that the server names
const NOTE = "Each picture goes to its best label.";
let parts = null;
let asking = null;
let asked = "";
let written = "";
let grids = [];

function build() {
  const labels = h("textarea", { id: "labels", rows: 4, spellcheck: false, placeholder: "bird\nflower\nbuilding" });
  const template = h("input", { type: "text", id: "template", placeholder: "a picture of a {c}", maxLength: 200 });
  const multi = h("input", { type: "checkbox", id: "multi" });
  const none = h("input", { type: "checkbox", id: "none" });
  const fit = h("input", { type: "range", id: "fit", min: 0, max: state.MOST_FIT, step: 0.25, "aria-describedby": "fit-help" });
  const fitShown = h("output", { for: "fit" });
  const wrong = h("p.wrong", { role: "alert" });
  const answers = h("div.labels");
  const form = h(
    "form.sort-form",
    {},
    h("div.field", {}, h("label", { for: "labels" }, "Labels, one a line"), labels),
    h(
      "div.sort-options",
      {},
      h("div.field", {}, h("label", { for: "template" }, "Sentence around each label"), template),
      h("label.check", {}, multi, "Several labels a picture"),
      h("label.check", {}, none, "Offer “none of these”"),
      h(
        "div.field",
        {},
        h("label", { for: "fit" }, "How well a label must fit"),
        h("div.fit", {}, fit, fitShown),
        h("p.quiet", { id: "fit-help" }, "Deviations above unrelated words; needs one of the two boxes."),
      ),
      h("button.button.primary", { type: "submit" }, "Sort the pictures"),
    ),
  );
  const drawFit = () => {
    fit.disabled = !multi.checked && !none.checked;
    fitShown.textContent = Number(fit.value).toFixed(2);
  };
  for (const input of [multi, none, fit]) input.addEventListener("input", drawFit);
  fit.addEventListener("change", () => state.get().labels.length && state.change({ fit: Number(fit.value) }, { replace: true }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const words = labels.value.split(/[\n,]/).map((label) => label.trim().slice(0, 200)).filter(Boolean);
    if (!words.length) return labels.focus();
    state.change({ labels: [...new Set(words)].slice(0, 200), multi: multi.checked, none: none.checked, fit: Number(fit.value), template: template.value.trim() });
  });
  view.replaceChildren(
    h("div.heading", {}, h("h1", { id: "sort-title" }, "Sort by your own labels"), h("p.quiet", { id: "sort-note" }, NOTE)),
    form,
    wrong,
    answers,
  );
  return { labels, template, multi, none, fit, drawFit, wrong, answers };
}

export async function draw({ force = false } = {}) {
  parts ??= build();
  const { labels, multi, none, fit, template, where } = state.get();
  const form = JSON.stringify([labels, multi, none, fit, template]);
  if (form !== written) {
    written = form; // what is typed and not asked for yet stays otherwise
    parts.labels.value = labels.join("\n");
    parts.template.value = template;
    parts.multi.checked = multi;
    parts.none.checked = none;
    parts.fit.value = fit;
    parts.drawFit();
  }
  const words = JSON.stringify([form, where, api.round]);
  if (words === asked && !force) return;
  asked = words;
  asking?.abort();
  parts.wrong.textContent = "";
  if (!labels.length) return fill(null);
  asking = new AbortController();
  view.classList.add("busy");
  const { signal } = asking;
  let waits = true;
  const say = (words) => ($("sort-note").textContent = words);
  const slow = setTimeout(() => api.sayProgress("Sorting …", () => waits && !signal.aborted, say), 150);
  try {
    const body = { labels, multi, none, top: MOST, ...((multi || none) && { cutoff: fit }), ...(template && { templates: [template] }), ...(where && { where }) };
    const sorted = await api.classify(body, signal);
    waits = false;
    fill(sorted);
  } catch (problem) {
    waits = false;
    if (problem.name === "AbortError") return;
    asked = "";
    fill(null);
    parts.wrong.textContent = problem.message;
  } finally {
    clearTimeout(slow);
  }
}

function fill(sorted) {
  for (const grid of grids) grid.close();
  grids = [];
  view.classList.remove("busy");
  $("sort-note").textContent = NOTE;
  if (!sorted) return parts.answers.replaceChildren();
  $("sort-note").textContent = `${pictures(sorted.classified)} sorted`;
  announce($("sort-note").textContent);
  const most = Math.max(1, ...sorted.labels.map((label) => label.count));
  parts.answers.replaceChildren(...sorted.labels.map((label) => section(label, sorted.classified, most)));
}

function section(label, all, most) {
  const bar = h("span.bar");
  bar.style.setProperty("--share", label.count / most);
  const facts = (place) => [
    ["Label", `${label.label}, ${percent(label.probabilities[place])} of all labels`],
    ...(label.margins ? [["Fits by", `${label.margins[place].toFixed(1).replace("-", "−")} deviations above unrelated words`]] : []),
  ];
  const grid = new Grid({ label: `Pictures of ${label.label}`, open: detail.open, least: LEAST });
  grids.push(grid);
  const across = Math.max(3, Math.floor((view.clientWidth + 14) / (LEAST + 14)));
  const some = across < 6 ? 2 * across : across;
  let open = false;
  const more = h("button.quiet-button", { type: "button", "aria-expanded": "false" });
  const show = () => {
    const count = open ? label.ids.length : some;
    grid.set(label.ids.slice(0, count), { facts });
    more.hidden = label.ids.length <= some;
    more.textContent = open ? "Fewer" : `Show ${surest}`;
    more.setAttribute("aria-expanded", open);
  };
  more.addEventListener("click", () => ((open = !open), show()));
  const surest = label.ids.length < label.count ? `the surest ${number(label.ids.length)}` : "all";
  const mark = h("button.quiet-button", { type: "button", disabled: !label.count, onclick: () => marks.add(label.ids) }, `Mark ${surest}`);
  const copy = h("button.quiet-button", { type: "button", disabled: !label.count }, `Copy paths of ${surest}`);
  copy.addEventListener("click", async () => {
    copy.textContent = await marks.copyPaths(label.ids);
    announce(copy.textContent);
  });
  show();
  const share = all ? percent(label.count / all) : "0 %";
  return h(
    "section.label",
    { "aria-label": label.label },
    h("div.label-head", {}, h("h2", {}, label.label), h("p.quiet", {}, `${number(label.count)} · ${share}`), bar, h("span.label-tools", {}, copy, mark, more)),
    label.count ? grid.element : h("p.quiet", {}, "No picture fits this label best."),
  );
}
