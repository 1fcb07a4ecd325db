// One picture, large, with what is known of it and what can be done with it.
import * as api from "./api.js";
import { add, begin } from "./chips.js";
import { $, announce, bytes, h, icon, number, score, title } from "./dom.js";
import * as marks from "./marks.js";

const dialog = $("detail");
let grid = null;
let place = 0;
let shows = 0; // counts the calls of `show`: only the latest one may fill the dialog

/** Opens the picture at a place of a grid; false where another was asked for, or the dialog closed, meanwhile. */
export async function show(at, from) {
  const [call, steps] = [++shows, dialog.open];
  [grid, place] = [from, at];
  const value = from.values?.[at];
  const item = await api.item(from.ids[at]);
  if (call !== shows || (steps && !dialog.open)) return false;
  fill(item, value);
  if (!dialog.open) dialog.showModal();
  return true;
}

function fill(item, value) {
  if (item === undefined) {
    dialog.replaceChildren(head("That did not work"), h("p.quiet.detail-gone", {}, "The server did not say what this picture is. Is cloob serve still running?"));
    return;
  }
  if (!item) {
    dialog.replaceChildren(head("This picture is gone"), h("p.quiet.detail-gone", {}, "It was in the collection before; show the changed collection."));
    return;
  }
  const image = h("img", { alt: title(item), src: api.thumbnail(item.id, 1024), width: item.width, height: item.height });
  image.style.maxWidth = `min(100%, ${4 * item.width}px)`; // a small one is not blown up further
  image.style.maxHeight = `min(100%, ${4 * item.height}px)`;
  image.addEventListener("error", () => image.replaceWith(h("p.quiet", {}, "Its file is not there any more, or has changed.")));
  const actions = h(
    "div.actions",
    {},
    act("More like this", "search", () => begin({ item: item.id, weight: 1 }), "primary"),
    act("Add to query", "plus", () => add({ item: item.id, weight: 1 })),
    act("Keep away", "minus", () => add({ item: item.id, weight: -1 })),
  );
  const mark = h("button.button", { type: "button", "aria-pressed": marks.has(item.id) }, icon("check"), "Mark");
  mark.addEventListener("click", () => {
    marks.toggle(item.id);
    mark.setAttribute("aria-pressed", marks.has(item.id));
  });
  const file = api.picture(item.id);
  const original = h("a.button", { href: file, target: "_blank", rel: "noopener" }, "Open the file");
  actions.append(mark, original, h("a.button", { href: file, download: item.name }, "Download"));
  dialog.replaceChildren(head(title(item)), h("div.detail-picture", {}, image), actions, facts(item, value));
  announce(title(item));
}

/** Closes the dialog where other pictures come: there is no place to go back to. */
function leave() {
  grid = null;
  dialog.close();
}

function act(words, sign, work, kind = "") {
  const run = () => {
    leave();
    work();
  };
  return h(`button.button${kind && `.${kind}`}`, { type: "button", onclick: run }, icon(sign), words);
}

function head(words) {
  const step = (difference, label, sign) =>
    h("button.round", { type: "button", "aria-label": label, title: label, disabled: !grid.ids[place + difference], onclick: () => go(difference, label) }, icon(sign));
  const close = h("button.round", { type: "button", "aria-label": "Close", title: "Close", onclick: () => dialog.close() }, icon("close"));
  return h("div.detail-head", {}, h("h2", { id: "detail-title" }, words), step(-1, "Previous picture", "left"), step(1, "Next picture", "right"), close);
}

async function go(difference, label) {
  const next = place + difference;
  if (!grid.ids[next]) return;
  if (!(await show(next, grid))) return;
  const button = label && dialog.querySelector(`[aria-label="${label}"]`);
  (button && !button.disabled ? button : dialog.querySelector('[aria-label="Close"]')).focus();
}

function facts(item, value) {
  const list = h("dl.facts");
  const say = (name, words) => words !== null && words !== undefined && words !== "" && list.append(h("div", {}, h("dt", {}, name), h("dd", {}, words)));
  if (typeof value === "number") say("Score", score(value));
  if (item.caption) say("File", item.name);
  if (item.caption?.trim().includes("\n")) say("Caption", item.caption);
  say("Date", item.date && `${item.date.replace("T", " ")} (${item.date_from})`);
  say("Size", `${number(item.width)} × ${number(item.height)} pixels, ${bytes(item.bytes)}`);
  for (const [name, words] of Object.entries(item.columns)) if (name !== "date_from") say(name, String(words ?? ""));
  const copy = h("button.link", { type: "button" }, "copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(item.path);
      copy.textContent = "copied";
    } catch {
      copy.textContent = "not possible here";
    }
  });
  say("Path", h("span", {}, h("code", {}, item.path), " ", copy));
  return list;
}

dialog.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft") go(-1, "Previous picture");
  if (event.key === "ArrowRight") go(1, "Next picture");
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("close", () => grid?.focusAt(place));
addEventListener("popstate", () => dialog.open && leave());
