"""The recipes for real models run as printed, on tiny whole pipelines of the same classes."""

import contextlib
import functools
import io
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import HunyuanVideo15Pipeline
from nightly import nightly
from recipe_cases import PIPELINES, with_few_text_tokens
from source_files import PACKAGE

from foreseer.checkpoints.format import load_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.cli import main
from foreseer.evaluation.results import load_meta, load_rows
from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pipeline_call import call_settings, samples
from foreseer.trajectories.recording import Recording

RECIPES = PACKAGE / "configs" / "recipes"
PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
STEPS, BUDGET = 8, 4
TWO = "wan22_t2v"  # has two transformers
METHODS = "euler ab2 dpmpp_2m unipc taylor_1"
SIZES: dict[str, dict[str, int]] = {
    "flux_dev": {"height": 32, "width": 32},
    "sd35_large": {"height": 32, "width": 32},
    "qwen_image": {"height": 32, "width": 32},
    "wan22_t2v": {"height": 32, "width": 32, "num_frames": 5},
    "hunyuan_video15": {"height": 16, "width": 16, "num_frames": 5},
}
CLASSES = {
    "flux_dev": "FluxPipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "qwen_image": "QwenImagePipeline",
    "wan22_t2v": "WanPipeline",
    "hunyuan_video15": "HunyuanVideo15Pipeline",
}
GUIDANCE: dict[str, tuple[int, float, dict[str, float]]] = {  # branches, scale, other scales
    "flux_dev": (1, 3.5, {}),
    "sd35_large": (2, 3.5, {}),
    "qwen_image": (2, 1.0, {"true_cfg_scale": 4.0}),
    "wan22_t2v": (2, 4.0, {"guidance_scale_2": 3.0}),
    "hunyuan_video15": (2, 1.0, {"guider.guidance_scale": 6.0}),
}
SEND = """
import sys
from multiprocessing.connection import Client
with Client({address!r}) as connection:
    connection.send(sys.argv[1:])
    sys.exit(connection.recv())
"""


@dataclass
class Shell:
    """Runs `run.sh`; its `foreseer` commands are run here, in this process, as they come."""

    folder: Path
    words: list[list[str]] = field(default_factory=list)

    def __call__(self, *arguments: str, **environment: str) -> int:
        """The script's exit code; `words` then holds the commands it gave."""
        self.words = []
        with Listener() as listener:
            (self.folder / "send.py").write_text(SEND.format(address=listener.address))
            stub = self.folder / "bin" / "foreseer"
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f'exec "{sys.executable}" -IS "{self.folder}/send.py" "$@"\n')
            stub.chmod(0o755)
            script = threading.Thread(
                target=self.script, args=(listener.address, arguments), kwargs=environment
            )
            script.start()
            while isinstance(given := self.answer(listener), list):
                self.words.append(given)
            script.join()
        return given

    def script(self, address: Any, arguments: tuple[str, ...], **environment: str) -> None:
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        given = {**os.environ, "PATH": path, "PYTHON": sys.executable, **environment}
        done = subprocess.run(["bash", str(RECIPES / "run.sh"), *arguments], env=given)
        with Client(address) as connection:
            connection.send(done.returncode)

    @staticmethod
    def answer(listener: Listener) -> list[str] | int:
        """Run one command the script gives, or take its exit code."""
        with listener.accept() as connection:
            given = connection.recv()
            if isinstance(given, list):
                connection.send(code_of(given))
            return given


def code_of(words: list[str]) -> int:
    try:
        main(words)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # as Python does when it ends
            print(stop.code)
            return 1
        return int(stop.code or 0)
    return 0


@dataclass
class Ran:
    model: str
    folder: Path  # where the script ran, with the tiny pipeline
    printed: str
    words: list[list[str]]

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "recipes" / self.model

    @property
    def pipe(self) -> Any:
        return load_pipeline(str(self.folder / "pipeline"), torch.bfloat16)

    def draw(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """Final latents of a held-out prompt, called as the recipe says."""
        told = yaml.safe_load((RECIPES / self.model / "call.yaml").read_text())
        settings = {**told["settings"], **SIZES[self.model], **changes}
        given = call_settings(pipe, STEPS, told.get("guidance_scale"), settings)
        entry = samples(pipe, [prompts("held_out")[0]])[0]
        generator = [torch.Generator().manual_seed(1)]
        return pipe(**entry, **given, generator=generator, output_type="latent")[0]


def prompts(name: str) -> list[str]:
    return (RECIPES / f"{name}.txt").read_text().splitlines()


def options(words: dict[str, int]) -> list[str]:
    return [word for name, n in words.items() for word in (f"--settings.{name}", str(n))]


@pytest.fixture(scope="module", autouse=True)
def few_text_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        with_few_text_tokens(patch)
        yield


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Callable[[str], Ran]:
    """A recipe after its script has run on its tiny pipeline, in a directory of its own."""
    return functools.cache(lambda model: after_the_script(model, tmp_path_factory.mktemp(model)))


IN_WHEEL = "flux_dev"  # one recipe is enough to tell that all files are there
BY_DEFAULT = (IN_WHEEL, "hunyuan_video15", TWO)  # pictures, videos, two transformers
MODELS = [
    pytest.param(case, marks=pytest.mark.slow) if case in BY_DEFAULT[1:] else case
    for case in nightly(sorted(PIPELINES), BY_DEFAULT)
]


@pytest.fixture(params=MODELS)
def ran(request, run_of) -> Ran:
    return run_of(request.param)


def after_the_script(model: str, folder: Path) -> Ran:
    PIPELINES[model]().save_pretrained(folder / "pipeline")
    shell, printed = Shell(folder), io.StringIO()
    overrides = ["--pipeline", str(folder / "pipeline"), "--num_inference_steps", str(STEPS)]
    few = {"TRAJECTORIES": "3", "BUDGETS": str(BUDGET), "COMPARE": "1"}
    few |= {} if model == TWO else {"BENCH": "1", "METHODS": METHODS}
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        code = shell(model, *overrides, *options(SIZES[model]), **few)
    assert code == 0, printed.getvalue()[-4000:]
    return Ran(model, folder, printed.getvalue(), shell.words)


def test_the_script_gives_the_commands_of_the_page(ran):
    given = [words[0] for words in ran.words]
    bench = [] if ran.model == TWO else ["bench"]
    assert given == ["inspect", "record", "inspect", "fit", "export", "generate", *bench]


def test_the_pipeline_is_of_the_class_the_recipe_is_for_and_is_supported(ran):
    assert re.search(rf"^pipeline +{CLASSES[ran.model]},", ran.printed, re.MULTILINE)
    assert "SUPPORTED on the taps output, hidden, residual." in ran.printed


def test_a_folder_is_loaded_in_half_precision_but_for_what_its_class_keeps(ran):
    found = {parameter.dtype for parameter in ran.pipe.transformer.parameters()}
    kept = {torch.float32} if ran.model == "wan22_t2v" else set()  # modulation and norms
    assert found == {torch.bfloat16} | kept


def test_what_is_recorded_is_what_the_recipe_says(ran):
    told = yaml.safe_load((RECIPES / ran.model / "record.yaml").read_text())
    recording = Recording(ran.out / "recording")
    header = recording.header
    branches, scale, others = GUIDANCE[ran.model]
    assert header.taps == sorted(told["taps"]) and header.dtype == "bfloat16"
    assert header.num_steps == STEPS and not header.states and header.features == "none"
    assert header.num_branches == branches
    assert header.scheduler["guidance_scale"] == scale
    assert others.items() <= header.guidance.items()
    assert len(header.expert_steps) == (2 if ran.model == "wan22_t2v" else 1)
    told_prompts = [recording.meta(item)["prompt"] for item in recording.items]
    assert told_prompts == prompts("calibration")[:3]


def test_the_predictor_is_of_its_class_and_its_forecasts_are_finite(ran):
    predictor = load_predictor(str(ran.out / f"l2p_{BUDGET}"))
    assert type(predictor).__name__ == ("L2P" if ran.model == "wan22_t2v" else "L2P")
    spec, pipe = predictor.spec, ran.pipe
    assert len(spec.anchors) == BUDGET and {*spec.expert_steps} <= {*spec.anchors}
    with forecasting(pipe, predictor) as run:
        latents = ran.draw(pipe)
    assert latents.isfinite().all()
    assert run.report().anchors == list(spec.anchors)
    assert not torch.equal(latents, ran.draw(pipe))  # it did forecast


def test_the_comparison_has_a_finite_error_and_a_picture(ran):
    error = re.search(r"mean PSNR: ([\d.]+) dB", ran.printed)
    assert error and math.isfinite(float(error.group(1)))
    assert (ran.out / f"compare_{BUDGET}_1.png").stat().st_size > 1000


def test_the_benchmark_compares_on_the_same_anchors_as_the_recipe_draws(ran):
    if ran.model == TWO:
        call = ["--config", str(RECIPES / TWO / "call.yaml")]
        words = ["--pipeline", str(ran.folder / "pipeline"), "--num_inference_steps", str(STEPS)]
        prompted = ["--prompts", str(RECIPES / "held_out.txt"), "--out", str(ran.folder / "none")]
        with pytest.raises(SystemExit, match="has the experts transformer, transformer_2"):
            main(["bench", *call, *words, *prompted])
        return
    rows = load_rows(ran.out / "bench" / "results.json")
    assert {row.method for row in rows} == {"full", "l2p", *METHODS.split()}
    anchors = load_predictor(str(ran.out / f"l2p_{BUDGET}")).spec.anchors
    for method in ("l2p", *METHODS.split()):
        assert tuple(anchors) in {row.steps for row in rows if row.method == method}
    for row in rows:
        finite = math.isfinite(row.psnr_db) and row.latent_rel_l2 > 0
        assert row.num_samples == 1 and finite == (row.method != "full")
        assert row.guidance_scale == GUIDANCE[ran.model][1]
        assert 0 < row.flops_ratio <= 1 and row.num_anchors in (STEPS, BUDGET)
    told = load_meta(ran.out / "bench" / "results.json")
    assert "--dtype bfloat16" in str(told.command) and "--settings" in str(told.command)
    assert (ran.out / "bench" / "report.html").stat().st_size > 10_000


def test_another_grid_is_refused(ran):
    pipe = ran.pipe
    with forecasting(pipe, load_predictor(str(ran.out / f"l2p_{BUDGET}"))):
        with pytest.raises(PredictorMismatch, match="steps"):
            ran.draw(pipe, num_inference_steps=STEPS + 1)


def test_another_size_is_refused(ran):
    pipe = ran.pipe
    with forecasting(pipe, load_predictor(str(ran.out / f"l2p_{BUDGET}"))):
        with pytest.raises(PredictorMismatch):
            ran.draw(pipe, height=2 * SIZES[ran.model]["height"])


@pytest.mark.slow
def test_the_code_of_the_page_draws_with_the_exported_predictor(run_of, tmp_path, monkeypatch):
    if not PAGE.exists():
        pytest.skip("the wheel holds no docs")
    model = "hunyuan_video15"
    ran = run_of(model)
    told = yaml.safe_load((RECIPES / model / "call.yaml").read_text())
    told |= {"num_inference_steps": STEPS, "settings": SIZES[model]}
    config = tmp_path / "configs" / "recipes" / model / "call.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(told))
    (tmp_path / "runs" / "recipes" / model).mkdir(parents=True)
    (tmp_path / "runs" / "recipes" / model / "l2p_8").symlink_to(ran.out / f"l2p_{BUDGET}")
    asked: list[str] = []

    def from_pretrained(name: str, dtype: torch.dtype) -> Any:
        asked.append(name)
        return load_pipeline(str(ran.folder / "pipeline"), dtype)

    monkeypatch.setattr(HunyuanVideo15Pipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(HunyuanVideo15Pipeline, "enable_model_cpu_offload", lambda pipe: None)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert asked == [told["pipeline"]]
    assert len(names["run"].report().anchors) == BUDGET
    assert torch.as_tensor(names["output"].frames).isfinite().all()


def test_a_command_that_fails_ends_the_script(tmp_path, capfd):
    (tmp_path / "nothing").mkdir()
    shell = Shell(tmp_path)
    assert shell("flux_dev", "--pipeline", str(tmp_path / "nothing")) == 1
    assert [words[0] for words in shell.words] == ["inspect"]
    assert "has no model_index.json" in capfd.readouterr().out


def test_an_unknown_recipe_is_refused_with_the_known_ones(tmp_path, capfd):
    shell = Shell(tmp_path)
    assert shell("flux_pro") == 2 and not shell.words
    assert "no recipe 'flux_pro'" in (told := capfd.readouterr().err)
    assert all(model in told for model in PIPELINES)


def test_there_are_enough_prompts_all_different_and_plain():
    calibration, held_out = prompts("calibration"), prompts("held_out")
    assert len(calibration) >= 64 and len(held_out) == 16
    assert len({*calibration, *held_out}) == len(calibration) + len(held_out)
    assert not {*"".join(calibration + held_out)} & {*'"\\$`'}  # the script quotes them


@pytest.mark.parametrize("model", sorted(PIPELINES))
@pytest.mark.parametrize("command", ["inspect", "verify", "record", "generate"])
def test_every_command_that_draws_takes_the_call(model, command, capsys):
    config = RECIPES / model / "call.yaml"
    told = yaml.safe_load(config.read_text())
    words = [command, "--pipeline", told["pipeline"], "--config", str(config), "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *(["--out", "out"] if command == "record" else [])])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err[-2000:]
    assert told.items() <= yaml.safe_load(printed.out).items()


def test_every_recipe_has_its_folder():
    folders = {path.parent.name for path in RECIPES.glob("*/call.yaml")}
    assert folders == PIPELINES.keys()
