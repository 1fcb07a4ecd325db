"""Takes a picture of a page for the docs: ``python docs/pictures.py PAGE PICTURE.png [WIDTH HEIGHT]``.

PAGE is a file or an address. The pictures in docs/images/ are of the demo's pages:
``python docs/pictures.py runs/demo/report.html docs/images/report.png``. Needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

FLAGS = "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run hide-scrollbars"


def take(page: str, picture: Path, width: int = 1280, height: int = 900) -> None:
    """Writes the upper part of a page, ``width`` × ``height`` pixels, as a PNG with a palette of 256 colours."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS.split(), f"user-data-dir={profile}", f"window-size={width},{height}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.set_window_size(width, height)
            driver.get(page if "://" in page else Path(page).resolve().as_uri())
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            pixels = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        finally:
            driver.quit()
    pixels.quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit("usage: python docs/pictures.py PAGE PICTURE.png [WIDTH HEIGHT]")
    take(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
