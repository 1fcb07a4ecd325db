// A grid of any number of pictures, in sections. Only tiles near the window are elements.
import * as api from "./api.js";
import { day, folder, h, icon, number, title } from "./dom.js";
import * as marks from "./marks.js";

const GAP = 14;
const BELOW = 46; // the two lines under a picture
const LEAST = 160;
const MARGIN_ROWS = 2;
const FAST = 2400; // pixels a second: what flies by is not fetched
const LONG_PRESS = 450; // milliseconds
const STILL = 10; // pixels that a finger may move while it presses

export class Grid {
  /**
   * `open(place, grid)` is called for the picture that was chosen; `least` is the least width of a tile, `narrow` how
   * many stand beside each other on a phone.
   */
  constructor({ label, open, least = LEAST, narrow = 3 }) {
    this.element = h("div.grid", { role: "group", "aria-label": label });
    Object.assign(this, { open, least, narrow });
    this.ids = [];
    this.sections = [];
    this.tiles = new Map();
    this.current = 0;
    this.lastTop = 0;
    this.lastTime = 0;
    this.settle = 0;
    this.element.addEventListener("keydown", (event) => this.onKey(event));
    this.element.addEventListener("keyup", (event) => event.key === " " && event.preventDefault()); // a click otherwise
    this.onMarks = () => this.tiles.forEach((tile) => this.mark(tile));
    addEventListener("marks", this.onMarks);
    this.onScroll = () => this.schedule();
    addEventListener("scroll", this.onScroll, { passive: true });
    this.sizes = new ResizeObserver(() => this.measure());
    this.sizes.observe(this.element);
  }

  /**
   * Shows these pictures. `sections` are {title, count}, one after the other; `facts(place)` are pairs of a name and
   * words that an opened picture shows first.
   */
  set(ids, { sections = [{ title: "", count: ids.length }], facts = () => [] } = {}) {
    this.ids = ids;
    this.facts = facts;
    this.current = 0;
    this.tiles.clear();
    let start = 0;
    this.sections = sections.map(({ title: words, count }) => {
      const list = h("ul", { role: "list", "aria-label": words || undefined });
      const head = words ? h("h2.section-head", {}, words, h("span.quiet", {}, number(count))) : null;
      const section = { start, count, list, element: h("section", {}, head, list) };
      start += count;
      return section;
    });
    this.element.replaceChildren(...this.sections.map((section) => section.element));
    this.measure();
    dispatchEvent(new CustomEvent("pictures", { detail: this }));
  }

  close() {
    removeEventListener("marks", this.onMarks);
    removeEventListener("scroll", this.onScroll);
    this.sizes.disconnect();
    this.element.remove();
  }

  measure() {
    const width = this.element.clientWidth;
    if (!width) return;
    const least = width < 480 ? Math.min(this.least, (width - (this.narrow - 1) * 8) / this.narrow) : this.least;
    this.gap = width < 480 ? 8 : GAP;
    this.columns = Math.max(1, Math.floor((width + this.gap) / (least + this.gap)));
    this.side = (width - this.gap * (this.columns - 1)) / this.columns;
    this.step = this.side + BELOW + this.gap;
    for (const section of this.sections) section.list.style.height = `${Math.max(0, this.rows(section) * this.step - this.gap)}px`;
    for (const section of this.sections) section.top = section.list.offsetTop;
    for (const tile of this.tiles.values()) this.place(tile);
    this.draw();
  }

  rows(section) {
    return Math.ceil(section.count / this.columns);
  }

  /** The place in `sections` of a picture's section. */
  sectionOf(place) {
    const next = this.sections.findIndex((section) => section.start > place);
    return next < 0 ? this.sections.length - 1 : next - 1;
  }

  schedule() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  /** Places of the pictures in the window and some rows around it. */
  near(top) {
    const places = new Set();
    const [from, to] = [top - MARGIN_ROWS * this.step, top + innerHeight + MARGIN_ROWS * this.step];
    for (const section of this.sections) {
      if (section.top > to || section.top + this.rows(section) * this.step < from) continue;
      const first = Math.max(0, Math.floor((from - section.top) / this.step)) * this.columns;
      const last = Math.min(section.count, Math.ceil((to - section.top) / this.step) * this.columns);
      for (let place = first; place < last; place++) places.add(section.start + place);
    }
    return places;
  }

  draw() {
    if (!this.step || !this.element.isConnected) return;
    const top = -this.element.getBoundingClientRect().top;
    const speed = Math.abs(top - this.lastTop) / Math.max(1, performance.now() - this.lastTime) * 1000;
    [this.lastTop, this.lastTime] = [top, performance.now()];
    const near = this.near(top);
    const free = [];
    for (const [place, tile] of this.tiles) {
      if (near.has(place) || tile.element.contains(document.activeElement)) continue; // the focus stays where it is
      this.tiles.delete(place);
      free.push(tile);
    }
    for (const place of near) {
      if (this.tiles.has(place)) continue;
      const tile = free.pop() ?? this.make();
      this.tiles.set(place, tile);
      this.fill(tile, place);
    }
    for (const tile of free) tile.element.remove();
    clearTimeout(this.settle);
    if (speed > FAST && this.lastTop !== 0) this.settle = setTimeout(() => this.load(), 90);
    else this.load();
  }

  make() {
    const image = h("img", { alt: "", decoding: "async", draggable: true });
    const button = h("button.tile", { type: "button" }, image);
    const check = h("button.tile-mark", { type: "button", tabIndex: -1 }, icon("check"));
    const lines = h("div.tile-lines", { "aria-hidden": "true" });
    const tile = { element: h("li", {}, button, check, lines), button, image, check, lines, place: -1, id: 0 };
    image.addEventListener("load", () => button.classList.add("ready"));
    image.addEventListener("error", () => tile.wanted && button.classList.add("lost"));
    button.addEventListener("click", () => this.open(tile.place, this));
    for (const one of [button, check]) one.addEventListener("focus", () => this.focusAt(tile.place, false));
    check.addEventListener("click", () => marks.toggle(tile.id));
    listenToFingers(tile);
    return tile;
  }

  fill(tile, place) {
    const id = this.ids[place];
    const section = this.sections[this.sectionOf(place)];
    Object.assign(tile, { place, id, wanted: false });
    tile.button.classList.remove("ready", "lost");
    tile.image.removeAttribute("src");
    tile.lines.replaceChildren();
    tile.label = `Picture ${number(place + 1)} of ${number(this.ids.length)}`;
    tile.button.tabIndex = place === this.current ? 0 : -1;
    tile.element.setAttribute("aria-posinset", place - section.start + 1);
    tile.element.setAttribute("aria-setsize", section.count);
    this.place(tile);
    if (tile.element.parentNode !== section.list) section.list.append(tile.element);
    const item = api.recall(id);
    if (item) this.name(tile, item);
    else this.mark(tile);
  }

  /** Shows whether a picture is marked. */
  mark(tile) {
    const marked = marks.has(tile.id);
    tile.element.classList.toggle("marked", marked);
    tile.button.setAttribute("aria-label", `${tile.label}${marked ? ", marked" : ""}`);
    tile.check.setAttribute("aria-label", `Mark ${tile.label}`);
    tile.check.setAttribute("aria-pressed", marked);
  }

  place({ element, place }) {
    const inside = place - this.sections[this.sectionOf(place)].start;
    const [row, column] = [Math.floor(inside / this.columns), inside % this.columns];
    element.style.width = `${this.side}px`;
    element.style.height = `${this.side + BELOW}px`;
    element.style.transform = `translate(${column * (this.side + this.gap)}px, ${row * this.step}px)`;
  }

  /** What a person remembers of a picture: its caption, when it was taken, the folder. */
  name(tile, item) {
    const [when, where] = [day(item.date), folder(item)];
    const lines = item.caption ? [title(item), [when, where].filter(Boolean).join(" · ")] : [when || item.name, where];
    tile.lines.replaceChildren(...lines.map((line) => h("span", {}, line)));
    tile.button.title = item.name;
    tile.label = [title(item), when, where].filter(Boolean).join(", ");
    this.mark(tile);
  }

  /** Fetches pictures and words of the tiles that are there now. */
  load() {
    const size = this.side * Math.min(2, devicePixelRatio) > 288 ? 384 : 256;
    for (const tile of this.tiles.values()) {
      if (tile.wanted) continue;
      tile.wanted = true;
      tile.image.src = api.thumbnail(tile.id, size);
      const { id } = tile;
      if (!api.recall(id)) api.item(id).then((item) => item && tile.id === id && this.name(tile, item));
    }
  }

  /** Moves the one tile that Tab reaches; with `scroll`, goes there. */
  focusAt(place, scroll = true) {
    const before = this.tiles.get(this.current);
    if (before) before.button.tabIndex = -1;
    this.current = place;
    if (scroll) this.scrollTo(place);
    const tile = this.tiles.get(place);
    if (!tile) return;
    tile.button.tabIndex = 0;
    if (scroll) tile.button.focus({ preventScroll: true });
  }

  scrollTo(place) {
    const section = this.sections[this.sectionOf(place)];
    const row = Math.floor((place - section.start) / this.columns);
    const top = this.element.getBoundingClientRect().top + section.top + row * this.step;
    const head = document.querySelector(".ask").getBoundingClientRect().bottom + 8;
    if (top < head) scrollBy(0, top - head);
    else if (top + this.step > innerHeight) scrollBy(0, top + this.step - innerHeight);
    this.draw();
  }

  /** The picture some rows further, in the same column where that row has it. */
  further(place, rows) {
    let at = this.sectionOf(place);
    const inside = place - this.sections[at].start;
    let row = Math.floor(inside / this.columns) + rows;
    while (row < 0 && at > 0) row += this.rows(this.sections[--at]);
    while (row >= this.rows(this.sections[at]) && at < this.sections.length - 1) row -= this.rows(this.sections[at++]);
    const { start, count } = this.sections[at];
    return start + Math.min(count - 1, Math.max(0, row) * this.columns + (inside % this.columns));
  }

  onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.ids.length) return;
    if (event.key === " ") {
      event.preventDefault();
      marks.toggle(this.ids[this.current]);
    }
    const page = Math.max(1, Math.floor(innerHeight / this.step));
    const rows = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page }[event.key];
    const last = this.ids.length - 1;
    const ends = { Home: 0, End: last, ArrowLeft: Math.max(0, this.current - 1), ArrowRight: Math.min(last, this.current + 1) };
    const place = rows ? this.further(this.current, rows) : ends[event.key] ?? this.current;
    if (place === this.current) return;
    event.preventDefault();
    this.focusAt(place);
  }
}

/** A long press marks a picture; while some are marked, so does a touch. */
function listenToFingers(tile) {
  let timer = 0;
  let from = null;
  let marked = false;
  const stop = () => clearTimeout(timer);
  tile.button.addEventListener("pointerdown", (event) => {
    stop();
    marked = false;
    from = event.pointerType === "touch" ? event : null;
    if (!from) return;
    timer = setTimeout(() => {
      marked = true;
      marks.toggle(tile.id);
    }, LONG_PRESS);
  });
  tile.button.addEventListener("pointermove", (event) => {
    if (from && Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) > STILL) stop();
  });
  for (const kind of ["pointerup", "pointercancel", "pointerleave"]) tile.button.addEventListener(kind, stop);
  tile.button.addEventListener("contextmenu", (event) => from && event.preventDefault());
  tile.button.addEventListener(
    "click",
    (event) => {
      if (!from || !(marked || marks.any())) return;
      event.stopImmediatePropagation();
      if (!marked) marks.toggle(tile.id);
      from = null;
    },
    { capture: true },
  );
}
