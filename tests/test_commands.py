"""Record resumes and refuses; inspect draws what was recorded; verify exits 1 on damage."""

import json

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from foreseer.cli import main
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pixel_pipeline import PixelDiTPipeline
from foreseer.trajectories.prompts import class_items, number_of_classes
from foreseer.trajectories.recipe import check_room, estimate
from foreseer.trajectories.recorder import place
from foreseer.trajectories.recording import Recording


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    """Folder of a tiny class-to-image pipeline with random weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def words(pipeline: str, out, **options) -> list[str]:
    options = {"num_trajectories": 4, "num_inference_steps": 4, "batch_size": 2} | options
    given = ["record", "--pipeline", pipeline, "--out", str(out)]
    return given + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def shards(folder) -> dict[int, str]:
    return {item: entry.xxh3 for item, entry in Recording(folder).entries.items()}


def test_record_says_what_it_will_need_and_what_it_wrote(pipeline, tmp_path, capsys):
    main(words(pipeline, tmp_path / "r"))
    first, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("0 of 4 trajectories are there; the other 4 need about")
    recording = Recording(tmp_path / "r")
    assert f"{tmp_path / 'r'}: 4 trajectories, " in last
    assert recording.header.taps == ["hidden", "output"]
    assert recording.header.num_branches == 2
    assert [recording.meta(item)["class_labels"] for item in recording.items] == [0, 1, 2, 0]


def test_two_ranks_and_a_resumed_run_record_what_one_process_records(pipeline, tmp_path, capsys):
    main(words(pipeline, tmp_path / "whole", batch_size=1))
    main(words(pipeline, tmp_path / "parts", batch_size=1, rank=1, world=2))
    assert Recording(tmp_path / "parts").items == [1, 3]
    main(words(pipeline, tmp_path / "parts", batch_size=1, rank=0, world=2))
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    capsys.readouterr()
    main(words(pipeline, tmp_path / "parts", batch_size=1))
    said = capsys.readouterr().out
    assert "4 of 4 trajectories are there; the other 0 need about 0 bytes" in said
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")


@pytest.mark.parametrize("features", ["none", "tokens", "full"])
@pytest.mark.parametrize("states", [True, False])
def test_the_estimate_counts_every_byte_of_the_tensors(pipeline, tmp_path, features, states):
    taps = '["blocks.*","hidden","output"]'
    options = {"features": features, "states": states, "taps": taps, "num_tokens": 2}
    main(words(pipeline, tmp_path / "r", num_trajectories=1, **options))
    stored = Recording(tmp_path / "r").load(0)
    names = ("blocks.*", "hidden", "output")
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4}
    item = class_items(1, 3)[0]
    found = estimate(load_pipeline(pipeline), item, names, features, 2, states, **settings)
    assert found.trajectory_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    if features == "full":
        assert found.full_bytes == sum(
            t.numel() * t.element_size() for n, t in stored.items() if n.startswith("feature/")
        )


def test_a_recording_that_does_not_fit_on_the_disk_is_not_begun(pipeline, tmp_path, monkeypatch):
    class Usage:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(SystemExit, match="100 bytes free, the recording needs about .* KiB"):
        main(words(pipeline, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_only_missing_trajectories_count_against_the_disk(pipeline, tmp_path, monkeypatch):
    main(words(pipeline, tmp_path / "r"))
    size = estimate(load_pipeline(pipeline), class_items(1, 3)[0], ["output"], "none", 0, True)

    class Usage:
        free = 2 * size.trajectory_bytes

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    check_room(tmp_path / "r", class_items(6, 3), 0, 1, size)
    with pytest.raises(OSError, match="record fewer trajectories"):
        check_room(tmp_path / "r", class_items(7, 3), 0, 1, size)


def test_the_place_of_a_process_is_given_launched_or_alone():
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert place(None, None, {}) == (0, 1)
    assert place(None, None, torchrun) == (1, 4)
    assert place(None, None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)
    assert place(2, 3, torchrun) == (2, 3)
    with pytest.raises(ValueError, match="rank is 3 and world 3"):
        place(3, 3, {})
    with pytest.raises(ValueError, match="give both or neither"):
        place(1, None, torchrun)


def test_an_array_s_tasks_multiply_what_runs_in_each():
    def array(task: int, first: int, last: int, count: int, **more: str) -> dict[str, str]:
        numbers = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
        return {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in numbers.items()} | more

    assert place(None, None, array(0, 0, 7, 8)) == (0, 8)
    assert place(None, None, array(7, 1, 7, 4)) == (3, 4)  # --array=1-7:2
    assert place(None, None, array(5, 5, 5, 1)) == (0, 1)
    srun = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert place(None, None, array(2, 0, 3, 4, **srun)) == (5, 8)
    assert place(0, 1, array(2, 0, 3, 4, **srun)) == (0, 1)
    found = {
        place(None, None, array(task, 0, 2, 3, RANK=str(rank), WORLD_SIZE="2"))
        for task in range(3)
        for rank in range(2)
    }
    assert found == {(rank, 6) for rank in range(6)}
    with pytest.raises(ValueError, match="3 tasks from 1 to 7, expected evenly spaced"):
        place(None, None, array(3, 1, 7, 3))


def test_writers_of_one_disk_are_warned_when_only_their_own_share_fits(
    pipeline, tmp_path, capsys, monkeypatch
):
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4}
    item = class_items(1, 3)[0]
    size = estimate(load_pipeline(pipeline), item, ["output"], "none", 0, True, **settings)

    class Usage:
        free = 2 * size.trajectory_bytes

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    check_room(tmp_path / "r", class_items(4, 3), 1, 2, size)
    assert "all 2 writers together need" in capsys.readouterr().out
    check_room(tmp_path / "r", class_items(2, 3), 1, 2, size)
    assert "together" not in capsys.readouterr().out
    check_room("memory://run", class_items(100, 3), 0, 1, size)
    assert "and are sent to memory://run one at a time" in capsys.readouterr().out


def test_a_rank_without_items_ends_well(pipeline, tmp_path, capsys):
    main(words(pipeline, tmp_path / "r", num_trajectories=2, rank=2, world=3))
    assert "rank 2 of 3 has nothing to record" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_a_pipeline_without_classes_is_sent_to_the_python_call(pipeline):
    class PromptPipeline(PixelDiTPipeline):
        def __call__(self, prompt):
            """Takes no class labels."""

    loaded = load_pipeline(pipeline)
    assert number_of_classes(loaded) == 3
    with pytest.raises(ValueError, match="PromptPipeline takes no class labels"):
        number_of_classes(PromptPipeline(loaded.transformer, loaded.scheduler))


def test_inspect_prints_the_facts_and_draws_the_layers(pipeline, tmp_path, capsys):
    options = {"taps": '["blocks.*","hidden"]', "features": "full", "states": False}
    main(words(pipeline, tmp_path / "r", **options))
    capsys.readouterr()
    main(["inspect", str(tmp_path / "r"), "--out", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    assert "DiTTransformer2DModel" in printed and "2 branch(es)" in printed
    lines = [line.split()[0] for line in printed.splitlines() if line.endswith(" of 3")]
    assert lines == ["blocks.0", "blocks.1", "hidden"]
    for name in ("unexplained.png", "layers_change.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_inspect_measures_a_feature_that_grows_by_a_tenth_each_step(tmp_path):
    from foreseer.evaluation.motion import motion

    feature = torch.randn(6, dtype=torch.float64)
    steps = torch.stack([1.1**t * feature for t in range(5)])
    found = motion((steps @ steps.T)[None, None])
    assert found.change[0].isnan() and found.fidelity[0].isnan()
    torch.testing.assert_close(found.change[1:], torch.full((4,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(found.cosine[1:], torch.ones(4, dtype=torch.float64))
    # The residual of an exact fit is the square root of float64 rounding, about 1e-8.
    torch.testing.assert_close(
        found.fidelity[1:], torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_verify_exits_with_code_1_when_a_bit_has_flipped(pipeline, tmp_path, capsys):
    main(words(pipeline, tmp_path / "r"))
    main(["verify", str(tmp_path / "r")])
    assert "0 of 4 trajectories damaged" in capsys.readouterr().out
    shard = (
        tmp_path
        / "r"
        / json.loads((tmp_path / "r" / "manifest.00000.jsonl").read_text().splitlines()[1])["file"]
    )
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path / "r")])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "(item 1)" in printed and "1 of 4 trajectories damaged" in printed
