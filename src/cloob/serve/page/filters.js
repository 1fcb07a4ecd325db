// The filter: an SQL expression, and three boxes that write it.
import * as api from "./api.js";
import { $, h } from "./dom.js";
import * as state from "./state.js";

const OPERATORS = {
  text: [["contains", "like"], ["is", "="], ["is not", "!="]],
  number: [["at least", ">="], ["at most", "<="], ["is", "="]],
  date: [["since", ">="], ["until", "<="]],
  boolean: [["is", "="], ["is not", "!="]],
};
const FITS = { number: (text) => Number.isFinite(Number(text)), boolean: (text) => /^(true|false)$/i.test(text) };
const panel = $("filters");
const button = $("filter-button");
let line = null;

const operators = (kind) => OPERATORS[kind] ?? OPERATORS.text;
const OF_ALL = /^(id|path|name|source|date|caption|bytes|width|height)$/;
const quoted = (text) => `'${text.replaceAll("'", "''")}'`;

/** One comparison in SQL. */
export function comparison(column, kind, operator, value) {
  const name = OF_ALL.test(column) ? column : `"${column.replaceAll('"', '""')}"`; // which may be a word of SQL
  if (kind === "boolean") return `${name} ${operator} ${value.toLowerCase()}`;
  if (kind === "number") return `${name} ${operator} ${/^[+-]?\d+$/.test(value) ? value : Number(value)}`; // beyond 2^53 too
  if (kind === "date" && operator === "<=") return `substr(${name}, 1, ${value.length}) <= ${quoted(value)}`; // all of that day, month or year
  const words = operator === "like" ? `%${value.replace(/[\\%_]/g, "\\$&")}%` : value;
  const escape = words.includes("\\") && operator === "like" ? " escape '\\'" : "";
  return `${name} ${operator} ${quoted(words)}${escape}`;
}

async function build() {
  const columns = await api.columns().catch(() => [{ name: "caption", kind: "text" }]);
  const kinds = Object.fromEntries(columns.map((column) => [column.name, column.kind]));
  const names = columns.map((column) => column.name).filter((name) => name !== "id");
  const column = h("select", { "aria-label": "Column" }, ...names.map((name) => h("option", { value: name }, name)));
  if (names.includes("caption")) column.value = "caption";
  const operator = h("select", { "aria-label": "Comparison" });
  const value = h("input", { type: "text", "aria-label": "Value", maxLength: 200 });
  const offer = () => {
    operator.replaceChildren(...operators(kinds[column.value]).map(([words, sign]) => h("option", { value: sign }, words)));
    value.placeholder = { date: "2024-05", number: "800", boolean: "true" }[kinds[column.value]] ?? "dog";
  };
  column.addEventListener("change", offer);
  offer();
  const add = () => {
    const [kind, text] = [kinds[column.value], value.value.trim()];
    if (!text || FITS[kind]?.(text) === false) return value.focus();
    const one = comparison(column.value, kind, operator.value, text);
    const before = line.value.trim();
    line.value = before ? `${/\bor\b/i.test(before) ? `(${before})` : before} and ${one}` : one;
    value.value = "";
    apply();
  };
  value.addEventListener("keydown", (event) => event.key === "Enter" && add());
  line = h("input", { type: "text", id: "where", maxLength: 2000, spellcheck: false, placeholder: "date >= '2024' and caption like '%dog%'" });
  line.addEventListener("keydown", (event) => event.key === "Enter" && apply());
  line.addEventListener("change", apply);
  const clear = h("button.quiet-button", { type: "button", onclick: () => ((line.value = ""), apply()) }, "Clear");
  panel.replaceChildren(
    h("div.filter-row", {}, column, operator, value, h("button.button", { type: "button", onclick: add }, "Add")),
    h("div.filter-row", {}, h("label", { for: "where" }, "Filter"), line, clear),
  );
}

const apply = () => state.change({ where: line.value.trim() });

async function toggle(open) {
  if (open && !line) await build();
  panel.hidden = !open;
  button.setAttribute("aria-expanded", open);
  if (line) line.value = state.get().where;
}

export function start() {
  button.addEventListener("click", () => toggle(panel.hidden));
  draw();
}

/** Shows whether a filter holds. */
export function draw() {
  const { where } = state.get();
  button.classList.toggle("on", Boolean(where));
  if (line && document.activeElement !== line) line.value = where;
  if (where && !line) toggle(true);
}
