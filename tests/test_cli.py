"""Help answers at once, options and YAML files mean the same, and mistakes exit with code 2."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from source_files import PACKAGE, source_files

import foreseer
from foreseer import cli

HELP = """
import sys, time
from foreseer.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "lightning", "diffusers", "transformers", "datasets", "numpy"}
    print("loaded", sorted(heavy & set(sys.modules)), file=sys.stderr)
    print("seconds", time.process_time(), file=sys.stderr)
"""
CALLS = []
MANY = 7  # arguments, as of a command that is declared once
ROOM_FUNCTIONS = [
    (path, node)
    for path in source_files()
    if "/" in path
    for node in ast.walk(ast.parse((PACKAGE / path).read_text()))
    if isinstance(node, ast.FunctionDef)
]


def fake_command(source: str, count: int = 3, names: Sequence[str] = ("a", "b")) -> None:
    """Note a call.

    Args:
        source: where from.
        count: how many.
        names: which ones.
    """
    CALLS.append((source, count, list(names)))


@pytest.fixture
def calls():
    CALLS.clear()
    return CALLS


def exit_code(words: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    return stop.value.code


@pytest.mark.parametrize(
    "words", [["--help"], *([*name.split(), "--help"] for name in cli.FUNCTIONS)]
)
def test_help_takes_under_a_second_and_loads_no_torch(words, tmp_path):
    command = [sys.executable, "-c", HELP, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: foreseer")
    loaded, seconds = done.stderr.strip().splitlines()[-2:]
    assert loaded == "loaded []"
    assert float(seconds.split()[1]) < 1.0  # processor time of the whole process


@pytest.mark.parametrize("name", cli.FUNCTIONS)
def test_every_option_of_a_command_is_explained(name, capsys):
    assert exit_code([*name.split(), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    explained = (
        str(cli.FUNCTIONS[name].__doc__).split("Args:")[1].split("Returns:")[0].strip().splitlines()
    )
    for line in explained:
        assert " ".join(line.split(":", 1)[-1].split()) in text


@pytest.mark.parametrize("name", cli.FUNCTIONS)
def test_the_arguments_of_a_command_are_declared_once(name):
    """A room's function that takes more than half of many is the same declaration again."""
    given = {*inspect.signature(cli.FUNCTIONS[name]).parameters}
    if len(given) < MANY:
        return
    for path, node in ROOM_FUNCTIONS:
        each = node.args
        taken = {a.arg for a in [*each.args, *each.kwonlyargs, each.kwarg or each.vararg] if a}
        assert 2 * len(given & taken) <= len(given), f"{path}: {node.name}"


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "foreseer", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0] == f"foreseer {foreseer.__version__}"


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_a_reader_that_leaves_early_sees_no_traceback(word):
    code = f"import sys; sys.stdin.read(); from foreseer.cli import main; main([{word!r}])"
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout
    program.stdout.close()
    assert program.communicate(timeout=60)[1] == b""
    assert program.returncode == 1


@pytest.mark.parametrize("words", [["recrod"], [], ["--config"], ["distil", "fit"]])
def test_an_unknown_word_exits_with_code_2_and_the_commands(words, capsys):
    assert exit_code(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for name in (*cli.TRAINER_WORDS, *cli.FUNCTIONS):
        assert f"\n  {name} " in printed.err
    assert printed.err.strip().endswith("name one of the commands above.")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--source", "s", "--cuont", "4"], "cuont"),
        (["--source", "s", "--count", "many"], "count"),
        (["--count", "4"], "source"),
    ],
)
def test_a_wrong_option_exits_with_code_2_and_is_named(words, named, calls, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run_function(fake_command, words)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.split("error:")[1]
    assert calls == []


def test_a_yaml_file_sets_options_and_later_words_win(calls, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("source: here\ncount: 5\nnames: [x]\n")
    cli.run_function(fake_command, ["--config", str(config)])
    cli.run_function(fake_command, ["--config", str(config), "--count", "6", "--names+", "y"])
    assert calls == [("here", 5, ["x"]), ("here", 6, ["x", "y"])]


def test_a_misspelled_key_in_a_yaml_file_is_refused_by_name(calls, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("source: here\ncuont: 5\n")
    with pytest.raises(SystemExit) as stop:
        cli.run_function(fake_command, ["--config", str(config)])
    assert (stop.value.code, calls) == (2, [])
    assert "cuont" in capsys.readouterr().err


def test_print_config_prints_a_yaml_file_that_gives_the_same_run(calls, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.run_function(fake_command, ["--source", "s", "--count", "7", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"source": "s", "count": 7, "names": ["a", "b"]}
    config = tmp_path / "config.yaml"
    config.write_text(printed)
    cli.run_function(fake_command, ["--config", str(config)])
    assert calls == [("s", 7, ["a", "b"])]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("record --taps output,hidden", {"taps": ["output", "hidden"]}),
        ("record --taps=attn --states false", {"taps": ["attn"], "states": False}),
        ("record --taps [a] --taps+ b --prompts a,b", {"taps": ["a", "b"], "prompts": "a,b"}),
        ("fit --recording r --anchors 0,3 --evaluations 8", {"anchors": [0, 3], "evaluations": 8}),
        ("fit --recording r --evaluations=6,8", {"evaluations": [6, 8]}),
        ("bench --budgets 8 --methods null", {"budgets": [8], "methods": None}),
        ("verify --repair runs/a", {"repair": True, "recording": "runs/a"}),
        ("verify runs/a --repair", {"repair": True, "recording": "runs/a"}),
        ("demo --all FALSE", {"all": False}),
    ],
)
def test_lists_need_no_brackets_and_flags_no_value(line, expected, capsys):
    needed = {"record": "--pipeline p --out o", "bench": "--pipeline p --out o"}
    words = f"{line} {needed.get(line.split()[0], '')} --print_config".split()
    assert exit_code(words) == 0
    assert yaml.safe_load(capsys.readouterr().out).items() >= expected.items()


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_a_recording_needs_no_option_name(name, capsys):
    assert exit_code([name, "runs/recording", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["recording"] == "runs/recording"


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_a_word_on_pipelines_has_options_and_help_of_its_own(name, capsys):
    assert exit_code([name, "--pipeline", "DIR", "--print_config"]) == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert options["pipeline"] == "DIR" and "settings" in options and "recording" not in options
    assert exit_code([name, "--pipeline", "--help"]) == 0
    assert "--settings" in capsys.readouterr().out
    assert exit_code([name, "--help"]) == 0
    assert "--pipeline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["fit", "--config", "readout", "--help"], "foreseer [options] fit"),
        (["validate", "--help"], "foreseer [options] validate"),
    ],
)
def test_trainer_words_go_to_lightning_without_a_warning(
    words, program, capsys, recwarn, monkeypatch
):
    before = ["foreseer", "something", "else"]
    monkeypatch.setattr(sys, "argv", before)
    assert exit_code(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {program}")
    assert "--trainer.max_epochs" in out
    assert not [warning for warning in recwarn if "sys.argv" in str(warning.message)]
    assert sys.argv is before


def test_a_shipped_configuration_is_found_by_its_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = Path(cli.__file__).parent / "configs/fit"
    assert cli.packaged("fit", ["--config", "l2p_lstsq"]) == [
        "--config",
        str(shipped / "l2p_lstsq.yaml"),
    ]
    assert cli.packaged("fit", ["--config=readout"]) == [f"--config={shipped}/readout.yaml"]
    assert cli.packaged("fit", ["--config", "none_such"]) == ["--config", "none_such"]
    assert cli.packaged("record", ["--config", "l2p_lstsq"]) == ["--config", "l2p_lstsq"]
    (tmp_path / "readout").write_text("")
    assert cli.packaged("fit", ["--config", "readout"]) == ["--config", "readout"]


def test_recording_and_tap_of_a_fit_are_given_once(tmp_path):
    shipped = Path(cli.__file__).parent / "configs/fit"
    words = ["fit", "--config", str(shipped / "l2p_bands.yaml"), "--model.init_args.tap=output"]
    words += ["--model.init_args.recording", "runs/mine"]
    more = ["--data.init_args.folder", "runs/mine", "--data.init_args.tap", "output/bands"]
    assert cli.linked(words) == words + more
    assert cli.linked([*words, *more]) == [*words, *more]
    readout = ["fit", "--config", str(shipped / "readout.yaml")]
    assert cli.linked([*readout, "--model.init_args.anchors", "[0]"])[3:] == [
        "--model.init_args.anchors",
        "[0]",
    ]


def test_a_fit_without_a_configuration_is_that_of_a_readout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--data.seed", "1"]
    words = cli.packaged("fit", more)
    assert words[0] == "--config" and words[1].endswith("configs/fit/readout.yaml")
    assert words[2:] == more and "fitting a readout" in capsys.readouterr().out
    for own in (["--model", "A"], ["--model=A"], ["--config=a.yaml"], ["--help"]):
        assert cli.packaged("fit", own) == own
