// The query: words, pictures of the collection and uploaded pictures as chips with weights.
import * as api from "./api.js";
import { $, announce, h, icon, later, title } from "./dom.js";
import * as state from "./state.js";

const input = $("words");
const list = $("chips");
const popover = $("weight");
const MOST_PARTS = 16;
const shown = (weight) => `${weight < 0 ? "−" : ""}${Math.abs(weight).toFixed(1).replace(/\.0$/, "")}`;

/** What is being typed, as a part; null where it is too little. */
function draft(least = 2) {
  const text = input.value.trim();
  const away = /^[-−]\s*(?=\S)/.exec(text);
  const words = away ? text.slice(away[0].length) : text;
  return words.length >= least ? { words, weight: away ? -1 : 1 } : null;
}

/** The whole query: the chips, and what is being typed. */
export function query() {
  const written = draft();
  return [...state.get().parts, ...(written ? [written] : [])].slice(0, MOST_PARTS);
}

export function add(part) {
  const parts = state.get().parts;
  if (parts.some((old) => JSON.stringify(old) === JSON.stringify(part))) return announce("That is part of the query already.");
  if (parts.length >= MOST_PARTS) return announce(`A query has at most ${MOST_PARTS} parts.`);
  state.change({ parts: [...parts, part], view: "find", picture: null });
  scrollTo({ top: 0 });
}

/** A new query of one part, in the grid. */
export function begin(part) {
  input.value = "";
  state.change({ parts: [part], view: "find", picture: null });
  scrollTo({ top: 0 });
}

const replace = (place, part) =>
  state.change({ parts: state.get().parts.map((old, i) => (i === place ? part : old)) }, { replace: true });

function remove(place) {
  state.change({ parts: state.get().parts.filter((_, i) => i !== place) });
  const left = list.querySelectorAll("button.chip-body");
  (left[Math.min(place, left.length - 1)] ?? input).focus();
}

const named = (part) => part.words ?? (part.item !== undefined ? `picture ${part.item}` : "your picture");

function chip(part, place) {
  const picture = part.item !== undefined ? api.thumbnail(part.item, 64) : part.upload && api.uploadThumbnail(part.upload);
  const label = h("span.chip-words", {}, part.words ?? (part.item !== undefined ? "like this" : "your picture"));
  const image = picture && h("img", { src: picture, alt: "", width: 26, height: 26 });
  if (image) image.addEventListener("error", () => image.classList.add("lost"));
  if (part.item !== undefined) api.item(part.item).then((item) => item && (label.textContent = title(item)));
  const weight = part.weight === 1 ? null : h("span.chip-weight", {}, part.weight === -1 ? "−" : `${shown(part.weight)} ×`);
  const body = h(
    "button.chip-body",
    {
      type: "button",
      "aria-label": `${named(part)}, weight ${shown(part.weight)}; arrow keys change it, Delete removes`,
      onclick: () => openWeight(place, body),
      onkeydown: (event) => onChipKey(event, place),
    },
    ...[weight, image || null, label],
  );
  const close = h("button.chip-close", { type: "button", "aria-label": `Remove ${named(part)}`, onclick: () => remove(place) }, icon("close"));
  return h(`li.chip${part.weight < 0 ? ".away" : ""}`, {}, body, close);
}

function onChipKey(event, place) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = { ArrowUp: 0.1, ArrowRight: 0.1, ArrowDown: -0.1, ArrowLeft: -0.1 }[event.key];
  if (step) {
    event.preventDefault();
    setWeight(place, state.get().parts[place].weight + step);
    list.querySelectorAll("button.chip-body")[place].focus();
  } else if (event.key === "Delete" || event.key === "Backspace") {
    event.preventDefault();
    remove(place);
  }
}

function setWeight(place, value) {
  const weight = Math.round(Math.max(-2, Math.min(2, value)) * 10) / 10;
  const part = state.get().parts[place];
  if (part && part.weight !== weight) replace(place, { ...part, weight });
}

function openWeight(place, anchor) {
  const part = state.get().parts[place];
  const output = h("output", {}, shown(part.weight));
  const slider = h("input", { type: "range", min: -2, max: 2, step: 0.1, value: part.weight, "aria-label": "Weight" });
  slider.addEventListener("input", () => {
    output.textContent = shown(Number(slider.value));
    setWeight(place, Number(slider.value));
  });
  const edit = h("button.button", { type: "button" }, "Edit the words");
  edit.addEventListener("click", () => {
    popover.hidePopover();
    input.value = `${part.weight < 0 ? "-" : ""}${part.words}`;
    remove(place);
    input.focus();
  });
  popover.ontoggle = (event) => {
    const on = document.activeElement;
    const lost = on === document.body || popover.contains(on); // the chip that was left was drawn anew
    if (event.newState === "closed" && lost) list.querySelectorAll("button.chip-body")[place]?.focus();
  };
  popover.replaceChildren(
    h("div.weight-row", {}, h("span.quiet", {}, "away"), slider, h("span.quiet", {}, "towards"), output),
    ...(part.words !== undefined ? [edit] : []),
  );
  popover.showPopover();
  const [box, own] = [anchor.getBoundingClientRect(), popover.getBoundingClientRect()];
  popover.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  popover.style.top = `${box.bottom + 8}px`;
  slider.focus();
}

/** Uploads pictures and adds them to the query, until one fails. */
async function addPictures(files) {
  $("box").classList.add("busy");
  try {
    for (const file of [...files].slice(0, MOST_PARTS)) {
      announce("Uploading the picture");
      const { upload } = await api.upload(file);
      announce("The picture is part of the query");
      add({ upload, weight: 1 });
    }
  } catch (problem) {
    complain(problem.message);
  } finally {
    $("box").classList.remove("busy");
    $("file").value = "";
  }
}

let complaint = null;

/** Says under the box what went wrong. */
export function complain(text) {
  complaint?.remove();
  const mine = (complaint = h("p.wrong.under-box", { role: "alert" }, text));
  $("box").after(mine);
  setTimeout(() => mine.remove(), 8000);
}

/** Draws the chips of a state. */
export function draw() {
  const { parts } = state.get();
  const focused = [...list.querySelectorAll("button.chip-body")].indexOf(document.activeElement);
  list.replaceChildren(...parts.map(chip));
  if (focused >= 0) list.querySelectorAll("button.chip-body")[focused]?.focus();
  input.placeholder = parts.length ? "and …" : "Describe a picture, or drop one here";
}

/** Listens to keys, drops and pastes; `typed` is called while words are typed. */
export function start(typed) {
  const soon = later(() => (typed(), scrollTo({ top: 0 })), 260);
  input.addEventListener("input", () => soon());
  input.addEventListener("keydown", (event) => {
    if (event.key === "Backspace" && !input.value && state.get().parts.length) {
      event.preventDefault();
      remove(state.get().parts.length - 1);
      input.focus();
    }
    if (event.key === "Escape") input.blur();
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    soon.cancel();
    const part = draft(1); // a word of one letter: 猫
    if (!part) return;
    input.value = "";
    add(part);
  });
  $("box").addEventListener("click", (event) => event.target === event.currentTarget && input.focus());
  $("pick").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => addPictures($("file").files));
  addEventListener("paste", (event) => {
    addPictures([...(event.clipboardData?.files ?? [])].filter((one) => one.type.startsWith("image/")));
  });
  startDrops();
  addEventListener("popstate", () => popover.hidePopover()); // its chip may be gone
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      input.focus();
    }
  });
}

function startDrops() {
  let depth = 0;
  const show = () => $("drop").classList.toggle("shown", depth > 0);
  const brings = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => brings(event) && (depth++, show()));
  addEventListener("dragleave", (event) => brings(event) && (depth--, show()));
  addEventListener("dragover", (event) => brings(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!brings(event)) return;
    event.preventDefault();
    depth = 0;
    show();
    addPictures(event.dataTransfer.files);
  });
}
