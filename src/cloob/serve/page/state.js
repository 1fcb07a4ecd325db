// What the page shows, as the address says it: a link, a reload and the back button bring it back.

const PART = /^(-?[0-9]+(?:\.[0-9]+)?)~([wiu])~([^]+)$/;
export const USUAL_FIT = 1.75; // how many deviations above unrelated words a label fits
export const MOST_FIT = 6;
const KINDS = { w: "words", i: "item", u: "upload" };

function readPart(text) {
  const found = PART.exec(text);
  if (!found) return text.trim() ? { words: text.slice(0, 1000), weight: 1 } : null;
  const weight = Math.max(-2, Math.min(2, Number(found[1])));
  const kind = KINDS[found[2]];
  const value = kind === "item" ? Number(found[3]) : found[3];
  if (kind === "item" && !(Number.isSafeInteger(value) && value > 0)) return null;
  if (kind === "upload" && !/^[0-9a-f]{32}$/.test(value)) return null;
  return { [kind]: value, weight };
}

function readFit(text) {
  const value = text ? Number(text) : NaN;
  return value >= 0 && value <= MOST_FIT ? value : USUAL_FIT;
}

function writePart(part) {
  if (part.words !== undefined && part.weight === 1 && !PART.test(part.words)) return part.words;
  const kind = Object.keys(KINDS).find((letter) => part[KINDS[letter]] !== undefined);
  return `${part.weight}~${kind}~${part[KINDS[kind]]}`;
}

export function read(address = location.search) {
  const words = new URLSearchParams(address);
  const view = words.get("view");
  return {
    view: view === "sort" ? view : "find",
    parts: words.getAll("q").map(readPart).filter(Boolean).slice(0, 16),
    where: words.get("where") ?? "",
    cutoff: words.get("cutoff") !== "off",
    labels: words.getAll("label").slice(0, 200),
    multi: words.get("multi") === "on",
    none: words.get("none") !== "off",
    fit: readFit(words.get("fit")),
    template: words.get("template") ?? "",
    order: words.get("order") === "newest" ? "newest" : "best",
    picture: /^[1-9]\d{0,15}$/.test(words.get("picture")) ? Number(words.get("picture")) : null,
  };
}

export function write(state) {
  const words = new URLSearchParams();
  const set = (key, value, usual) => value !== usual && words.set(key, value);
  set("view", state.view, "find");
  for (const part of state.parts) words.append("q", writePart(part));
  set("where", state.where, "");
  if (!state.cutoff) words.set("cutoff", "off");
  for (const label of state.labels) words.append("label", label);
  if (state.multi) words.set("multi", "on");
  if (!state.none) words.set("none", "off");
  set("fit", state.fit, USUAL_FIT);
  set("template", state.template, "");
  set("order", state.order, "best");
  set("picture", state.picture, null);
  return words.size ? `?${words}` : "/";
}

let now = read();
const listeners = [];

export const get = () => now;

/** Calls back with (state, before) after each change. */
export const watch = (listener) => listeners.push(listener);

/** Changes the state and the address; `replace` leaves no step for the back button. */
export function change(difference, { replace = false } = {}) {
  const before = now;
  now = { ...now, ...difference };
  const address = write(now);
  const opened = now.picture !== null && before.picture === null; // the step before it is the page without it
  if (replace) history.replaceState(history.state, "", address);
  else if (address !== write(before)) history.pushState({ opened }, "", address);
  for (const listener of listeners) listener(now, before);
}

let leaving = null; // the step back of a picture that was closed

/** Takes the picture out of the address: back to the step before it was opened, where there is one. */
export function leavePicture() {
  if (!history.state?.opened) return change({ picture: null }, { replace: true });
  leaving = new Promise((resolve) => addEventListener("popstate", resolve, { once: true }));
  history.back();
}

/** Puts a picture into the address, after the one before it has left. */
export async function openPicture(picture) {
  await leaving;
  change({ picture });
}

addEventListener("popstate", () => {
  const before = now;
  now = read();
  for (const listener of listeners) listener(now, before);
});
