"""Tables and pictures of docs/text_to_video.md from what has been measured.

python benchmarks/video_page.py [--pictures]

Reads benchmarks/results/video.json and video_students.json, where they are there, and what the
model's folder says of its training and its judge. With `--pictures` also the sheet and the animated
clips, where benchmarks/video.py has kept its samples.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readout_page import budgets, every_table, place, put, table

RESULTS, PAGE, IMAGES = (
    Path("benchmarks/results"),
    Path("docs/text_to_video.md"),
    Path("docs/images"),
)
MODEL = Path("checkpoints/zoo/emoji_wan")
SHOWN, COLUMNS = (3, 11, 20, 34, 41, 47), 9
"""Judged videos on the sheet, and frames of each."""
ENLARGED, FRAME_MS = 2, 120
PUBLISHED = 11.8  # times faster, of DisCa with Restricted MeanFlow on HunyuanVideo


def page() -> None:
    """Write every table there is something for."""
    put(PAGE, "video_model", model_table())
    measured, students = RESULTS / "video.json", RESULTS / "video_students.json"
    if measured.exists():
        rows = json.loads(measured.read_text())
        host = rows[0]["host"]
        tables = [verdict(rows), table(rows, host), over_time(rows), every_table(rows, host)]
        put(PAGE, "video", "\n\n".join(tables))
    if students.exists():
        put(PAGE, "video_students", students_table(json.loads(students.read_text())))


def model_table() -> str:
    """Whether videos show their prompts and move, and what it took."""
    training = json.loads((MODEL / "training.json").read_text())
    judge = json.loads((MODEL / "judge.json").read_text())
    lines = [
        f"{training['parameters'] / 1e6:.1f} million parameters, {training['steps']:,} updates, "
        f"{training['samples_seen']:,} captions, {training['minutes'] / 60:.1f} hours on one core.",
        "",
        "| captions | nearest real clip shares a word | chance | real clips | motion | of real |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in judge["splits"].items():
        shares = (f"{100 * row[key]:.1f} %" for key in ("shares_a_word", "chance", "real"))
        lines.append(
            f"| {row['count']} {name.replace('_', ' ')} | {' | '.join(shares)} | "
            f"{row['motion']:.1f} | {row['motion_real']:.1f} |"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What the best of what is learned here is worth beside the best of all else."""
    told = []
    for budget in budgets(rows, rows[0]["host"]):
        own = [row for row in rows if row["num_anchors"] == budget]
        mine = next(row for row in own if row["method"] == "readout")
        rival = next(row for row in own if row["method"] == mine["rival"])
        ends = f"{mine['paired_low_db']:+.2f} to {mine['paired_high_db']:+.2f}"
        told.append(
            f"- {budget} evaluations of 50: the readout has {mine['psnr_db']:.2f} dB, "
            f"`{rival['method']}`, the best that is not ours, {rival['psnr_db']:.2f}: "
            f"{mine['paired_db']:+.2f} dB ({ends}), {wins(mine)}."
        )
    return "\n".join(told)


def wins(row: dict[str, Any]) -> str:
    """On how many videos a row is ahead."""
    return f"ahead on {row['wins']} of {row['num_samples']} videos"


def over_time(rows: Sequence[dict[str, Any]]) -> str:
    """The error of the changes from frame to frame."""
    host = rows[0]["host"]
    counts = budgets(rows, host)
    lines = [
        "Changes from frame to frame, as a PSNR in dB against those of the full run; in brackets "
        "minus the rival of the table above, with the 95 % interval.",
        "",
        f"| method | {' | '.join(f'{count} evaluations' for count in counts)} |",
        f"|{' --- |' * (len(counts) + 1)}",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {place(row): row for row in rows if row["method"] == method}
        cells = [change(mine[host, n]) if (host, n) in mine else "" for n in counts]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def change(row: dict[str, Any]) -> str:
    """One method's temporal difference error."""
    told = f"{row['temporal_db']:.2f}"
    if row["temporal_paired_db"] is None:
        return told
    ends = f"{row['temporal_paired_low_db']:+.2f} to {row['temporal_paired_high_db']:+.2f}"
    return f"{told} ({row['temporal_paired_db']:+.2f}, {ends})"


def students_table(found: dict[str, Any]) -> str:
    """Everything end to end against the guided teacher."""
    judge = found["judge"]
    lines = [
        *(f"- {line}" for line in headline(found["rows"], found["share_aside"])),
        "",
        f"{judge['num_samples']} videos of captions kept from training; chance "
        f"{100 * judge['chance']:.1f} %, the real clips themselves {100 * judge['real']:.1f} %. In "
        "brackets: minus the teacher's 50 guided steps on the same captions, with the 95 % "
        "interval. Times faster: as a caller has it, and of the sampling alone, without the "
        f"{100 * found['share_aside']:.1f} % of a full run in which words are encoded and latents "
        "decoded.",
        "",
        "| host | method | full steps | evaluations | times faster | sampling alone | shares a "
        "word | motion | PSNR to the teacher, dB |",
        "|" + " --- |" * 9,
    ]
    for row in sorted(found["rows"], key=lambda row: -row["num_network_evaluations"]):
        share, gap = row["shares_a_word"], row["minus_teacher"]
        hits = f"{100 * share[0]:.1f} % ({100 * gap[0]:+.1f}, {100 * gap[1]:+.1f} to "
        hits += f"{100 * gap[2]:+.1f})"
        near = "" if row["psnr_db"] is None else "{:.2f} ({:.1f} to {:.1f})".format(*row["psnr_db"])
        lines.append(
            f"| {row['host']} | `{row['method']}` | {row['num_anchors']} | "
            f"{row['num_network_evaluations']} | {row['speedup_measured']:.2f} | "
            f"{sampling(row, found['share_aside']):.2f} | {hits} | "
            f"{row['motion']:.1f} | {near} |"
        )
    return "\n".join(lines)


def sampling(row: dict[str, Any], share: float) -> float:
    """Times faster without what no method shortens, a share of the full run."""
    return float((1 - share) / (1 / row["speedup_measured"] - share))


def headline(rows: Sequence[dict[str, Any]], share: float) -> list[str]:
    """Of what samples as many times faster as published, the nearest to the teacher."""
    told = []
    for host in ("teacher", "student"):
        own = [row for row in rows if row["host"] == host]
        fast = [row for row in own if sampling(row, share) >= PUBLISHED]
        if not fast:
            most = max((sampling(row, share) for row in own), default=0.0)
            told.append(
                f"On the {host} nothing samples {PUBLISHED} times faster; the most is {most:.1f}."
            )
            continue
        best = max(fast, key=lambda row: row["psnr_db"][0])
        hits, gap = best["shares_a_word"], best["minus_teacher"]
        spent = best["num_network_evaluations"]
        told.append(
            f"Sampling at least {PUBLISHED} times faster, nearest to the full run on the {host}: "
            f"`{best['method']}` with {spent} evaluations instead of 100, "
            f"{sampling(best, share):.1f} times faster ({best['speedup_measured']:.1f} with words "
            f"and decoding), {best['psnr_db'][0]:.2f} dB; {100 * hits[0]:.1f} % share a word, "
            f"{100 * gap[0]:+.1f} ({100 * gap[1]:+.1f} to {100 * gap[2]:+.1f}) to the full run."
        )
    return told


def pictures(root: str, budget: int = 8) -> None:
    """Full runs over the readout's and the best rival's, as a strip of frames and in motion."""
    import torch
    import video
    from PIL import Image

    rows = json.loads((RESULTS / "video.json").read_text())
    own = {row["method"]: row for row in rows if row["num_anchors"] == budget}
    rival = own["readout"]["rival"]
    judged = video.Judged(video.PIPELINE, root, own["readout"]["num_samples"])
    entries = [e for e in video.planned(root, budget) if e.method in ("readout", rival)]
    ours = next(e for e in entries if e.method == "readout")
    theirs = max(
        (e for e in entries if e.method == rival),
        key=lambda e: float(video.frame_psnr(judged.drawn(e).images, judged.full.images).mean()),
    )
    shown = [judged.full, judged.drawn(ours), judged.drawn(theirs)]
    clips = torch.stack([each.images[list(SHOWN)] for each in shown], 1)  # (n, 3, F, C, H, W)
    places = torch.linspace(0, clips.shape[2] - 1, COLUMNS).round().long()
    sheet = clips[:3, :, places].permute(3, 0, 1, 4, 2, 5).flatten(4, 5).flatten(1, 3)

    def image(pixels: Any) -> Any:
        values = (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        found = Image.fromarray(values)
        return found.resize((ENLARGED * found.width, ENLARGED * found.height), 0)

    image(sheet).save(IMAGES / "video.png")
    moving = clips.permute(2, 3, 1, 4, 0, 5).flatten(4, 5).flatten(2, 3)
    first, *others = [image(frame) for frame in moving]
    first.save(
        IMAGES / "video.webp",
        save_all=True,
        append_images=others,
        duration=FRAME_MS,
        loop=0,
        lossless=True,
    )


if __name__ == "__main__":
    page()
    if "--pictures" in sys.argv:
        pictures("runs/video")
