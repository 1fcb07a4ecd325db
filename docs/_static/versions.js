// Fills the sidebar's list of versions from versions.json, which lies beside the folders of the versions.
// A site that was built alone has no such file, and shows no list.
document.addEventListener("DOMContentLoaded", async () => {
  const label = document.querySelector(".cloob-versions");
  if (!label || !location.protocol.startsWith("http")) return;
  const root = new URL(document.documentElement.dataset.content_root, location.href);
  const answer = await fetch(new URL("../versions.json", root)).catch(() => null);
  if (!answer || !answer.ok) return;
  const page = location.href.slice(root.href.length);
  const select = label.querySelector("select");
  for (const version of await answer.json()) {
    const address = new URL(`../${encodeURIComponent(version)}/`, root);
    select.add(new Option(version, address.href, false, address.href === root.href));
  }
  select.addEventListener("change", async () => {
    // The same page where that version has it, else its first page.
    const same = new URL(page, select.value);
    const there = await fetch(same, { method: "HEAD" }).catch(() => null);
    location.assign(there && there.ok ? same : select.value);
  });
  label.hidden = false;
});
