// Small helpers: elements, numbers, announcements. No markup is ever made from text.

export const $ = (id) => document.getElementById(id);

/** An element: h("p.quiet", {hidden: true}, "text", child). Properties are set, aria-* and data-* are attributes. */
export function h(kind, properties = {}, ...children) {
  const [name, ...classes] = kind.split(".");
  const element = document.createElement(name || "div");
  element.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "for" || key === "list") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.classList.add("icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const number = (value) => value.toLocaleString("en");
export const pictures = (n) => `${number(n)} ${n === 1 ? "picture" : "pictures"}`;
export const percent = (share) => (share >= 0.0995 ? `${Math.round(100 * share)} %` : `${(100 * share).toFixed(1)} %`);
export const score = (value) => value.toFixed(3).replace("-", "−");

export function bytes(n) {
  for (const unit of ["B", "kB", "MB"]) {
    if (n < 1000) return `${n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(1)} GB`;
}

/** Says something to those who listen to the page. */
export function announce(text) {
  $("live").textContent = text;
}

/** Calls `work` once nothing has asked for it for a while. */
export function later(work, milliseconds) {
  let timer = 0;
  const ask = (...words) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...words), milliseconds);
  };
  ask.cancel = () => clearTimeout(timer);
  return ask;
}

const MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];

/** "May 2024" of an ISO date; "2024" where no month is known, "" without a date. */
export function month(date) {
  const [, year, number] = /^(\d{4})(?:-(\d\d))?/.exec(date ?? "") ?? [];
  return year ? [MONTHS[number - 1], year].filter(Boolean).join(" ") : "";
}

/** "12 May 2024", with three letters of the month, of an ISO date, as far as it is known. */
export function day(date) {
  const [, year, month, number] = /^(\d{4})(?:-(\d\d))?(?:-(\d\d))?/.exec(date ?? "") ?? [];
  return [number && String(Number(number)), MONTHS[month - 1]?.slice(0, 3), year].filter(Boolean).join(" ");
}

/** The last folder, or the container, of a picture. */
export const folder = (item) => item.path.split(/[/\\]|::/).at(-2) ?? "";

export const title = (item) => item.caption?.trim().split("\n")[0] || item.name;
