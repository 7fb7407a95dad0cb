"""The explorer's chapter live in JupyterLab: every cell runs, and a control that moves reaches Python."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import absent

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "explorer.ipynb"
LIMIT = 120  # seconds for all of it
ASK = """
async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code, store_history: false });
  let said = "";
  future.onIOPub = (message) => {
    if (message.header.msg_type === "stream") said += message.content.text;
    if (message.header.msg_type === "error") said += message.content.evalue;
  };
  await future.done;
  return said.trim();
}
"""
INDEX = """
from sparsesurvey.widgets import PatternExplorer
print(next(value for value in list(globals().values()) if isinstance(value, PatternExplorer)).index)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def deadline():
    return time.monotonic() + LIMIT


@pytest.fixture
def lab(tmp_path, deadline):
    """Address and token of a JupyterLab that knows nothing of this user's settings and ends with the test."""
    if not NOTEBOOK.is_file():
        absent("notebooks/explorer.ipynb is not there")
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(NOTEBOOK, work)
    config = tmp_path / "config" / "labconfig"
    config.mkdir(parents=True)
    news = "@jupyterlab/apputils-extension:announcements"
    (config / "page_config.json").write_text(json.dumps({"disabledExtensions": {news: True}}))
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
               "IPYTHONDIR": "ipython"}
    own = {name: str(tmp_path / folder) for name, folder in folders.items()}
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--LabApp.expose_app_in_browser=True", f"--IdentityProvider.token={token}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={work}"]
    with (tmp_path / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, deadline)
        yield port, token
    finally:
        end(server)


def wait_for(address: str, server: subprocess.Popen, deadline: float) -> None:
    while time.monotonic() < deadline:
        assert server.poll() is None, "JupyterLab ended before it answered"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer within {LIMIT} s")


def end(server: subprocess.Popen) -> None:
    """End the server, which ends its kernels; then whatever is left of its process group."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def left(deadline: float) -> int:
    """Milliseconds until the limit, for Playwright."""
    return max(1, round(1000 * (deadline - time.monotonic())))


def test_explorer_is_live_in_jupyterlab(chromium, lab, watch, deadline):
    port, token = lab
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    watched = watch(page)
    page.goto(f"http://127.0.0.1:{port}/lab/workspaces/t{token[:8]}/tree/{NOTEBOOK.name}?token={token}&reset")
    idle = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    page.wait_for_function(idle, timeout=left(deadline))
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".sparse-explorer select", timeout=left(deadline))
    page.wait_for_function(idle, timeout=left(deadline))
    assert page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.error']").count() == 0
    before = page.evaluate(ASK, INDEX)
    assert before.isdigit(), before
    slider = page.locator(".sparse-explorer input[type=range]").first
    end_of = "max" if slider.input_value() == slider.get_attribute("min") else "min"
    slider.fill(slider.get_attribute(end_of))
    while page.evaluate(ASK, INDEX) == before:
        assert time.monotonic() < deadline, "the slider moved and Python did not hear of it"
        page.wait_for_timeout(100)
    problems = [text for text in watched.problems if "leaves the machine" in text or text.startswith("page error")]
    assert not problems
    page.close()
