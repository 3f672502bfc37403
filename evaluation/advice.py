"""What to use at every number of evaluations, in a sentence each that a user can act on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foreseer.checkpoints.standing import interval
from foreseer.evaluation.results import BenchRow, decibels

ENOUGH_DB = 30.0  # mean PSNR from which on the fewest evaluations are the overall choice
SAME_SPEED = 1.05  # times; closer than this two methods take equally long


@dataclass(frozen=True)
class Gap:
    """Our best row and the best of everything else, at equal evaluations and guidance."""

    learned: BenchRow
    other: BenchRow

    @property
    def psnr_db(self) -> float:
        """PSNR of the learned row minus that of the other; 0 when both are exact."""
        if self.learned.psnr_db == self.other.psnr_db:
            return 0.0
        return self.learned.psnr_db - self.other.psnr_db

    def sentence(self) -> str:
        """The gap in words."""
        return (
            f"Best learned minus best of everything else at {self.learned.num_anchors} evaluations:"
            f" {self.psnr_db:+.2f} dB ({self.learned.method} {decibels(self.learned.psnr_db)},"
            f" {self.other.method} {decibels(self.other.psnr_db)}; {compared(self.learned)})"
        )


def compared(row: BenchRow) -> str:
    """How a row stands to its rival, sample by sample."""
    low, high = row.paired_low_db, row.paired_high_db
    if row.standing is None or low is None or high is None:
        return "not paired"
    return f"{row.standing}, {interval(low, high)}, ahead on {row.wins} of {row.num_samples}"


def budget(row: BenchRow) -> tuple[float, int]:
    """What must be equal for two rows to be compared: guidance scale and evaluations."""
    return row.guidance_scale, row.num_anchors


def best_rows(rows: Iterable[BenchRow], *keys: str) -> list[BenchRow]:
    """The row with the highest mean PSNR of each group that agrees on `keys`.

    Groups never mix guidance scales or numbers of evaluations. The result is ordered by guidance
    scale, then evaluations (most first), then PSNR (best first). Full runs are left out.

    Args:
        rows: rows of one benchmark.
        keys: fields that tell groups apart, such as `method` and `tap`.
    """
    best: dict[tuple, BenchRow] = {}
    for row in rows:
        group = (*budget(row), *(getattr(row, key) for key in keys))
        if row.kind != "full" and (group not in best or row.psnr_db > best[group].psnr_db):
            best[group] = row
    return sorted(best.values(), key=lambda r: (r.guidance_scale, -r.num_anchors, -r.psnr_db))


def gaps(rows: Sequence[BenchRow]) -> list[Gap]:
    """One gap per guidance scale and number of evaluations at which both sides were measured."""
    learned = {budget(r): r for r in best_rows(r for r in rows if r.kind == "learned")}
    others = {budget(r): r for r in best_rows(r for r in rows if r.kind != "learned")}
    return [Gap(row, others[key]) for key, row in learned.items() if key in others]


def advice(rows: Sequence[BenchRow]) -> list[str]:
    """A sentence per guidance scale and number of evaluations, and one overall for several numbers.

    What is ahead of its rival by the paired interval is to be used; of two that are level the
    cheaper: that which is faster, or needs no fit. Overall the fewest evaluations with a mean PSNR
    of `ENOUGH_DB` against the full run.

    Args:
        rows: rows of one benchmark, full runs among them.
    """
    told = []
    for scale in sorted({row.guidance_scale for row in rows if row.kind != "full"}):
        here = [row for row in rows if row.guidance_scale == scale]
        picks = []
        full = next((row for row in here if row.kind == "full"), None)
        scales = len({row.guidance_scale for row in rows}) > 1
        where = f" and guidance {scale:g}" if scales else ""
        for count in sorted({row.num_anchors for row in here if row.kind != "full"}, reverse=True):
            pick, why = _chosen([row for row in here if row.num_anchors == count])
            picks.append(pick)
            told.append(
                f"at {count} evaluations{where} use {pick.method}: {_worth(pick, full)}; {why}."
            )
        if len(picks) > 1:
            told.append(_overall(picks, full, f" at guidance {scale:g}" if scales else ""))
    return told


def _chosen(rows: Sequence[BenchRow]) -> tuple[BenchRow, str]:
    """The row to use among those of a number of evaluations, and why."""
    best = best_rows(rows, "method")
    mine = next((row for row in best if row.kind == "learned"), best[0])
    rival = next((row for row in best if row.method == mine.rival), None)
    if rival is None:
        others = [row for row in best if row.method != mine.method]
        return best[0], "not paired with any other" if others else "nothing else was measured"
    low, high = mine.paired_low_db, mine.paired_high_db
    assert mine.paired_db is not None and low is not None and high is not None  # it has a rival
    if mine.standing == "level":
        pick, reason = _cheaper(mine, rival)
        other = rival if pick is mine else mine
        return pick, f"level with {other.method} ({interval(low, high)}), {reason}"
    if mine.standing == "ahead":
        pick, other, apart = mine, rival, (mine.paired_db, low, high)
    else:
        pick, other, apart = rival, mine, (-mine.paired_db, -high, -low)
    return pick, "{:.1f} dB ahead of {} (paired {:.1f} to {:.1f})".format(
        apart[0], other.method, *apart[1:]
    )


def _cheaper(mine: BenchRow, rival: BenchRow) -> tuple[BenchRow, str]:
    """The cheaper of two that are level, and what makes it so."""
    a, b = mine.seconds_per_image, rival.seconds_per_image
    if a and b and max(a, b) > SAME_SPEED * min(a, b):
        pick, other = (mine, rival) if a < b else (rival, mine)
        return (
            pick,
            f"and faster: {pick.seconds_per_image:.2f} s against {other.seconds_per_image:.2f}",
        )
    if rival.kind in ("solver", "formula") and mine.kind not in ("solver", "formula"):
        return rival, "and needs no fit"
    return (mine if mine.psnr_db >= rival.psnr_db else rival), "and as cheap"


def _worth(row: BenchRow, full: BenchRow | None) -> str:
    """PSNR, seconds, and times faster than the full run, as far as they were measured."""
    words = [f"{row.psnr_db:.1f} dB" if decibels(row.psnr_db) != "exact" else "exact"]
    seconds = row.seconds_per_image
    if seconds:
        words.append(f"{seconds:.2f} s per image")
        if full is not None and full.seconds_per_image:
            words.append(f"{full.seconds_per_image / seconds:.1f} x faster")
    return ", ".join(words)


def _overall(picks: Sequence[BenchRow], full: BenchRow | None, where: str) -> str:
    """The choice between several numbers of evaluations, most first."""
    enough = [row for row in picks if row.psnr_db >= ENOUGH_DB]
    if enough:
        row = enough[-1]
        return (
            f"overall{where} use {row.method} at {row.num_anchors} evaluations, the fewest with "
            f"{ENOUGH_DB:g} dB or more: {_worth(row, full)}."
        )
    row = max(picks, key=lambda row: row.psnr_db)
    return (
        f"overall{where} nothing reaches {ENOUGH_DB:g} dB; nearest is {row.method} at "
        f"{row.num_anchors} evaluations: {_worth(row, full)}."
    )
