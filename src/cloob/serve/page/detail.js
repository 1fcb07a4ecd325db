// One picture, large, with what is known of it and what can be done with it. Its id is part of the address.
import * as api from "./api.js";
import { add, begin } from "./chips.js";
import { $, announce, bytes, h, icon, number, title } from "./dom.js";
import * as marks from "./marks.js";
import * as state from "./state.js";

const dialog = $("detail");
let grid = null; // where the picture is one of several
let place = -1;
let shown = null; // the id of the picture in the dialog
let closedByAddress = false; // the event of a close comes later, when the address may name a picture again

/** Opens the picture at a place of a grid. */
export function open(at, from) {
  [grid, place] = [from, at];
  state.openPicture(from.ids[at]);
}

/** Shows the picture of the address, or none. */
export async function draw({ force = false } = {}) {
  const { picture } = state.get();
  if (picture === shown && !force) return;
  shown = picture;
  if (picture === null) return closeByAddress();
  if (grid?.ids[place] !== picture) place = grid?.ids.indexOf(picture) ?? -1;
  const item = await api.item(picture);
  if (shown !== picture) return; // another was asked for meanwhile, or none
  fill(item);
  if (!dialog.open) dialog.showModal();
}

function closeByAddress() {
  if (!dialog.open) return;
  closedByAddress = true;
  dialog.close();
}

function fill(item) {
  if (item === undefined) {
    dialog.replaceChildren(head("That did not work"), h("p.quiet.detail-gone", {}, "The server did not say what this picture is. Is cloob serve still running?"));
    return;
  }
  if (item === null) {
    dialog.replaceChildren(head("This picture is gone"), h("p.quiet.detail-gone", {}, "It is not in the collection, or not any more."));
    return;
  }
  const image = h("img", { alt: title(item), src: api.thumbnail(item.id, 1024), width: item.width, height: item.height });
  image.style.maxWidth = `min(100%, ${4 * item.width}px)`; // a small one is not blown up further
  image.style.maxHeight = `min(100%, ${4 * item.height}px)`;
  image.addEventListener("error", () => image.replaceWith(h("p.quiet", {}, "Its file is not there any more, or has changed.")));
  const words = h("div.detail-words", {}, actions(item), facts(item));
  dialog.replaceChildren(head(title(item)), h("div.detail-body", {}, h("div.detail-picture", {}, image), words));
  announce(title(item));
}

function actions(item) {
  const mark = h("button.button", { type: "button", "aria-pressed": marks.has(item.id) }, icon("check"), "Mark");
  mark.addEventListener("click", () => {
    marks.toggle(item.id);
    mark.setAttribute("aria-pressed", marks.has(item.id));
  });
  const file = api.picture(item.id);
  return h(
    "div.actions",
    {},
    act("More like this", "search", () => begin({ item: item.id, weight: 1 }), "primary"),
    act("Add to query", "plus", () => add({ item: item.id, weight: 1 })),
    act("Keep away", "minus", () => add({ item: item.id, weight: -1 })),
    mark,
    h("a.button", { href: file, target: "_blank", rel: "noopener" }, "Open the file"),
    h("a.button", { href: file, download: item.name }, "Download"),
  );
}

/** A button that leaves the picture for other ones: there is no tile to go back to. */
function act(words, sign, work, kind = "") {
  const run = () => {
    grid = null;
    work();
  };
  return h(`button.button${kind && `.${kind}`}`, { type: "button", onclick: run }, icon(sign), words);
}

function head(words) {
  const step = (difference, label, sign) =>
    h("button.round", { type: "button", "aria-label": label, title: label, disabled: !neighbour(difference), onclick: () => go(difference, label) }, icon(sign));
  const close = h("button.round", { type: "button", "aria-label": "Close", title: "Close", onclick: () => dialog.close() }, icon("close"));
  return h("div.detail-head", {}, h("h2", { id: "detail-title" }, words), step(-1, "Previous picture", "left"), step(1, "Next picture", "right"), close);
}

const neighbour = (difference) => (place < 0 ? undefined : grid?.ids[place + difference]);

async function go(difference, label) {
  const picture = neighbour(difference);
  if (!picture) return;
  place += difference;
  state.change({ picture }, { replace: true });
  await api.item(picture);
  const button = dialog.querySelector(`[aria-label="${label}"]`);
  (button && !button.disabled ? button : dialog.querySelector('[aria-label="Close"]')).focus();
}

function facts(item) {
  const list = h("dl.facts");
  const say = (name, words) => words !== null && words !== undefined && words !== "" && list.append(h("div", {}, h("dt", {}, name), h("dd", {}, words)));
  if (place >= 0) for (const [name, words] of grid.facts(place)) say(name, words);
  if (item.caption) say("File", item.name);
  if (item.caption?.trim().includes("\n")) say("Caption", item.caption);
  say("Date", item.date && item.date.replace("T", " "));
  say("Size", `${number(item.width)} × ${number(item.height)} pixels, ${bytes(item.bytes)}`);
  for (const [name, words] of Object.entries(item.columns)) say(name, String(words ?? ""));
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
dialog.addEventListener("close", () => {
  if (!closedByAddress) state.leavePicture();
  closedByAddress = false;
  if (place >= 0) grid?.focusAt(place);
});
// A grid has other pictures now: the opened one may be among them.
addEventListener("pictures", ({ detail: changed }) => {
  if (shown === null || (grid !== null && grid !== changed && grid.element.isConnected)) return;
  const at = changed.ids.indexOf(shown);
  if (at < 0 && grid !== changed) return;
  [grid, place] = [changed, at];
  if (dialog.open) draw({ force: true });
});
