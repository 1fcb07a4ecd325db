// Starts the page and shows the view that the address asks for.
import * as api from "./api.js";
import * as chips from "./chips.js";
import * as detail from "./detail.js";
import { $, pictures } from "./dom.js";
import * as filters from "./filters.js";
import * as find from "./find.js";
import * as sort from "./sort.js";
import * as state from "./state.js";

const POLL = 8000;
const views = { find, sort };
let revision = null;

function draw(options) {
  const { view } = state.get();
  for (const name of Object.keys(views)) $(`view-${name}`).hidden = name !== view;
  for (const tab of document.querySelectorAll(".tabs a")) {
    tab.href = state.write({ ...state.get(), view: tab.dataset.view });
    if (tab.dataset.view === view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  chips.draw();
  filters.draw();
  views[view].draw(options);
  detail.draw();
}

/** Looks whether the index has changed; what is on the screen stays until the user asks. */
async function look() {
  if (document.hidden) return;
  try {
    const health = await api.health();
    if (health.revision === undefined) location.reload(); // without the token: the same address asks for it
    if (revision !== null && health.revision !== revision) {
      $("changed").firstElementChild.textContent = `The collection has changed: ${pictures(health.pictures)} now.`;
      $("changed").hidden = false;
    }
    revision = health.revision;
  } catch {
    // the next thing that the user asks for says so
  }
}

for (const link of document.querySelectorAll(".tabs a, .mark")) {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    if (link.dataset.view) state.change({ view: link.dataset.view, picture: null });
    else {
      $("words").value = "";
      state.change({ view: "find", parts: [], where: "", cutoff: true, picture: null });
    }
  });
}
$("changed").lastElementChild.addEventListener("click", () => {
  $("changed").hidden = true;
  api.forget();
  draw({ force: true });
});
state.watch(() => draw());
chips.start(() => draw());
filters.start();
draw();
look();
setInterval(look, POLL);
addEventListener("visibilitychange", look);
