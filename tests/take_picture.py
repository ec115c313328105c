"""The README's picture of the explorer: ``python tests/take_picture.py FILE DATA ROOT OUT``."""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, PATIENCE, free_port, serve


def take_picture(path, data, root, out):
    """Serve the app and save what a window shows once nothing is being computed any more."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "ramslib.explorer.app",
        "--data",
        data,
        "--root",
        root,
        "--out",
        out,
    ]
    command += ["--", "--no-browser", f"--port={port}"]
    address = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder, serve(command, address + "x", Path(folder)):
        with sync_playwright() as tools:
            chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector(".rams-chart img[src]")
            page.wait_for_timeout(3000)
            page.wait_for_function("() => !document.querySelector('.rams-stale')")
            page.wait_for_timeout(1000)
            page.screenshot(path=path)
            chromium.close()


if __name__ == "__main__":
    take_picture(*sys.argv[1:])
