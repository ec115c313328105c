"""The README's picture of the explorer: ``python tests/take_picture.py FILE DATA ROOT OUT``.

Meant for the synthetic dataset, whose pictures are the project's own; ``make docs/explorer.png``.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from test_browser import CHROMIUM, PATIENCE, free_port, serve


def take_picture(path, data, root, out):
    """Serve the app and save, in 256 colors, what a window shows once nothing is computed."""
    port = free_port()
    command = [sys.executable, "-m", "ramslib", "app", "--data", data, "--root", root]
    command += ["--out", out, "--", "--no-browser", f"--port={port}"]
    address = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1240, "height": 1120})
        page.set_default_timeout(PATIENCE)
        with serve(command, f"{address}voila/static/", Path(folder)):
            page.goto(address)
            page.wait_for_selector(".rams-png img[src]")
            rest = "() => !document.querySelector('.rams').innerText.includes('computing')"
            page.wait_for_function(rest)
            page.wait_for_timeout(1000)
            shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        chromium.close()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    colors = shot.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
    colors.save(path, "PNG", optimize=True)


if __name__ == "__main__":
    take_picture(*sys.argv[1:])
