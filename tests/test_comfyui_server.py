"""ComfyUI's own server runs the nodes on a posted workflow, and its interface shows them.

Needs ComfyUI, as tests/test_comfyui.py does (COMFYUI_PATH), with what its server imports; the
picture of the interface needs playwright and a Chromium (CHROMIUM) beside it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
START_S = 180

pytestmark = pytest.mark.slow
if not COMFYUI or not (Path(COMFYUI) / "main.py").exists():
    pytest.skip("no ComfyUI: COMFYUI_PATH names no folder of it", allow_module_level=True)
for needed in ("comfyui_frontend_package", "aiohttp"):
    pytest.importorskip(needed)

WORKFLOW: dict[str, Any] = {
    "1": {"class_type": "TextHost", "inputs": {"text": "smiling face"}},
    "2": {"class_type": "ForeseerLoadPredictor", "inputs": {"name": "zoo:emoji_flux_l2p_8"}},
    "3": {
        "class_type": "ForeseerApply",
        "inputs": {"model": ["1", 0], "predictor": ["2", 0], "first_branch": "conditional"},
    },
    "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "5": {
        "class_type": "SamplerCustom",
        "inputs": {
            "model": ["3", 0],
            "add_noise": True,
            "noise_seed": 5,
            "cfg": 3.0,
            "positive": ["1", 1],
            "negative": ["1", 2],
            "sampler": ["4", 0],
            "sigmas": ["2", 1],
            "latent_image": ["1", 3],
        },
    },
    "6": {"class_type": "TextHostPicture", "inputs": {"samples": ["5", 0]}},
    "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "foreseer"}},
}

QUIET = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
PLACES = {
    1: [0, 200],
    2: [0, 0],
    3: [330, 0],
    4: [330, 160],
    5: [650, 0],
    6: [980, 0],
    7: [1180, 0],
}
SHOW = """async ([workflow, places]) => {
  await window.app.loadApiJson(workflow, 'foreseer')
  const nodes = window.app.graph._nodes
  for (const node of nodes) {
    node.pos = places[node.id]
    for (const widget of node.widgets ?? [])
      if (widget.name === 'control_after_generate') widget.value = 'fixed'
  }
  window.app.canvas.ds.offset = [100, 150]
  window.app.canvas.setDirty(true, true)
  return nodes.map(node => [node.type, Boolean(node.has_errors)])
}"""
DRAWN = "window.app.graph._nodes.some(node => node.type === 'SaveImage' && node.imgs?.length)"


class Server:
    """A running ComfyUI.

    Args:
        address: where.
        folder: its base directory.
        log: what it prints.
    """

    def __init__(self, address: str, folder: Path, log: Path) -> None:
        self.address, self.folder, self.log = address, folder, log

    def get(self, path: str, body: Any = None) -> Any:
        """The JSON behind a path; posted to, where there is a body."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/{path}", data=content)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Post a workflow and wait for what became of it."""
        name = self.get("prompt", {"prompt": workflow})["prompt_id"]
        for _ in range(START_S):
            if name in (history := self.get(f"history/{name}")):
                found: dict[str, Any] = history[name]
                return found
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-2000:])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI's server with our folder of nodes, and the test's, among its custom nodes."""
    base = tmp_path_factory.mktemp("comfyui")
    nodes = base / "custom_nodes"
    nodes.mkdir()
    shutil.copytree(ROOT / "integrations" / "comfyui", nodes / "foreseer")
    shutil.copy(ROOT / "tests" / "comfyui_host.py", nodes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--disable-api-nodes"]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    log = base / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(START_S):
            if "To see the GUI go to" in log.read_text():
                break
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(1)
        yield Server(f"http://127.0.0.1:{port}", base, log)
    finally:
        process.terminate()
        process.wait(30)


def test_the_server_knows_the_nodes(server: Server) -> None:
    found = server.get("object_info")
    assert found["ForeseerApply"]["display_name"] == "Apply foreseer"
    assert found["ForeseerApply"]["output"] == ["MODEL"]
    assert found["ForeseerLoadPredictor"]["output"] == ["FORESEER_PREDICTOR", "SIGMAS"]
    assert found["ForeseerLearnedSampler"]["output"] == ["SAMPLER", "SIGMAS"]


def test_the_bundled_workflow_lacks_nothing_but_the_models_files(server: Server) -> None:
    bundled = json.loads((ROOT / "integrations" / "comfyui" / "workflow.json").read_text())
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.get("prompt", {"prompt": bundled})
    wrong = json.load(caught.value)["node_errors"]
    assert {each["class_type"] for each in wrong.values()} == {
        "UNETLoader",
        "DualCLIPLoader",
        "VAELoader",
    }
    kinds = {error["type"] for each in wrong.values() for error in each["errors"]}
    assert kinds == {"value_not_in_list"}


def test_a_posted_workflow_draws_a_picture_at_the_predictors_evaluations(server: Server) -> None:
    done = server.run(WORKFLOW)
    assert done["status"]["status_str"] == "success", done["status"]
    (image,) = done["outputs"]["7"]["images"]
    assert (server.folder / "output" / image["filename"]).stat().st_size > 1000
    assert "foreseer: 42 of 50 steps forecast" in server.log.read_text()


def test_a_workflow_of_other_steps_fails_in_the_usual_words(server: Server) -> None:
    other = json.loads(json.dumps(WORKFLOW))
    other["8"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["2", 1], "step": 10}}
    other["5"]["inputs"]["sigmas"] = ["8", 1]
    status = server.run(other)["status"]
    assert status["status_str"] == "error"
    told = [detail for kind, detail in status["messages"] if kind == "execution_error"]
    assert "fitted on 50 steps, this run has 40" in told[0]["exception_message"]


def test_the_interface_shows_the_workflow(server: Server, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium")
    out = Path(os.environ.get("COMFYUI_PICTURE") or tmp_path / "comfyui.png")
    server.get("settings", QUIET)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 520})
        page.goto(server.address)
        page.wait_for_function("Boolean(window.app?.graph?._nodes)", timeout=60_000)
        page.wait_for_timeout(3000)  # it opens a workflow of its own last
        shown = page.evaluate(SHOW, [WORKFLOW, PLACES])
        page.evaluate("window.app.queuePrompt(0)")
        page.wait_for_function(DRAWN, timeout=60_000)
        page.wait_for_timeout(6000)  # the canvas is painted, and its notes are gone
        page.screenshot(path=out)
        browser.close()
    assert sorted(kind for kind, _ in shown) == sorted(n["class_type"] for n in WORKFLOW.values())
    assert not any(wrong for _, wrong in shown)
    assert out.stat().st_size > 10_000
