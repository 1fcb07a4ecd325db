// The view "Sort": all pictures by labels in the user's own words.
import * as api from "./api.js";
import * as detail from "./detail.js";
import { $, announce, h, number, percent, pictures } from "./dom.js";
import { Grid } from "./grid.js";
import * as marks from "./marks.js";
import * as state from "./state.js";

const view = $("view-sort");
const LEAST = 104;
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
      h("button.button.primary", { type: "submit" }, "Sort the pictures"),
    ),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const words = labels.value.split(/[\n,]/).map((label) => label.trim().slice(0, 200)).filter(Boolean);
    if (!words.length) return labels.focus();
    state.change({ labels: [...new Set(words)].slice(0, 200), multi: multi.checked, none: none.checked, template: template.value.trim() });
  });
  view.replaceChildren(
    h("div.heading", {}, h("h1", { id: "sort-title" }, "Sort by your own labels"), h("p.quiet", { id: "sort-note" }, NOTE)),
    form,
    wrong,
    answers,
  );
  return { labels, template, multi, none, wrong, answers };
}

export async function draw({ force = false } = {}) {
  parts ??= build();
  const { labels, multi, none, template, where, models } = state.get();
  const form = JSON.stringify([labels, multi, none, template]);
  if (form !== written) {
    written = form; // what is typed and not asked for yet stays otherwise
    parts.labels.value = labels.join("\n");
    parts.template.value = template;
    [parts.multi.checked, parts.none.checked] = [multi, none];
  }
  const words = JSON.stringify([labels, multi, none, template, where, models[0], api.round]);
  if (words === asked && !force) return;
  asked = words;
  asking?.abort();
  parts.wrong.textContent = "";
  if (!labels.length) return fill(null);
  asking = new AbortController();
  view.classList.add("busy");
  const slow = setTimeout(() => ($("sort-note").textContent = "Sorting …"), 150);
  try {
    const body = { labels, multi, none, top: 500, ...(template && { templates: [template] }), ...(where && { where }), ...(models[0] && { model: models[0] }) };
    const sorted = await api.classify(body, asking.signal);
    fill(sorted);
  } catch (problem) {
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
  const grid = new Grid({ label: `Pictures of ${label.label}`, open: detail.show, least: LEAST });
  grids.push(grid);
  const across = Math.max(3, Math.floor((view.clientWidth + 14) / (LEAST + 14)));
  const some = across < 6 ? 2 * across : across;
  let open = false;
  const more = h("button.quiet-button", { type: "button", "aria-expanded": "false" });
  const show = () => {
    const count = open ? label.ids.length : some;
    grid.set(label.ids.slice(0, count), label.probabilities.slice(0, count), percent);
    more.hidden = label.ids.length <= some;
    more.textContent = open ? "Fewer" : `Show ${surest}`;
    more.setAttribute("aria-expanded", open);
  };
  more.addEventListener("click", () => ((open = !open), show()));
  const surest = label.ids.length < label.count ? `the surest ${number(label.ids.length)}` : "all";
  const mark = h("button.quiet-button", { type: "button", disabled: !label.count, onclick: () => marks.add(label.ids) }, `Mark ${surest}`);
  show();
  const share = all ? percent(label.count / all) : "0 %";
  return h(
    "section.label",
    { "aria-label": label.label },
    h("div.label-head", {}, h("h2", {}, label.label), h("p.quiet", {}, `${number(label.count)} · ${share}`), bar, h("span", {}, mark, more)),
    label.count ? grid.element : h("p.quiet", {}, "No picture fits this label best."),
  );
}
