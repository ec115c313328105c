"""A real browser moves the threshold: in JupyterLab and in the app, by keyboard and by mouse.

What the page then shows is compared with what the library computes for that threshold. Screenshots
are kept in ``runs/screenshots``. Without a browser these tests are skipped.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from explorer_run import make_run
from PIL import Image
from tiny import ROOT

from ramslib.explorer.views import export_page
from ramslib.inspector import Inspector
from ramslib.runs.inference import load_model

SCREENSHOTS = ROOT / "runs" / "screenshots"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 240_000  # milliseconds that a slow machine may take for a step
RUN_ALL = """async () => {
    const app = window.jupyterapp, pause = ms => new Promise(done => setTimeout(done, ms));
    await app.restored;
    while (!app.shell.currentWidget?.context) await pause(100);
    const {context, sessionContext} = app.shell.currentWidget;
    await context.ready;
    await sessionContext.ready;
    await sessionContext.session.kernel.info;
    await app.commands.execute('notebook:run-all-cells');
}"""
SETTLED = "() => ![...document.querySelectorAll('.rams-outdated')].some(e => e.offsetParent)"
MARK_CONTROLS = """() => {
    const kinds = 'select, input, button, textarea, a[href], [tabindex="0"], [contenteditable]';
    const all = `.rams :is(${kinds})`;
    const used = [...document.querySelectorAll(all)].filter(
        e => e.getClientRects().length && !e.disabled && e.contentEditable != 'false');
    document.querySelectorAll('[data-number]').forEach(e => delete e.dataset.number);
    used.forEach((e, number) => e.dataset.number = number);
    return used.length;
}"""

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = playwright.expect
reason = f"needs a browser: none of {', '.join(NAMES)} is installed"
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason=reason), pytest.mark.slow]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Photos and two finished runs."""
    folder = tmp_path_factory.mktemp("browser")
    make_run(folder / "photos", folder / "runs" / "two")
    make_run(folder / "photos", folder / "runs" / "one", scales=1)
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A window of a laptop's size, whose requests beyond this machine fail at once."""
    window = browser.new_page(viewport={"width": 1280, "height": 1100})
    window.set_default_timeout(PATIENCE)
    here = re.compile(r"^(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|^(data|blob):")
    window.route(
        lambda url: not here.match(url),
        lambda route: route.abort(),
    )
    yield window
    window.close()


@contextlib.contextmanager
def serve(command, address, folder):
    """Start a server, wait until it answers, and stop it in the end, with all its kernels."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while not answers(address):
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
        yield
    finally:
        processes = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)
        remaining = psutil.wait_procs(processes, timeout=15)[1]
        for process in remaining:
            process.kill()
    assert not remaining and not answers(address), "the server or a kernel outlives its command"


def answers(address):
    """Whether there is a server, whatever it says."""
    try:
        urllib.request.urlopen(address, timeout=60).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Reader:
    """What the page shows, and what the library computes for it."""

    def __init__(self, page, places):
        self.page = page
        loaded = load_model(places / "runs" / "two")
        self.inspector = Inspector(loaded.model, loaded.transform, loaded.classes)
        page.wait_for_selector(".rams-panel img[src]")
        row = loaded.table[loaded.table["split"] == "validation"].iloc[0]
        self.inspector.set_image(row["path"], int(row["label"]))
        self.slider = page.locator(".widget-slider", has_text="threshold of scale 1")
        self.handle = self.slider.locator(".noUi-handle")

    def threshold(self):
        return float(self.slider.locator(".widget-readout").text_content())

    def images(self):
        """URLs of image, heat map, mask and crop: a new image has a new one."""
        return [image.get_attribute("src") for image in self.page.locator(".rams-panel img").all()][
            :4
        ]

    def expect(self, threshold):
        """Wait until the notes say what the library computes for this threshold."""
        numbers = self.inspector.region_stats(self.inspector.region(threshold=threshold))
        sides = {side: f"{numbers[side]:.0f}" for side in ("top", "left", "bottom", "right")}
        mask = f"{numbers['patches']} of 16 patches above {threshold:.2f}"
        crop = "y {top}–{bottom}, x {left}–{right} px".format(**sides)
        for text in (mask, f"{numbers['kept']} patches kept", crop):
            self.page.locator(".rams-note", has_text=text).first.wait_for()

    def expect_new_images(self, old):
        """Wait until image, mask and crop have changed; the strength must not."""
        deadline = time.monotonic() + 10
        while any((new := self.images())[number] == old[number] for number in (0, 2, 3)):
            assert time.monotonic() < deadline, "an image did not change"
            self.page.wait_for_timeout(50)
        assert new[1] == old[1]
        return new

    def wait(self):
        """Wait until no panel is being computed."""
        self.page.wait_for_function("() => !document.querySelector('.rams-outdated')")


def move_the_threshold(reader, page, name):
    """By keyboard, by mouse, by typing; images and numbers must follow each time."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    assert reader.threshold() == 1.0
    reader.expect(1.0)
    reader.wait()
    page.screenshot(path=SCREENSHOTS / f"{name}_1_start.png")
    before = reader.images()
    start = reader.inspector.region(threshold=1.0).boxes
    thresholds = [round(1 + n / 20, 2) for n in range(60)]
    boxes = [reader.inspector.region(threshold=threshold).boxes for threshold in thresholds]
    presses = next(number for number, each in enumerate(boxes) if (each != start).any())
    reader.handle.focus()
    for _ in range(presses):
        page.keyboard.press("ArrowRight")
    reader.expect(thresholds[presses])
    assert reader.threshold() == thresholds[presses]
    after = reader.expect_new_images(before)
    reader.wait()
    page.screenshot(path=SCREENSHOTS / f"{name}_2_keyboard.png")

    track = reader.slider.locator(".noUi-target").bounding_box()
    handle = reader.handle.bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(track["x"] + 0.04 * track["width"], y, steps=8)
    page.mouse.up()
    dragged = reader.threshold()
    assert 0 <= dragged <= 0.3, "the whole image"
    reader.expect(dragged)
    reader.expect_new_images(after)
    reader.wait()
    page.screenshot(path=SCREENSHOTS / f"{name}_3_mouse.png")

    reader.slider.locator(".widget-readout").fill("1.5")
    page.keyboard.press("Enter")
    reader.expect(1.5)


def visit_the_tabs(page, name):
    """Every tab fills; a thumbnail and a cell of the confusion matrix lead to images."""
    for number, tab in enumerate(("blocks", "validation set", "gallery", "confusion"), start=4):
        page.get_by_role("tab", name=tab, exact=True).click()
        button = page.get_by_role("button", name="Evaluate validation set")
        if tab == "validation set" and button.count():
            button.first.click()
            page.locator(".rams-note", has_text="stored at threshold").first.wait_for()
        if tab in ("blocks", "validation set"):
            page.wait_for_function("() => !document.querySelector('.rams-outdated')")
        if tab == "gallery":
            page.locator(".rams select", has_text="most uncertain").select_option("most uncertain")
            page.locator(".rams-thumbnail button").first.click()
        if tab == "confusion":
            page.locator(".rams-matrix button:enabled").first.click()
            page.locator(".rams-note", has_text="predicted as").first.wait_for()
        page.wait_for_timeout(1000)
        page.screenshot(path=SCREENSHOTS / f"{name}_{number}_{tab.replace(' ', '_')}.png")


def ask_and_propose(page, name):
    """Ask a patch and drag a box, by mouse and keyboard; save the figure."""
    field = page.locator(".rams-pointer input:visible")
    page.get_by_role("tab", name="attention", exact=True).click()
    area = page.locator(".rams-area:visible").first
    area.scroll_into_view_if_needed()
    page.wait_for_function(SETTLED)
    box = area.bounding_box()
    page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"])
    expect(field).to_have_value("1, 2")
    page.keyboard.press("ArrowDown")
    expect(field).to_have_value("2, 2")
    field.fill("0, 3")
    page.keyboard.press("Enter")
    expect(page.locator(".rams-spot:visible")).to_have_attribute(
        "style", re.compile("inset: 0.00% ")
    )
    page.wait_for_timeout(500)
    page.wait_for_function(SETTLED)
    page.screenshot(path=SCREENSHOTS / f"{name}_attention.png")
    page.locator(".rams-area:visible").nth(1).scroll_into_view_if_needed()
    grid = page.locator(".rams-area:visible").nth(1).bounding_box()
    page.mouse.click(grid["x"] + 0.75 * grid["width"], grid["y"] + 0.5 * grid["height"])
    expect(page.locator(".rams-views select:visible")).to_have_value("2")

    page.get_by_role("tab", name="by hand", exact=True).click()
    area = page.locator(".rams-area:visible").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    height, width = (int(area.get_attribute(f"data-{side}")) for side in ("rows", "columns"))
    corners = [(box["x"] + s * box["width"], box["y"] + s * box["height"]) for s in (0.2, 0.6)]
    page.mouse.move(*corners[0])
    page.mouse.down()
    page.mouse.move(*corners[1], steps=4)
    page.mouse.up()
    given = [int(side) for side in field.input_value().split(", ")]
    sides = [0.2 * height, 0.2 * width, 0.6 * height, 0.6 * width]
    assert given == pytest.approx(sides, abs=1.5)
    page.keyboard.press("Shift+ArrowRight")
    moved = [*given[:3], round(given[3] + width / 20)]
    expect(field).to_have_value(", ".join(map(str, moved)))
    page.wait_for_timeout(500)
    page.wait_for_function(SETTLED)
    page.screenshot(path=SCREENSHOTS / f"{name}_by_hand.png")
    page.get_by_role("button", name="Save figure").click()
    link = page.get_by_role("link", name="by hand.csv")
    with page.expect_download() as download:
        link.click()
    table = pd.read_csv(download.value.path()).set_index("output")
    assert table.loc["by hand", ["top", "left", "bottom", "right"]].tolist() == pytest.approx(
        moved, abs=1e-3
    )
    names = page.evaluate(
        "() => [...document.querySelectorAll('.rams .noUi-handle, .rams-panel img')]"
        ".map(e => e.getAttribute('aria-label') || e.alt)"
    )
    assert names and all(names), "sliders and images have names for screen readers"


def name_of_focus(page, client):
    """The name that the browser gives a screen reader for what has the focus."""
    active = client.send("Runtime.evaluate", {"expression": "document.activeElement"})["result"]
    query = {"objectId": active["objectId"], "fetchRelatives": False}
    node = client.send("Accessibility.getPartialAXTree", query)["nodes"][0]
    return node.get("name", {}).get("value", "").strip(" \u200b")


def press_tab_through(page):
    """Tab reaches every control once, in order, and leaves; back likewise. Returns the names."""
    client, number = page.context.new_cdp_session(page), "document.activeElement.dataset.number"
    page.wait_for_timeout(500)
    page.wait_for_function(SETTLED)
    names, reached, controls = [], [], page.evaluate(MARK_CONTROLS)
    page.locator("[data-number='0']").focus()
    for _ in range(controls):
        reached.append(page.evaluate(number))
        names.append(name_of_focus(page, client))
        page.keyboard.press("Tab")
    assert reached == list(map(str, range(controls))), names
    assert all(names), names
    assert page.evaluate(number) in (None, "0"), "left, or round the window to the first"
    page.locator(f"[data-number='{controls - 1}']").focus()
    for expected in reversed(reached):
        assert page.evaluate(number) == expected
        page.keyboard.press("Shift+Tab")
    return names


def tab_to(page, name):
    """Press Tab until a control whose name begins so, a pattern, has the focus."""
    client = page.context.new_cdp_session(page)
    for _ in range(100):
        page.keyboard.press("Tab")
        if re.match(name, name_of_focus(page, client)):
            return
    raise AssertionError(f"Tab does not reach {name}")


def open_tab(page, name):
    """Choose a tab of the analyses by its arrow keys."""
    page.locator(".rams-tabs [role=tab][tabindex='0']").focus()
    for _ in range(9):
        if page.evaluate("() => document.activeElement.textContent") == name:
            page.keyboard.press("Enter")
            expect(page.locator(".rams-tabs [role=tab][aria-selected=true]")).to_have_text(name)
            return
        page.keyboard.press("ArrowRight")
    raise AssertionError(f"arrow keys do not reach {name}")


def expect_uncovered_captions(page):
    """Neither pictures nor the frames around what has focus or pointer reach into captions.

    A picture that is cut to fill its box is painted beyond it, unless what overflows is hidden.
    """
    cells = page.locator(".rams-thumbnail:visible")
    cells.first.wait_for()
    for cell in cells.all()[:3]:
        button, picture = cell.locator("button"), cell.locator("img")
        top = cell.locator(".rams-note").bounding_box()["y"]
        for part in (button, picture):
            box = part.bounding_box()
            assert box["y"] + box["height"] <= top + 0.01
        assert picture.evaluate("e => getComputedStyle(e).overflow") in ("hidden", "clip")
        for show in (button.hover, button.focus):
            show()
            frame = "e => [getComputedStyle(e).outlineOffset, getComputedStyle(e).outlineWidth]"
            offset, width = (float(text.removesuffix("px")) for text in button.evaluate(frame))
            assert width > 0 and offset + width <= 0, "the frame lies inside"


def open_two_images(page):
    """Enter on a thumbnail opens its image, and the focus stays there."""
    page.locator(".rams-thumbnail:visible").first.wait_for()
    image, seen = page.locator(".rams-panel img").first, set()
    for _ in range(2):
        tab_to(page, "open ")
        page.keyboard.press("Enter")
        page.wait_for_timeout(1000)
        page.wait_for_function(SETTLED)
        seen.add(image.get_attribute("src"))
        expect(page.locator(".rams-thumbnail button:focus")).to_have_count(1)
    assert len(seen) == 2


def use_the_keyboard_alone(page):
    """Image, threshold, patch, box and files, without a mouse; every control has a name."""
    area, field = page.locator(".rams-area:visible"), page.locator(".rams-pointer input:visible")
    page.locator(".rams-head select").focus()
    chosen = page.locator(".rams-browser select[size]")
    tab_to(page, "images")
    for key in ("ArrowDown", "ArrowDown", "b"):  # JupyterLab's commands for cells, outside
        page.keyboard.press(key)
    expect(chosen).to_be_focused()
    tab_to(page, "threshold of scale 1")
    page.keyboard.press("Home")
    page.locator(".rams-note", has_text="16 of 16 patches above 0.00").first.wait_for()
    titles = "threshold", "attention", "by hand", "compare", "validation set"
    for title in (*titles, "gallery", "confusion"):
        open_tab(page, title)
        if title == "compare":  # of both models, the one that is shown is evaluated, too
            tab_to(page, "Evaluate both")
            page.keyboard.press("Enter")
            page.locator(".rams-note:visible", has_text="McNemar").wait_for()
            tab_to(page, "show")
            page.keyboard.press("ArrowDown")  # what the other model alone gets right
        if title == "confusion":
            page.locator(".rams-note:visible", has_text="press a cell").wait_for()
            tab_to(page, r"\d+ × .* predicted as")
            page.keyboard.press("Enter")
            page.locator(".rams-note:visible", has_text="predicted as").wait_for()
        if title == "gallery":
            tab_to(page, "show")
            page.keyboard.type("most")  # uncertain
            open_two_images(page)
        if title in ("compare", "gallery", "confusion"):
            expect_uncovered_captions(page)
        names = press_tab_through(page)
        assert "threshold of scale 1" in names and title in names
        if title == "attention":
            for typed, pressed in (("class 1", "0, 0"), ("0, 3", "1, 3")):
                field.focus()
                page.keyboard.press("Control+A")
                page.keyboard.type(typed)
                page.keyboard.press("Shift+Tab")
                expect(area.first).to_be_focused()
                page.keyboard.press("ArrowDown")
                expect(field).to_have_value(pressed)
            style = re.compile("inset: 25.00% 0.00% 50.00% 75.00%")
            expect(page.locator(".rams-spot:visible")).to_have_attribute("style", style)
        if title == "by hand":
            area.first.focus()
            before = [int(side) for side in field.input_value().split(", ")]
            page.keyboard.press("Shift+ArrowLeft")
            moved = before[3] - int(area.first.get_attribute("data-columns")) / 20
            expect(field).to_have_value(", ".join(map(str, [*before[:3], round(moved)])))
    tab_to(page, "Save figure")
    page.keyboard.press("Space")
    page.get_by_role("link", name=".csv").first.wait_for()
    assert "state.json" in press_tab_through(page)


def test_an_exported_page_moves_without_kernel_and_network(browser, places, tmp_path):
    loaded = load_model(places / "runs" / "two")
    paths = loaded.table["path"].head(3).tolist()
    export_page(places / "runs" / "two", paths, tmp_path / "page.html")
    context, errors = browser.new_context(offline=True), []
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(error))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or errors.append(r.url))
    page.goto((tmp_path / "page.html").as_uri())
    inspector = Inspector(loaded.model, loaded.transform, loaded.classes).set_image(paths[0])
    slider = page.get_by_role("slider", name="threshold of scale 1")
    for keys, eta in (([], 1.0), (["ArrowRight"] * 5, 1.5), (["End"], 4.0)):
        slider.focus()
        for key in keys:
            page.keyboard.press(key)
        assert page.locator("#eta").text_content() == f"{eta:.1f} × mean"
        stats = inspector.region_stats(inspector.region(threshold=eta))
        y, x = (f"{stats[a]:.0f}–{stats[b]:.0f}" for a, b in (("top", "bottom"), ("left", "right")))
        captions = page.locator("figcaption", has_text="scale 2:").all_text_contents()
        assert captions[0] == f"scale 2: y {y}, x {x} px" and len(captions) == 3
        dark = page.locator("main > .row").first.locator("svg").nth(2).locator("rect")
        lit = dark.evaluate_all("all => all.filter(e => e.getAttribute('opacity') == '0').length")
        assert lit == stats["kept"]
    page.screenshot(path=SCREENSHOTS / "exported.png", full_page=True)
    context.close()
    assert errors == []


def test_jupyterlab_runs_the_notebook_and_its_slider(page, places, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "05_attention_explorer.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += f"\ndata, root = 'folder', {str(places / 'photos')!r}"
    cell.source += f"\nout, preset = {str(places / 'runs')!r}, 'tiny'"
    (tmp_path / "books").mkdir()
    nbformat.write(notebook, tmp_path / "books" / "05.ipynb")
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={tmp_path / 'books'}", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.extension_manager=readonly"]
    address = f"http://127.0.0.1:{port}"
    with serve(command, f"{address}/api/status?token={token}", tmp_path):
        page.goto(f"{address}/doc/tree/05.ipynb?reset&token={token}")
        page.wait_for_function("() => window.jupyterapp")
        page.evaluate(RUN_ALL)
        saved = places / "runs" / "results" / "05_attention_explorer.csv"
        deadline = time.monotonic() + PATIENCE / 1000
        while not saved.exists():  # the last cell writes it
            assert (
                time.monotonic() < deadline
                and not page.locator(".jp-RenderedText[data-mime-type*=error]").count()
            )
            page.wait_for_timeout(500)
        reader = Reader(page, places)
        reader.slider.scroll_into_view_if_needed()
        move_the_threshold(reader, page, "jupyterlab")
        ask_and_propose(page, "jupyterlab")
        cells = page.locator(".jp-Cell").count()
        use_the_keyboard_alone(page)
        assert page.locator(".jp-Cell").count() == cells


def test_app_serves_the_explorer_without_code(page, places, tmp_path):
    pytest.importorskip("voila", reason="needs Voila for the app")
    port = free_port()
    command = [sys.executable, "-m", "ramslib", "app", "--data", "folder"]
    command += ["--root", str(places / "photos"), "--out", str(places / "runs")]
    command += ["--", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with serve(command, f"http://127.0.0.1:{port}/voila/static/", tmp_path):
        page.goto(f"http://127.0.0.1:{port}/")
        reader = Reader(page, places)
        assert "from ramslib" not in page.content()
        move_the_threshold(reader, page, "app")
        visit_the_tabs(page, "app")
        ask_and_propose(page, "app")
        use_the_keyboard_alone(page)
        upload_a_large_photo(page, tmp_path / "large.png")


def upload_a_large_photo(page, path):
    """More than the 10 MiB of a websocket message by default."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2400, 2500, 3), np.uint8)).save(path)
    assert path.stat().st_size > 15 * 2**20
    page.get_by_role("radio", name="upload", exact=True).click()
    with page.expect_file_chooser() as chooser:  # the widget's input is no part of the page
        page.get_by_role("button", name="Choose photos").click()
    chooser.value.set_files(path)
    page.locator(".rams-note", has_text="2400 × 2500 px").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "app_8_upload.png")
