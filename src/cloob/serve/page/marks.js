// Pictures that the user has marked, and the list of their paths to take away. Nothing here changes a file.
import * as api from "./api.js";
import { $, announce, h, number } from "./dom.js";

const bar = $("marks");
const [note, copyButton, saveButton, clearButton] = bar.children;
const marked = new Set();

export const has = (id) => marked.has(id);
export const any = () => marked.size > 0;

export function toggle(id) {
  if (!marked.delete(id)) marked.add(id);
  changed();
}

export function add(ids) {
  for (const id of ids) marked.add(id);
  changed();
}

/** Says it; whoever shows marks listens to "marks". */
function changed() {
  bar.hidden = !marked.size;
  say(`${number(marked.size)} marked`);
  dispatchEvent(new Event("marks"));
}

function say(words) {
  note.textContent = words;
  announce(words);
}

/** Hands the paths of pictures, one a line, to `work`; returns what became of them. */
async function take(ids, work, done) {
  try {
    const items = await Promise.all([...ids].map(api.item));
    if (items.includes(undefined)) throw new Error("The server does not answer");
    const there = items.filter(Boolean);
    const paths = there.filter((item) => !item.path.includes("\n")).map((item) => `${item.path}\n`); // what follows one would be another path
    await work(paths.join(""));
    const [gone, broken] = [items.length - there.length, there.length - paths.length];
    return `${number(paths.length)} ${done}${gone ? `; ${number(gone)} gone` : ""}${broken ? `; ${number(broken)} left out: a line feed in the name` : ""}`;
  } catch (problem) {
    return problem.message;
  }
}

/** Copies the paths of pictures, one a line; returns what to say about it. */
export const copyPaths = (ids) => take(ids, copy, "copied");

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    throw new Error("This browser does not let us copy here; download the list"); // plain http, beyond localhost
  }
}

function save(text) {
  const href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  h("a", { href, download: "cloob-pictures.txt" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10000);
}

copyButton.addEventListener("click", async () => say(await copyPaths(marked)));
saveButton.addEventListener("click", async () => say(await take(marked, save, "in the list")));
clearButton.addEventListener("click", () => {
  marked.clear();
  changed();
  $("main").focus({ preventScroll: true }); // the bar is gone
});
