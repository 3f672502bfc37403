"""`foreseer verify --pipeline` and `inspect --pipeline` find out what holds on a pipeline."""

import functools

import pytest
import torch
from checkpoint_cases import tiny_pipe
from families import FAMILIES, MORE, call
from safetensors.torch import save_file
from tiny_hosts import items, pipeline, settings, spec_for
from tiny_pipelines import tiny_pipeline

from foreseer.checkpoints.format import save_predictor
from foreseer.cli import main
from foreseer.evaluation.verify import Check, final_latents, table, verdict, verify_pipeline
from foreseer.integration.host.trunk import UnsupportedHost
from foreseer.integration.pipelines.load import DTYPE, load_pipeline
from foreseer.integration.pipelines.pipeline_call import (
    call_settings,
    first_samples,
    joined,
    samples,
)
from foreseer.predictors.linear import L2P
from foreseer.trajectories.inspect_pipeline import inspected
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recording import Recording


def checks_of(name, **changes):
    family = {**FAMILIES, **MORE}[name]
    pipe = family.build()
    return list(verify_pipeline(pipe, functools.partial(call, family, pipe, (0,), **changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Folder of a tiny class-to-image pipeline with random weights."""
    made = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(made)
    return str(made)


@pytest.mark.parametrize("name", ["flux_cfg", "wan22"])
def test_a_good_host_passes_every_check(name):
    checks = checks_of(name)
    assert not [check for check in checks if check.passed is False]
    names = [check.name for check in checks]
    for tap in ("output", "hidden"):
        for what in ("record", "replay", "memory", "abort", "cost"):
            assert f"{what} {tap}" in names
    assert {"repeatable", "detach", "after detach"} < set(names)
    assert verdict(checks) == "VERDICT: works, and is exact, on the taps 'output' and 'hidden'."
    assert len(table(checks).splitlines()) == len(checks)


def test_a_host_with_one_tap_says_so():
    assert "works on the tap 'output' only" in verdict(checks_of("latte"))


def test_a_host_without_taps_says_so():
    checks = checks_of("ltx2")
    assert "not supported" in verdict(checks)
    assert "sound beside the video" in table(checks)


def test_a_run_that_cannot_be_repeated_ends_the_checks():
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    seeds = iter(range(100))
    checks = list(verify_pipeline(pipe, lambda: call(family, pipe, (next(seeds),))))
    assert [check.passed for check in checks] == [False]
    assert "two plain runs differ" in verdict(checks)


def test_a_host_that_remembers_its_calls_is_found_out():
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *call: calls.append(1))
    forward = type(pipe.transformer).forward

    def tiring(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return (output[0] * (1 if len(calls) < 20 else 2),)

    pipe.transformer.forward = tiring.__get__(pipe.transformer)
    checks = list(verify_pipeline(pipe, functools.partial(call, family, pipe)))
    handle.remove()
    assert any(check.passed is False for check in checks)
    assert "VERDICT: works, and is exact" not in verdict(checks)


def test_a_pipeline_that_never_steps_is_refused():
    pipe = FAMILIES["flux"].build()
    with pytest.raises(UnsupportedHost, match="never called scheduler.step"):
        final_latents(pipe, lambda: None)


def test_verify_prints_a_table_a_verdict_and_the_predictor(folder, tmp_path, capsys):
    pipe = load_pipeline(folder)
    predictor = L2P(8, (0, 1, 4), 2)
    save_predictor(predictor, spec_for(pipe, guidance_scale=3.0), tmp_path / "p")
    main(["verify", "--pipeline", folder, "--predictor", str(tmp_path / "p"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "3 of 8 steps run on the tap output" in printed
    assert "replay hidden    ok" in printed
    assert printed.strip().endswith("on the taps 'output' and 'hidden'.")


def test_verify_exits_with_code_1_on_a_predictor_of_another_model(folder, tmp_path, capsys):
    other = tiny_pipe()
    save_predictor(L2P(8, (0, 1, 4), 2), spec_for(other), tmp_path / "p")
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--pipeline", folder, "--predictor", str(tmp_path / "p")])
    assert ended.value.code == 1
    assert "fitted on another host" in capsys.readouterr().out


def test_inspect_tells_what_a_pipeline_is_made_of(folder, capsys):
    main(["inspect", "--pipeline", folder, "--num_inference_steps", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "DiTTransformer2DModel" in printed and "2 branch(es) per step" in printed
    assert "trunk transformer_blocks, head norm_out" in printed
    assert printed.strip().endswith("SUPPORTED on the taps output, hidden, residual.")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wan22", "each of the 2 transformers its own"),
        ("zimage", "tokens are the picture's"),
        ("latte", "SUPPORTED on the taps output."),
        ("pixart", "not DisCa and distillation"),
    ],
)
def test_inspect_tells_the_limits_of_a_host(name, told):
    family = {**FAMILIES, **MORE}[name]
    pipe = family.build()
    lines, supported = inspected(pipe, Item(0, 0, family.inputs(0)), family.settings)
    assert supported and told in "\n".join(lines)


def test_inspect_says_why_a_host_is_not_supported():
    family = MORE["ltx2"]
    pipe = family.build()
    lines, supported = inspected(pipe, Item(0, 0, family.inputs(0)), family.settings)
    assert not supported and "sound beside the video" in "\n".join(lines)
    pipe.transformer = None
    lines, supported = inspected(pipe, Item(0, 0, family.inputs(0)), family.settings)
    assert not supported and "has no `transformer` or `unet` module" in lines[0]


def test_a_failed_check_of_no_tap_is_no_recommendation():
    checks = [Check("record output", True, ""), Check("detach", False, "left behind")]
    assert verdict(checks) == "VERDICT: do not use it yet: detach."


# ------------------------------------------------------------------------------- calls and items


def test_prompts_come_from_words_lines_or_rows_of_embeddings(tmp_path):
    pipe = pipeline("flux")
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    found = samples(pipe, str(tmp_path / "prompts.txt"))
    assert found == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    assert samples(pipe, "a cat") == [{"prompt": "a cat"}]
    rows = joined([item.inputs for item in items("flux", 3)])
    save_file(rows, tmp_path / "rows.safetensors")
    found = samples(pipe, str(tmp_path / "rows.safetensors"))
    assert len(found) == 3
    assert all(torch.equal(joined(found)[name], rows[name]) for name in rows)


def test_wrong_prompts_say_what_was_found_and_expected(tmp_path):
    flux, dit = pipeline("flux"), pipeline("dit")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"prompt_embeds": torch.ones(2, 3), "x": torch.ones(1)}, tmp_path / "x.safetensors")
    for wrong, match in [
        (str(tmp_path / "empty.txt"), "holds no prompt"),
        (str(tmp_path / "broken.safetensors"), "is no safetensors file"),
        (str(tmp_path / "x.safetensors"), r"unknown: \['x'\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            samples(flux, wrong)
    for missing in ("none.txt", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            samples(flux, str(tmp_path / missing))
    with pytest.raises(ValueError, match="takes no prompts"):
        samples(dit, "a cat")
    with pytest.raises(ValueError, match="draws from prompts"):
        samples(flux)
    assert first_samples(dit, None) == {"class_labels": 0}


def test_settings_a_pipeline_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"takes no \['hight'\]"):
        call_settings(pipeline("flux"), 4, None, {"hight": 32})
    assert call_settings(pipeline("dit"), 4)["guidance_scale"] == 3.0
    assert "guidance_scale" not in call_settings(pipeline("flux"), 4)


def test_a_text_pipeline_is_recorded_from_a_file_of_embeddings(tmp_path, monkeypatch, capsys):
    pipe = pipeline("flux")
    monkeypatch.setattr("foreseer.integration.pipelines.load.opened", lambda *arguments: pipe)
    save_file(joined([item.inputs for item in items("flux", 3)]), tmp_path / "rows.safetensors")
    size = {"height": 32, "width": 32}
    command = f"record --pipeline flux --out {tmp_path / 'r'} --num_trajectories 4 --batch_size 2"
    command += f" --prompts {tmp_path / 'rows.safetensors'} --num_inference_steps 4"
    main([*command.split(), "--settings", str(size)])
    recording = Recording(tmp_path / "r")
    assert recording.items == [0, 1, 2, 3]
    finals = recording.stack("final")
    given = {**settings("flux", 4), "output_type": "latent"}
    first = items("flux", 1)[0].inputs
    alone = pipe(**first, generator=torch.Generator().manual_seed(0), **given).images
    torch.testing.assert_close(finals[0], alone[0])  # batches of another size round differently


def test_a_pipeline_on_the_hub_is_found_by_its_name(folder, tmp_path, monkeypatch):
    seen, made = [], load_pipeline(folder)
    monkeypatch.setattr(
        "foreseer.integration.pipelines.load.DiffusionPipeline.from_pretrained",
        lambda name, **given: seen.append((name, given.pop(DTYPE), given)) or made,
    )
    load_pipeline("owner/name", torch.bfloat16)
    safely = {"use_safetensors": True, "trust_remote_code": False}
    assert seen == [("owner/name", torch.bfloat16, safely)]
    with pytest.raises(FileNotFoundError, match="no folder missing"):
        load_pipeline("missing")
