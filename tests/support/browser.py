"""Chromium without a window, driven by selenium, where both are installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs a browser: apt-get install chromium chromium-driver",
)


@contextmanager
def browser(width: int = 1200, height: int = 900) -> Iterator[Chrome]:
    """A browser that shows pages at a size in pixels."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    # As root, which continuous integration often is, Chromium starts without its sandbox alone.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # By its path: selenium would look for a driver on the network otherwise.
    driver = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    # A window is never as narrow as a phone; what it shows can be.
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield driver
    finally:
        driver.quit()
