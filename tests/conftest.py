"""Fixtures shared by all tests."""

import atexit
import functools
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Nothing may reach a hub, and one thread a test is fastest on small tensors; both
# before torch is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is cached goes where no user's cache is; xdist's workers have one each.
_cache = tempfile.TemporaryDirectory(prefix="cloob-tests-")
atexit.register(
    _cache.cleanup
)  # left to the collector it would warn, and warnings are errors
os.environ["CLOOB_CACHE"] = _cache.name
# A busy machine is no failure, and the same commit passes or fails each time: the
# nightly run draws anew.
settings.register_profile("cloob", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, derandomize=False)
settings.load_profile("cloob")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden loss curves anew"
    )
    methods = multiprocessing.get_all_start_methods()
    parser.addoption(
        "--start-method",
        choices=methods,
        help="how data workers begin; Python's own way when left out",
    )


def pytest_configure(config):
    if method := config.getoption("--start-method"):
        multiprocessing.set_start_method(method, force=True)


def pytest_collection():
    gc.disable()  # a fifth of the time of all imports is looking for cycles in them


def pytest_collection_finish():
    gc.freeze()  # nor is it looked for again with each test
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Half of the time of a tiny model: CLIP's tables, read once if open_clip is
    imported, and waiting for the disk.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            os, "fsync", lambda _: None
        )  # a process is killed here, no machine
        if factory := sys.modules.get("open_clip.factory"):
            from cloob.models.tokenizer import ClipTokenizer

            patched.setattr(
                factory, "SimpleTokenizer", functools.cache(factory.SimpleTokenizer)
            )
            patched.setattr(ClipTokenizer, "of", functools.cache(ClipTokenizer.of))
        yield


@pytest.fixture(scope="session")
def shared_data():
    """The folder of the pictogram benchmark beside the checkout; absent for most
    users.
    """
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(
            "the pictogram benchmark is not beside the checkout"
            f" ({path.parent.name}/{path.name})"
        )
    return path


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium; skips where there is no Chromium, no chromedriver or no
    selenium.
    """
    binary = next(
        filter(
            None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        ),
        None,
    )
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("no chromium with chromedriver on this machine")
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic"
        " no-first-run window-size=1280,860"
    )
    flags += " disable-background-networking disable-component-update disable-sync"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver_path)
    )
    driver.set_script_timeout(120)  # a busy machine draws a few frames a second
    try:
        yield driver
    finally:
        driver.quit()
