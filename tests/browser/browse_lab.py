"""JupyterLab and the report in a real browser: `make test-browser`. Screenshots lie in runs/browser."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

from flowerlib.lab import report, reproduce, store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = store.ROOT / "runs" / "browser"
QUIET = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}
if CHROMIUM is None:
    pytestmark = pytest.mark.skip(reason="no chromium on this machine")


@pytest.fixture(scope="module")
def run():
    """The smoke run, and copies of two notebooks that read it."""
    folder = reproduce.reproduce("smoke", str(SHOTS / "smoke"), {})
    shutil.copy(reproduce.FOLDER / "explorers.py", SHOTS)
    for name in ("00_follow_the_flow.ipynb", "09_explore.ipynb"):
        notebook = nbformat.read(reproduce.FOLDER / name, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                cell.source = cell.source.replace('PROFILE: str = "laptop"', 'PROFILE: str = "smoke"')
                cell.source = cell.source.replace("OUT: str = None", f"OUT: str = {str(folder)!r}")
        sources = "".join(cell.source for cell in notebook.cells)
        assert name.startswith("00") or ('PROFILE: str = "smoke"' in sources and str(folder) in sources)
        nbformat.write(notebook, SHOTS / name)
    return folder


@pytest.fixture(scope="module")
def lab(run):
    """Address of a JupyterLab of our own, on loopback and behind a token."""
    token, home = secrets.token_hex(16), SHOTS / "home"
    shutil.rmtree(home, ignore_errors=True)
    for name, values in QUIET.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        store.write_json(path, values)
    places = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "RUNTIME")}
    env = os.environ | places | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "work")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={SHOTS}", "--LabApp.extension_manager=readonly"]
    with open(SHOTS / "lab.log", "w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            for _ in range(300):
                started = list((home / "runtime").glob("jpserver-*.json"))
                if started:
                    break
                time.sleep(0.2)
            assert started, f"JupyterLab did not start:\n{(SHOTS / 'lab.log').read_text()}"
            yield json.loads(started[0].read_text())["url"] + "lab", token
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        yield chromium
        chromium.close()


def opened(browser, lab, name):
    """A page with all cells of the notebook run, and what its console has complained of."""
    url, token = lab
    page, complaints = browser.new_page(viewport={"width": 1500, "height": 1000}), []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{url}/tree/{name}?token={token}&reset")
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    expect(prompts.first).to_have_text("[1]:", timeout=60_000)
    expect(prompts.filter(has_text="[*]:")).to_have_count(0, timeout=300_000)
    page.screenshot(path=SHOTS / f"{name}.png")
    assert page.locator(".jp-OutputArea-output").filter(has_text="Traceback (most recent call last)").all_inner_texts() == []
    expect(prompts.filter(has_text="[ ]:")).to_have_count(0)
    return page, complaints


def test_notebook_00_runs_from_the_first_to_the_last_cell(browser, lab):
    page, complaints = opened(browser, lab, "00_follow_the_flow.ipynb")
    assert page.locator(".jp-OutputArea-output img").count() >= 2
    page.screenshot(path=SHOTS / "00.png")
    assert not complaints


def test_the_explorers_answer(browser, lab):
    page, complaints = opened(browser, lab, "09_explore.ipynb")
    for number, (label, name) in enumerate([("smoothing", "tree"), ("places of a list", "popularity")]):
        box = page.locator(".jp-OutputArea-output .widget-vbox").filter(has_text=label).first
        picture, before = box.locator("img").first, None
        expect(picture).to_be_visible()
        picture.scroll_into_view_if_needed()
        before = picture.get_attribute("src")
        handle = box.locator(".widget-slider").filter(has_text=label).locator(".noUi-handle")
        handle.focus()
        start = time.perf_counter()
        handle.press("ArrowLeft")
        expect(picture).not_to_have_attribute("src", before, timeout=10_000)
        print(f"{name}: new figure after {time.perf_counter() - start:.2f} s")
        box.screenshot(path=SHOTS / f"explorer_{name}.png")
    button = page.locator(".jupyter-button").filter(has_text=re.compile("^ *run$"))
    button.click()
    expect(button).to_be_enabled(timeout=120_000)
    page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot(path=SHOTS / "explorer_training.png")
    assert not complaints


def test_the_report_reads_without_network(browser, run):
    page = browser.new_context(offline=True).new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(report.report(run).as_uri())
    assert page.locator("h1").count() >= 6
    sizes = page.locator("img").evaluate_all("all => all.map(i => [i.naturalWidth, i.alt.length])")
    assert len(sizes) > 5 and all(width > 100 and alt > 10 for width, alt in sizes)
    assert page.locator("math").count() > 5
    page.screenshot(path=SHOTS / "report.png")
    assert not complaints
