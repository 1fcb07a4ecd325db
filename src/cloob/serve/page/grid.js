// A grid of any number of pictures of which only those near the window are elements.
import * as api from "./api.js";
import { h, icon, number, score, title } from "./dom.js";
import * as marks from "./marks.js";

const GAP = 14;
const BELOW = 30; // the line under a picture
const LINE = 18; // each further one
const LEAST = 148;
const MARGIN_ROWS = 2;
const FAST = 2400; // pixels a second: what flies by is not fetched

export class Grid {
  /**
   * `open(place, grid)` is called for the picture that was chosen; `least` is the least width of a tile, `narrow` how
   * many stand beside each other on a phone; `facts(item, place)` gives `lines` more lines to stand under a picture.
   */
  constructor({ label, open, least = LEAST, narrow = 3, lines = 0, facts = () => [] }) {
    this.element = h("ul.grid", { "aria-label": label, role: "list" });
    this.open = open;
    Object.assign(this, { least, narrow, facts, below: BELOW + lines * LINE });
    this.ids = [];
    this.values = null;
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

  /** Shows these pictures; `values` says a number under each: its score. */
  set(ids, values = null, format = score) {
    this.ids = ids;
    this.values = values;
    this.format = format;
    this.current = 0;
    for (const tile of this.tiles.values()) tile.element.remove();
    this.tiles.clear();
    this.measure();
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
    this.step = this.side + this.below + this.gap;
    this.element.style.height = `${Math.max(0, Math.ceil(this.ids.length / this.columns) * this.step - this.gap)}px`;
    for (const tile of this.tiles.values()) this.place(tile);
    this.draw();
  }

  schedule() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  draw() {
    if (!this.step || !this.element.isConnected) return;
    const top = -this.element.getBoundingClientRect().top;
    const speed = Math.abs(top - this.lastTop) / Math.max(1, performance.now() - this.lastTime) * 1000;
    [this.lastTop, this.lastTime] = [top, performance.now()];
    const first = Math.max(0, Math.floor(top / this.step) - MARGIN_ROWS) * this.columns;
    const last = Math.min(this.ids.length, (Math.ceil((top + innerHeight) / this.step) + MARGIN_ROWS) * this.columns);
    const free = [];
    for (const [place, tile] of this.tiles) {
      if (place >= first && place < last) continue;
      if (tile.element.contains(document.activeElement)) continue; // the focus stays where it is
      this.tiles.delete(place);
      free.push(tile);
    }
    for (let place = first; place < last; place++) {
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
    const words = h("span.tile-words");
    const value = h("span.tile-value");
    const button = h("button.tile", { type: "button" }, image);
    const check = h("button.tile-mark", { type: "button", tabIndex: -1 }, icon("check"));
    const facts = h("div.tile-facts", { "aria-hidden": "true" });
    const element = h("li", {}, button, check, h("span.tile-line", { "aria-hidden": "true" }, words, value), facts);
    const tile = { element, button, image, check, words, value, facts, place: -1, id: 0 };
    image.addEventListener("load", () => button.classList.add("ready"));
    image.addEventListener("error", () => tile.wanted && button.classList.add("lost"));
    button.addEventListener("click", () => this.open(tile.place, this));
    for (const one of [button, check]) one.addEventListener("focus", () => this.focusAt(tile.place, false));
    check.addEventListener("click", () => marks.toggle(tile.id));
    return tile;
  }

  fill(tile, place) {
    const id = this.ids[place];
    Object.assign(tile, { place, id, wanted: false });
    tile.button.classList.remove("ready", "lost");
    tile.image.removeAttribute("src");
    tile.words.textContent = "";
    tile.value.textContent = this.values ? this.format(this.values[place], place) : "";
    tile.facts.replaceChildren();
    tile.label = `Picture ${number(place + 1)} of ${number(this.ids.length)}`;
    tile.button.tabIndex = place === this.current ? 0 : -1;
    tile.element.setAttribute("aria-posinset", place + 1);
    tile.element.setAttribute("aria-setsize", this.ids.length);
    this.place(tile);
    if (tile.element.parentNode !== this.element) this.element.append(tile.element);
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
    const [row, column] = [Math.floor(place / this.columns), place % this.columns];
    element.style.width = `${this.side}px`;
    element.style.height = `${this.side + this.below}px`;
    element.style.transform = `translate(${column * (this.side + this.gap)}px, ${row * this.step}px)`;
  }

  name(tile, item) {
    tile.words.textContent = title(item);
    const facts = this.facts(item, tile.place);
    tile.facts.replaceChildren(...facts.map((fact) => h("span", {}, fact)));
    tile.label = [title(item), tile.value.textContent, ...facts].filter(Boolean).join(", ");
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
    if (scroll) {
      const top = this.element.getBoundingClientRect().top + Math.floor(place / this.columns) * this.step;
      const head = document.querySelector(".ask").getBoundingClientRect().bottom + 8;
      if (top < head) scrollBy(0, top - head);
      else if (top + this.step > innerHeight) scrollBy(0, top + this.step - innerHeight);
      this.draw();
    }
    const tile = this.tiles.get(place);
    if (!tile) return;
    tile.button.tabIndex = 0;
    if (scroll) tile.button.focus({ preventScroll: true });
  }

  onKey(event) {
    const perPage = Math.max(1, Math.floor(innerHeight / this.step)) * this.columns;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -perPage, PageDown: perPage };
    let place = this.current + (moves[event.key] ?? 0);
    if (event.key === "Home") place = 0;
    if (event.key === "End") place = this.ids.length - 1;
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === " ") {
      event.preventDefault();
      marks.toggle(this.ids[this.current]);
    }
    if (place === this.current) return;
    event.preventDefault();
    this.focusAt(Math.max(0, Math.min(this.ids.length - 1, place)));
  }
}
