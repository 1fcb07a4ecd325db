"""The pictures of docs/serve.md: the page itself, over the demo set, in a headless Chromium.

    python benchmarks/pictures.py [--index IDX] [--out docs/images]

Without --index it makes one in --work: `cloob train align` on the demo set, then an index of 1,600 of its pictures.
"""

from __future__ import annotations

import argparse
import io
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

DEMO = Path(__file__).parents[1] / "src/cloob/data/demo"
PICTURES = 1600
# Sets in one colour alone look alike from afar.
LEFT_OUT = ("mdi", "tabler", "phosphor")
READY = "[...document.querySelectorAll('.tile img')].filter(i => i.src && i.getBoundingClientRect().top < innerHeight)"
SHOTS = (  # name, address, width, height, dark
    ("serve-light", "?q=musical+instrument", 1280, 820, False),
    ("serve-dark", "?view=map&method=tsne&q=animal", 1280, 820, True),
    ("serve-phone", "?q=a+red+bird&q=-0.5~w~flag", 390, 780, False),
)


def unpack(folder: Path) -> Path:
    """Some of the demo set's pictures with their captions; the same ones every time."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(DEMO.glob("*/*.tar.xz")):
        with tarfile.open(shard) as archive:
            for member in archive:
                stem, _, ending = Path(member.name).name.rpartition(".")
                content = archive.extractfile(member)
                if content is not None and not stem.startswith(LEFT_OUT):
                    samples.setdefault(stem, {})[ending] = content.read()
    folder.mkdir(parents=True, exist_ok=True)
    for stem in random.Random(3).sample(sorted(samples), PICTURES):
        for ending, content in samples[stem].items():
            (folder / f"{stem}.{ending}").write_bytes(content)
    return folder


def make_index(work: Path) -> Path:
    """Trains and indexes; what is there already is gone on with."""
    cloob = [sys.executable, "-m", "cloob"]
    if not (work / "run").exists():
        options = ["--objective", "infoloob", "--head", "linear", "--batch-size", "512", "--out", str(work / "run")]
        subprocess.run([*cloob, "train", "align", *options], check=True)
    source = work / "pictures" if (work / "pictures").exists() else unpack(work / "pictures")
    index = work / "demo.idx"
    subprocess.run([*cloob, "index", str(source), "--model", f"{work / 'run'}:best", "--out", str(index)], check=True)
    return index


@contextmanager
def served(index: Path) -> Iterator[str]:
    """The address of a server of the index."""
    command = [sys.executable, "-m", "cloob", "serve", str(index), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
    finally:
        process.terminate()
        process.wait()


def chromium(profile: str) -> Any:
    """A headless browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def shoot(driver: Any, address: str, width: int, height: int, dark: bool) -> Image.Image:
    """The page once all that it shows is there."""
    phone = width < 500
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(address)
    waits = WebDriverWait(driver, 180)
    if "view=map" in address:
        waits.until(lambda page: "lit up" in page.find_element("id", "map-note").text)
        driver.set_script_timeout(60)
        driver.execute_async_script("setTimeout(arguments[0], 5000)")  # its pictures come one by one
    else:
        waits.until(
            lambda page: page.execute_script(f"const i = {READY}; return i.length > 5 && i.every(e => e.complete)")
        )
        driver.execute_async_script("setTimeout(arguments[0], 400)")  # they fade in
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def main() -> None:
    """Makes what is missing and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    index = options.index or make_index(options.work)
    options.out.mkdir(parents=True, exist_ok=True)
    with served(index) as site, tempfile.TemporaryDirectory() as profile:
        driver = chromium(profile)
        try:
            for name, address, width, height, dark in SHOTS:
                target = options.out / f"{name}.webp"
                shoot(driver, site + address, width, height, dark).save(target, quality=82, method=6)
                print(f"{target}: {target.stat().st_size / 1000:.0f} kB")
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
