// Draws the points of a map on a canvas, and moves over them by pointer, wheel, touch and keys.
import * as api from "./api.js";

const DOT = 2.6;
const CELL = 66; // pixels: of the points in a cell one gets its picture
const SIDE = 50;
const KEPT = 1200;
const FURTHEST = 0.6;
const NEAREST = 400;

export class MapCanvas {
  /** `hover(id, x, y)`, `open(id)` and `looked(id, inView)` are called as the user does these. */
  constructor(canvas, { hover, open, looked }) {
    Object.assign(this, { canvas, hover, open, looked });
    this.points = { ids: [], x: [], y: [] };
    this.lit = new Set();
    this.images = new Map();
    this.view = { x: 0.5, y: 0.5, scale: 1 };
    this.pointers = new Map();
    this.middle = false; // whether the keyboard's cross is shown
    new ResizeObserver(() => this.resize()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.schedule());
    this.listen();
  }

  set(points) {
    this.points = points;
    this.home();
  }

  light(ids) {
    this.lit = new Set(ids);
    this.schedule();
  }

  home() {
    this.view = { x: 0.5, y: 0.5, scale: 1 };
    this.schedule();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = Math.min(2, devicePixelRatio);
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    this.schedule();
  }

  schedule() {
    this.waiting ||= requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  get unit() {
    return Math.max(1, Math.min(this.canvas.clientWidth, this.canvas.clientHeight) * 0.92) * this.view.scale;
  }

  toScreen(i) {
    const stretch = this.stretch;
    return [
      this.canvas.clientWidth / 2 + (this.points.x[i] - this.view.x) * this.unit * stretch,
      this.canvas.clientHeight / 2 + (this.points.y[i] - this.view.y) * this.unit,
    ];
  }

  /** Maps have no scale of their own: a wide window gets a wide map. */
  get stretch() {
    return Math.max(1, Math.min(1.9, this.canvas.clientWidth / Math.max(1, this.canvas.clientHeight)));
  }

  /** Places of the points in the window, and where they are on the screen. */
  visible(margin = 30) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const found = [];
    for (let i = 0; i < this.points.ids.length; i++) {
      const [x, y] = this.toScreen(i);
      if (x > -margin && x < width + margin && y > -margin && y < height + margin) found.push({ i, x, y });
    }
    return found;
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    const ratio = this.canvas.width / width;
    const style = getComputedStyle(this.canvas);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const found = this.visible();
    const some = this.lit.size > 0;
    const ink = style.getPropertyValue("--quiet");
    const accent = style.getPropertyValue("--accent");
    const isLit = ({ i }) => this.lit.has(this.points.ids[i]);
    found.sort((a, b) => isLit(a) - isLit(b));
    const shown = this.pictured(found);
    for (const point of found) {
      const lit = isLit(point);
      context.globalAlpha = some && !lit ? 0.3 : 0.75;
      this.dot(context, point.x, point.y, lit ? DOT * 1.7 : DOT, lit || !some ? accent : ink);
    }
    for (const point of found) {
      const image = shown.has(point.i) && this.image(this.points.ids[point.i]);
      if (!image) continue;
      const lit = isLit(point);
      context.globalAlpha = some && !lit ? 0.3 : 1;
      this.picture(context, image, point.x, point.y, lit ? SIDE * 1.15 : SIDE, lit && accent);
    }
    context.globalAlpha = 1;
    if (this.middle) this.cross(context, width / 2, height / 2, style.getPropertyValue("--ink"));
  }

  /** One point of each cell, a lit one where there is one, gets its picture; cells stay with the map when it moves. */
  pictured(found) {
    const cells = new Map();
    for (const { i } of [...found].reverse()) {
      const column = Math.floor((this.points.x[i] * this.unit * this.stretch) / CELL);
      const key = `${column} ${Math.floor((this.points.y[i] * this.unit) / CELL)}`;
      if (!cells.has(key)) cells.set(key, i);
    }
    return new Set(cells.values());
  }

  dot(context, x, y, radius, colour) {
    context.fillStyle = colour;
    context.beginPath();
    context.arc(x, y, radius * Math.min(2, 0.8 + 0.2 * this.view.scale), 0, 7);
    context.fill();
  }

  picture(context, image, x, y, side, edge) {
    const scale = side / Math.max(image.naturalWidth, image.naturalHeight);
    const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
    context.save();
    context.beginPath();
    context.roundRect(x - w / 2, y - h / 2, w, h, 7);
    context.clip();
    context.fillStyle = "#fff";
    context.fill();
    context.drawImage(image, x - w / 2, y - h / 2, w, h);
    context.strokeStyle = edge || "rgb(128 128 128 / .45)";
    context.lineWidth = edge ? 6 : 2; // half of it is clipped away
    context.stroke();
    context.restore();
  }

  cross(context, x, y, colour) {
    context.strokeStyle = colour;
    context.lineWidth = 1.5;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 5 * dx, y + 5 * dy);
      context.lineTo(x + 14 * dx, y + 14 * dy);
    }
    context.stroke();
  }

  /** The picture of a point once it is there; until then a dot stands for it. */
  image(id) {
    const address = api.thumbnail(id, 128);
    let image = this.images.get(address);
    if (!image) {
      if (this.images.size >= KEPT) this.images.delete(this.images.keys().next().value);
      image = new Image();
      image.addEventListener("load", () => this.schedule());
      image.src = address;
      this.images.set(address, image);
    }
    return image.complete && image.naturalWidth ? image : null;
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const scale = Math.max(FURTHEST, Math.min(NEAREST, this.view.scale * factor));
    const [dx, dy] = [x - this.canvas.clientWidth / 2, y - this.canvas.clientHeight / 2];
    const before = this.unit;
    this.view.scale = scale;
    this.view.x += (dx / before - dx / this.unit) / this.stretch;
    this.view.y += dy / before - dy / this.unit;
    this.schedule();
  }

  pan(dx, dy) {
    this.view.x = Math.max(-0.2, Math.min(1.2, this.view.x - dx / this.unit / this.stretch));
    this.view.y = Math.max(-0.2, Math.min(1.2, this.view.y - dy / this.unit));
    this.schedule();
  }

  nearest(x, y, within) {
    let [best, distance] = [null, within];
    for (const point of this.visible()) {
      const apart = Math.hypot(point.x - x, point.y - y);
      if (apart < distance) [best, distance] = [point, apart];
    }
    return best ? this.points.ids[best.i] : null;
  }

  listen() {
    const { canvas } = this;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), ...at(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, at(event));
      this.moved = this.pointers.size > 1 ? 99 : 0;
      this.middle = false;
    });
    canvas.addEventListener("pointermove", (event) => this.onMove(event, at(event)));
    canvas.addEventListener("pointerup", (event) => {
      if (this.pointers.delete(event.pointerId) && this.moved < 5) {
        const id = this.nearest(...at(event), 40);
        if (id) this.open(id);
      }
    });
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("blur", () => ((this.middle = false), this.schedule()));
  }

  onMove(event, [x, y]) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return this.hover(event.pointerType === "mouse" ? this.nearest(x, y, 24) : null, x, y);
    this.hover(null);
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
      const apart = (a) => Math.max(10, Math.hypot(a[0] - other[0], a[1] - other[1]));
      this.zoom(apart([x, y]) / apart(before), (x + other[0]) / 2, (y + other[1]) / 2);
    } else {
      this.pan(x - before[0], y - before[1]);
    }
    this.moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
    this.pointers.set(event.pointerId, [x, y]);
  }

  onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return undefined; // the browser's own
    const step = 60;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    const factor = { "+": 1.4, "=": 1.4, "-": 1 / 1.4 }[event.key];
    const middle = () => this.nearest(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2, Infinity);
    if (moves[event.key]) this.pan(...moves[event.key]);
    else if (factor) this.zoom(factor);
    else if (event.key === "0") this.home();
    else if (event.key === "Enter") return middle() && this.open(middle());
    else return undefined;
    event.preventDefault();
    this.middle = true;
    return this.looked(middle(), this.visible(0).length);
  }
}
