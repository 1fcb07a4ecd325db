"""Takes the pictures of docs/images/ in headless Chromium: ``python docs/pictures.py
PAGE``. Needs selenium.

PAGE is ``runs/demo/report.html`` for report.png, or the address of ``cloob serve
runs/demo/index`` with its token for the rest.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver

IMAGES = Path(__file__).parent / "images"
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run"
    " hide-scrollbars"
)
SERVED = (  # name, width, height, pixels per point
    ("serve-light", 1280, 820, 1),
    ("serve-phone", 390, 780, 2),
)


def take(
    page: str,
    picture: Path,
    width: int = 1280,
    height: int = 900,
    scale: int = 1,
) -> None:
    """Writes the visible part of a page when its pictures are there: PNG of 256
    colours, or WebP.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = (
        shutil.which("chromium") or shutil.which("google-chrome") or ""
    )
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            *FLAGS.split(),
            f"user-data-dir={profile}",
            f"window-size={width},{height}",
        ):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(
            options=options,
            service=webdriver.ChromeService(shutil.which("chromedriver")),
        )
        try:
            size = {
                "width": width,
                "height": height,
                "deviceScaleFactor": scale,
                "mobile": scale > 1,
            }
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(page if "://" in page else Path(page).resolve().as_uri())
            if "://" in page:
                wait(driver)
            pixels = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert(
                "RGB"
            )
        finally:
            driver.quit()
    if picture.suffix == ".png":
        pixels.quantize(256).save(picture, optimize=True)
    else:
        pixels.save(picture, quality=80, method=6)


def wait(driver: webdriver.Chrome) -> None:
    """Waits until tiles are there and all have their picture."""
    tiles = (
        "return ['.tile.ready', '.tile:not(.ready)'].map(tile =>"
        " document.querySelectorAll(tile).length)"
    )
    end = time.monotonic() + 120
    time.sleep(1)
    while (counts := driver.execute_script(tiles)) != [max(counts[0], 1), 0]:
        if time.monotonic() > end:
            sys.exit(f"{driver.current_url}: {counts} tiles with and without a picture")
        time.sleep(0.5)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            "usage: python docs/pictures.py runs/demo/report.html |"
            " 'http://localhost:8017/?token=…'"
        )
    if "://" not in sys.argv[1]:
        take(sys.argv[1], IMAGES / "report.png")
    for name, *size in SERVED if "://" in sys.argv[1] else ():
        take(f"{sys.argv[1]}&q=fruit", IMAGES / f"{name}.webp", *size)
