// The server's API; every failure is an Error whose message one can read.

export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(`/api/${path}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is cloob serve still running?", 0);
  }
  if (answer.ok) return answer.json();
  if (answer.status === 401) location.reload(); // the same address asks for the token
  let said = `The server answered ${answer.status}.`;
  try {
    said = (await answer.json()).detail;
  } catch {
    // not from us: the number has to do
  }
  throw new Problem(said, answer.status);
}

const post = (path, body, signal) =>
  ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

function query(values) {
  const words = new URLSearchParams();
  for (const [key, value] of Object.entries(values)) {
    for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== undefined && one !== "") words.append(key, one);
  }
  return words.size ? `?${words}` : "";
}

export const health = () => ask("health");
export const columns = () => ask("columns");
export const search = (body, signal) => post("search", body, signal);
export const classify = (body, signal) => post("classify", body, signal);
export const ids = (where, signal) => ask(`ids${query({ where, order: "newest" })}`, { signal });
export const months = (where, signal) => ask(`months${query({ where })}`, { signal });
export const items = (id) => ask(`items${query({ id })}`);

/** Says what a question waits for, until nobody waits. */
export async function sayProgress(usual, waits, say) {
  while (waits()) {
    const { ready } = await health().catch(() => ({}));
    if (waits()) say(ready === false ? "Loading the model …" : usual);
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

export function upload(file) {
  const form = new FormData();
  form.append("file", file);
  return ask("uploads", { method: "POST", body: form });
}

// A document shows a picture that it has again without asking: a changed collection has other addresses.
export let round = 0;
export const thumbnail = (id, size = 256) => `/api/items/${id}/thumbnail?size=${size}${round ? `&round=${round}` : ""}`;
export const picture = (id) => `/api/items/${id}/picture`;
export const uploadThumbnail = (id) => `/api/uploads/${id}/thumbnail`;

// What is known of pictures: asked for in groups, once.
const known = new Map();
let wanted = new Map();
let timer = 0;

export function remember(list) {
  if (known.size > 20000) known.clear();
  for (const item of list) known.set(item.id, item);
}

export function forget() {
  known.clear();
  round += 1;
}

export const recall = (id) => known.get(id);

/** What is known of a picture; null where it is gone, undefined where the server did not say. */
export function item(id) {
  if (known.has(id)) return Promise.resolve(known.get(id));
  if (!(Number.isSafeInteger(id) && id > 0)) return Promise.resolve(null); // refused, with all that are asked for beside it
  return new Promise((resolve) => {
    wanted.set(id, [...(wanted.get(id) ?? []), resolve]);
    clearTimeout(timer);
    timer = setTimeout(fetchWanted, 30);
  });
}

async function fetchWanted() {
  const group = [...wanted].slice(0, 200);
  wanted = new Map([...wanted].slice(200));
  if (wanted.size) timer = setTimeout(fetchWanted, 0);
  let other = null;
  try {
    remember(await items(group.map(([id]) => id)));
  } catch {
    other = undefined; // the tiles stay without words
  }
  for (const [id, waiting] of group) for (const resolve of waiting) resolve(known.get(id) ?? other);
}
