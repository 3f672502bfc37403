"""Every command and Python block of the pages runs, or is parsed for a reason written down.

tests/doc_runs.py lists what runs on what, and what is parsed only and why. The README's Python is
run by tests/test_readme.py.
"""

import contextlib
import functools
import inspect
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doc_pages import ROOT, Block, all_blocks, blocks_of, inline_commands
from doc_runs import (
    ELSEWHERE,
    LONG,
    MORE,
    PARSED,
    SWAPS,
    WORLDS,
    reason_to_parse,
    words_to_parse,
    words_to_run,
)
from nightly import nightly
from source_files import PACKAGE
from student_cases import student_pipeline
from tiny_pipelines import tiny_pipeline

from foreseer.cli import FUNCTIONS, TRAINER_WORDS, main

if not (ROOT / "docs").exists():
    pytest.skip("the pages are not beside the tests of an installed wheel", allow_module_level=True)

BLOCKS = all_blocks()
COMMANDS = [
    (block, line) for block in BLOCKS if block.kind == "commands" for line in block.commands()
]
OF_README = "README.md"  # its Python is run by test_readme.py
PYTHON = [
    block
    for block in BLOCKS
    if block.kind == "python" and block.page not in (OF_README, *ELSEWHERE)
]
PLACED = {page: world for world, listed in WORLDS.items() for page in listed}
RUN_PAGES = [page for listed in WORLDS.values() for page in listed]
BY_DEFAULT = [page for page in RUN_PAGES if page not in LONG]
Names = dict[str, Any]


# ---------------------------------------------------------------------------------- what is listed


def test_blocks_are_commands_python_or_text():
    assert {block.kind for block in BLOCKS} == {"commands", "python", "text"}
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(
    "text",
    [
        "```\nforeseer demo\n```",
        "```console\n$ foreseer demo\n```",
        "    foreseer demo\n    it prints this\n",
        "```bash\ncurl https://example.org | sh\n```",
    ],
)
def test_a_block_of_an_unknown_kind_is_refused(text):
    if text.startswith("```\n"):
        assert blocks_of("page.md", text)[0].kind == "commands"  # known by how its lines begin
        return
    with pytest.raises(ValueError, match=r"page.md, line 1: "):
        blocks_of("page.md", text)


def test_every_command_runs_or_has_a_reason_not_to():
    lost = [
        f"{block}: {command}"
        for block, command in COMMANDS
        if block.page not in PLACED and not reason_to_parse(command)
    ]
    assert not lost, "put the page into WORLDS or the command into PARSED of tests/doc_runs.py"


def test_the_lists_name_nothing_that_is_gone():
    commands = [command for _, command in COMMANDS]
    assert all(any(re.search(rule, command) for command in commands) for rule in PARSED)
    for world, listed in WORLDS.items():
        own = [command for block, command in COMMANDS if block.page in listed]
        assert all(any(command.startswith(start) for command in own) for start in MORE[world])
    assert set(PLACED) <= {block.page for block, _ in COMMANDS}
    for page, swaps in SWAPS.items():
        text = "\n".join(command for block, command in COMMANDS if block.page == page)
        assert all(placeholder in text for placeholder in swaps), page


# ------------------------------------------------------------------------------------ parsed only


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place with the configurations in it, and those that pages call their reader's."""
    provide(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide(folder: Path) -> None:
    (folder / "configs").symlink_to(PACKAGE / "configs")
    mine = "pipeline: tiny\nout: runs/record/mine\nnum_trajectories: 4\nnum_inference_steps: 4\n"
    for name in ("mine.yaml", "record.yaml"):
        (folder / name).write_text(mine)


@pytest.mark.parametrize(
    "command", sorted({command for _, command in COMMANDS if reason_to_parse(command)})
)
def test_a_command_that_is_not_run_is_parsed(command, folder, capsys, monkeypatch):
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z]+=", word)]
    if words[0] == "bash":
        assert (PACKAGE / words[1]).is_file() and (PACKAGE / words[1]).with_name(words[2]).is_dir()
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif words[0] == "npm":
        recipes = (ROOT / "examples/bundled_models").glob("*.py")
        assert any(words[-1] in path.read_text() for path in recipes)
    elif words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        found = re.search(r"\[([\w,]+)\]", words[-1])
        extras = found[1].split(",") if found else []
        assert set(extras) <= set(project["optional-dependencies"])
    elif words[:2] == ["python", "-m"]:
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:], "--print_config"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(words[2], run_name="__main__")
        assert not stop.value.code, capsys.readouterr().err
    elif words[0] == "python":
        compile((ROOT / words[1]).read_text(), words[1], "exec")
    else:
        with pytest.raises(SystemExit) as stop:
            main([*words_to_parse(command), "--print_config"])
        printed = capsys.readouterr()
        assert not stop.value.code, printed.err[-2000:]
        assert printed.out


@pytest.mark.parametrize(("page", "command"), inline_commands())
def test_a_command_in_running_text_exists(page, command):
    words = command.split()
    if words[0] == "python":
        assert (ROOT / words[1]).is_file() or words[1] == "-m"
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        return
    word = words[1]
    assert word in {*FUNCTIONS, *TRAINER_WORDS, "COMMAND"}, f"{page}: {command}"
    functions = [each for name, each in FUNCTIONS.items() if name.split()[0] == word]
    options = {name for each in functions for name in inspect.signature(each).parameters}
    given = {name.partition("=")[0][2:] for name in words[2:] if name.startswith("--")}
    if functions:
        assert given <= options | {"config", "help", "print_config"}, f"{page}: {command}"


# -------------------------------------------------------------------------------------------- run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a world, in which its pages run one after the other."""
    return functools.cache(lambda name: furnished(name, tmp_path_factory.mktemp(name)))


def furnished(name: str, folder: Path) -> Path:
    """A world with what its pages find in it."""
    provide(folder)
    with contextlib.chdir(folder):
        if name == "tiny":
            tiny_pipeline().save_pretrained("tiny")
            student_pipeline().save_pretrained("tiny_student")
            record_tiny()
        elif name == "bundled":
            record = ["record", "--pipeline", "zoo:fashion_dit", "--num_inference_steps", "10"]
            main([*record, "--out", "runs/short", "--num_trajectories", "4"])
        else:
            Path("prompts.txt").write_text("\n".join(f"a cat, number {i}" for i in range(50)))
    return folder


def record_tiny() -> None:
    """What pages of the world `tiny` find there: recordings and a predictor."""
    record = ["record", "--pipeline", "tiny", "--num_inference_steps"]
    config = ["--config", "configs/record/fashion_dit.yaml"]
    main(["record", *config, "--pipeline", "tiny", "--num_trajectories", "16"])
    main([*record, "4", "--out", "runs/record/mine", "--num_trajectories", "4"])
    for rank, out in enumerate(("machine-a/run", "machine-b/run", "memory://bucket/run")):
        share = ["--rank", str(rank), "--world", "3", "--num_trajectories", "6"]
        main([*record, "4", "--out", out, *share])
    main(["fit", "--config", "configs/fit/l2p_lstsq.yaml"])
    main(["export", "--checkpoint", "runs/fit/l2p_lstsq/last.ckpt", "--out", "runs/tiny_l2p"])
    shutil.copytree("runs/tiny_l2p", "runs/old/predictor")
    shutil.copytree("runs/record/mine", "runs/old/recording")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one name of the hub that pages run on stands for a tiny FLUX."""
    from test_readme import tiny_flux

    found = {"black-forest-labs/FLUX.1-dev": tiny_flux}
    stand_in = SimpleNamespace(from_pretrained=lambda name, **_: found[name]())
    monkeypatch.setattr("foreseer.integration.pipelines.load.DiffusionPipeline", stand_in)


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("page", nightly(RUN_PAGES, BY_DEFAULT))
def test_the_commands_of_a_page_run_as_printed(page, world, capsys):
    names = given_names(page)
    ran = 0
    with contextlib.chdir(world(PLACED[page])):
        for block in (block for block in BLOCKS if block.page == page):
            if block.kind == "python" and page != OF_README:
                exec(compile(block.text, str(block), "exec"), names)
            for command in block.commands() if block.kind == "commands" else []:
                if not reason_to_parse(command):
                    run(block, words_to_run(page, command), capsys)
                    ran += 1
    assert ran, "the page has no command that runs; take it out of WORLDS"


def run(block: Block, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command of ours in this process."""
    assert words[0] == "foreseer", f"{block}: {words}"
    try:
        main(words[1:])
    except SystemExit as stop:
        assert not stop.code, f"{block}: {shlex.join(words)}\n{capsys.readouterr().err[-3000:]}"


def given_names(page: str) -> Names:
    """What a page's Python takes for granted: its reader's pipeline and predictor."""
    if page not in NAMES:
        return {}
    from foreseer.checkpoints.format import load_predictor
    from foreseer.integration.pipelines.load import load_pipeline

    pipe = load_pipeline("zoo:fashion_dit")
    names: Names = {"pipe": pipe, "predictor": load_predictor("zoo:fashion_dit_l2p_any")}
    pipe.scheduler.set_timesteps(28)
    names["new_sigmas"] = [float(sigma) for sigma in pipe.scheduler.sigmas[:-1]]
    names["new_anchors"] = (0, 4, 8, 12, 16, 20, 24)
    return {name: names[name] for name in NAMES[page]}


NAMES = {
    "docs/continuous.md": ("predictor", "new_sigmas", "new_anchors"),
    "docs/schedules.md": ("pipe", "predictor"),
    "docs/teacache.md": ("pipe",),
    "docs/first_block.md": ("pipe",),
    "docs/speca.md": ("pipe",),
    "docs/tokens.md": ("pipe",),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON} - set(RUN_PAGES)))
def test_the_python_of_a_page_runs(page):
    names = given_names(page)
    for block in PYTHON:
        if block.page == page:
            exec(compile(block.text, str(block), "exec"), names)


@pytest.mark.slow
def test_the_quick_start_leaves_what_it_promises(world):
    found = world("bundled")
    if not (found / "quick.png").exists():
        pytest.skip("runs after the quick start's commands")
    for name in ("bundled.png", "quick.png", "runs/quick/config.json"):
        assert (found / name).is_file()
    assert (found / "runs/fit/l2p_lstsq/fit_report.png").is_file()
