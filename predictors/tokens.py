"""Which tokens of a forecast are computed afresh, and what the other tokens learn from them.

A policy picks tokens, the host computes their features, and `innovate` corrects the forecast. It
never touches the history, so it composes with every forecaster.

Shapes: B samples, N tokens, D channels, K clusters, n selected tokens. All guidance branches of a
sample share its clusters and picks; a batch that holds them all is (branches * B, N, D).
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.predictors.base import Grid

ITERATIONS = 10  # Lloyd iterations at an anchor; ClusCa's release uses 10 on FLUX


def kmeans(
    points: Float[Tensor, "B N C"],
    num_clusters: int,
    iterations: int = ITERATIONS,
    start: Float[Tensor, "B K C"] | None = None,
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B K C"]]:
    """Lloyd's algorithm on every sample, in float32, without randomness.

    Distances are Euclidean: the mean is then the best centre and no iteration can get worse. An
    empty cluster is moved to the point farthest from its own centre. It can stay empty only where
    there are fewer different points than clusters.

    Args:
        points: what to cluster.
        num_clusters: K, at most N.
        iterations: upper limit; it stops when no label changes.
        start: centroids to start from; None starts at points far from each other.

    Returns:
        The cluster of every point, and the centroids.

    Raises:
        ValueError: there are more clusters than points, or `iterations` is below 1.
    """
    if not 1 <= num_clusters <= points.shape[1] or iterations < 1:
        raise ValueError(
            f"{num_clusters} clusters of {points.shape[1]} tokens in {iterations} iterations: "
            f"expected 1 to {points.shape[1]} clusters and at least one iteration."
        )
    points = points.float()
    middle = points.mean(1, keepdim=True)  # near the origin the distances below cancel less
    points = points - middle
    centroids = _far_apart(points, num_clusters) if start is None else start.float() - middle
    labels = _nearest(points, centroids)
    for _ in range(iterations):
        centroids = _means(points, labels, centroids)
        earlier, labels = labels, _nearest(points, centroids)
        if torch.equal(labels, earlier):
            break
    return labels, centroids + middle


def _nearest(
    points: Float[Tensor, "B N C"], centroids: Float[Tensor, "B K C"]
) -> Int[Tensor, "B N"]:
    """argmin_k |x - c_k|^2 = argmin_k |c_k|^2 - 2 x c_k."""
    return (centroids.square().sum(-1)[:, None] - 2 * points @ centroids.mT).argmin(-1)


def _means(
    points: Float[Tensor, "B N C"], labels: Int[Tensor, "B N"], centroids: Float[Tensor, "B K C"]
) -> Float[Tensor, "B K C"]:
    """Mean of every cluster; the e-th empty one goes to the e-th worst represented point."""
    num_clusters = centroids.shape[1]
    member = torch.nn.functional.one_hot(labels, num_clusters).to(points.dtype)  # (B, N, K)
    counts = member.sum(1)
    means = (member.mT @ points) / counts.clamp(min=1)[..., None]
    empty = counts == 0
    error = (points - take(means, labels)).square().sum(-1)
    worst = error.topk(num_clusters, dim=1).indices  # (B, K)
    place = (empty.cumsum(1) - 1).clamp(min=0)
    return torch.where(empty[..., None], take(points, worst.gather(1, place)), means)


def _far_apart(points: Float[Tensor, "B N C"], num_clusters: int) -> Float[Tensor, "B K C"]:
    """Farthest-first traversal, from the point farthest from the mean (Gonzalez 1985)."""
    distance = points.square().sum(-1)
    chosen = [take(points, distance.argmax(1, keepdim=True))]
    distance = torch.full_like(distance, torch.inf)
    for _ in range(num_clusters - 1):
        distance = torch.minimum(distance, (points - chosen[-1]).square().sum(-1))
        chosen.append(take(points, distance.argmax(1, keepdim=True)))
    return torch.cat(chosen, 1)


def take(rows: Float[Tensor, "B N D"], selected: Int[Tensor, "B n"]) -> Float[Tensor, "B n D"]:
    """The selected rows of every sample."""
    return (
        rows.flatten(0, 1)
        .index_select(0, flat_index(selected, rows.shape[1]))
        .view(*selected.shape, rows.shape[2])
    )


def flat_index(selected: Int[Tensor, "B n"], num_tokens: int) -> Int[Tensor, " Bn"]:
    """Positions of the selected rows once batch and tokens are one axis."""
    start = torch.arange(len(selected), device=selected.device)[:, None] * num_tokens
    return (selected + start).flatten()


def innovate(
    forecast: Float[Tensor, "B N D"],
    fresh: Float[Tensor, "B n D"],
    selected: Int[Tensor, "B n"],
    labels: Int[Tensor, "B N"] | None,
    gamma: float,
) -> Float[Tensor, "B N D"]:
    """Correct a forecast by what the computed tokens say about it.

    F[i] = fresh_i at the selected tokens; elsewhere, with c the cluster of i,
    F[i] = F_hat[i] + gamma * mean over the selected s in c of (fresh_s - F_hat[s]).
    ClusCa (arXiv 2509.10312) moves the *cached* values toward the fresh mean instead; this form
    keeps the forecast's own differences between tokens and leaves the history alone.

    Args:
        forecast: F_hat of all tokens.
        fresh: features of the selected tokens.
        selected: their positions, no doubles within a sample.
        labels: cluster of every token; None when gamma is 0.
        gamma: share of the innovation that the rest of a cluster takes, 0 to 1.
    """
    moved = forecast
    if gamma and labels is not None:
        innovation = fresh.float() - take(forecast, selected).float()
        same = labels[:, :, None] == labels.gather(1, selected)[:, None, :]  # (B, N, n)
        weights = same / same.sum(-1, keepdim=True).clamp(min=1)
        moved = (forecast.float() + gamma * (weights @ innovation)).to(forecast.dtype)
    num_tokens = forecast.shape[1]
    flat = moved.flatten(0, 1).index_copy(
        0, flat_index(selected, num_tokens), fresh.flatten(0, 1).to(forecast.dtype)
    )
    return flat.view_as(forecast)


class TokenPolicy:
    """Which tokens of which forecast steps are computed.

    Args:
        seed: of the random picks; sample, step and seed fix a pick, so that guidance branches
            share it.
        pattern: whether the 1st, 2nd, ... step after an anchor computes tokens; repeats.

    Attributes:
        group_names: names of the token groups that it goes by; none of most policies.
        wants_grid: whether it is told how the tokens lie in the picture: `lay_out`.

    Raises:
        ValueError: the pattern is empty.
    """

    group_names: tuple[str, ...] = ()
    wants_grid: bool = False

    def __init__(self, seed: int, pattern: Sequence[bool]) -> None:
        if not pattern:
            raise ValueError("pattern is empty; (True,) computes tokens at every forecast step.")
        self.seed = seed
        self.pattern = tuple(pattern)
        self.reset()

    def reset(self) -> None:
        """Forget the last run."""
        self.num_samples, self.num_tokens = 0, 0
        self.device = torch.device("cpu")

    def prepare(
        self, groups: Int[Tensor, "B N"] | None, anchors: Collection[int], num_steps: int
    ) -> None:
        """A run's first anchor is over: take what is known of all of it.

        Args:
            groups: group number of every token of the stream; None where the run has none.
            anchors: steps at which the network runs.
            num_steps: steps of the run.
        """

    def lay_out(self, grid: Grid) -> None:
        """Take the grid of a run's tokens, at its first anchor; asked if `wants_grid`."""

    def is_partial(self, offset: int) -> bool:
        """Whether the step `offset` (>= 1) after the newest anchor computes tokens."""
        return self.pattern[(offset - 1) % len(self.pattern)]

    def observe(self, features: Float[Tensor, "B N C"]) -> None:
        """Look at an anchor: all guidance branches of a token side by side in its channels."""
        self.num_samples, self.num_tokens = features.shape[:2]
        self.device = features.device

    def select(self, step_index: int) -> Int[Tensor, "B n"]:
        """The tokens to compute at a step, in rising order."""
        raise NotImplementedError

    def merge(
        self,
        forecast: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
        branches: tuple[int, ...] = (0,),
    ) -> Float[Tensor, "M N D"]:
        """The corrected forecast of one or more branches, M = branches * B."""
        return innovate(forecast, fresh, selected, None, 0.0)

    def state_bytes(self) -> int:
        """Bytes kept between steps."""
        return 0

    def most_bytes(self, to_come: int) -> int:
        """The same at most, with so many anchors to come."""
        return self.state_bytes()

    def _scores(self, step_index: int) -> Float[Tensor, "B N"]:
        """Random numbers in [0, 1), the same on every device."""
        generator = torch.Generator().manual_seed(100_003 * self.seed + step_index)
        shape = (self.num_samples, self.num_tokens)
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(self.device)


class RandomPolicy(TokenPolicy):
    """Random tokens at every other forecast step: DuCa (arXiv 2412.18911) with its random choice.

    The steps at odd offset from the anchor compute tokens, those at even offset are pure forecasts.
    No other token is corrected.

    Args:
        num_tokens: tokens per sample.
        seed: see the base class.
        pattern: see the base class.

    Raises:
        ValueError: `num_tokens` is below 1.
    """

    def __init__(
        self, num_tokens: int = 16, seed: int = 0, pattern: Sequence[bool] = (True, False)
    ) -> None:
        super().__init__(seed, pattern)
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}, expected at least 1.")
        self.num_selected = num_tokens

    def select(self, step_index: int) -> Int[Tensor, "B n"]:
        """A random subset."""
        scores = self._scores(step_index)
        return scores.topk(min(self.num_selected, self.num_tokens)).indices.sort().values


class ClusterPolicy(TokenPolicy):
    """One random token of every cluster, whose innovation moves its cluster a little: ClusCa.

    Source: arXiv 2509.10312, with the correction of `innovate`. Clusters are found at anchors,
    started from those of the anchor before.

    Args:
        num_clusters: tokens computed per sample; an empty cluster's place goes to another token.
        gamma: share of the innovation, 0 to 1.
        seed: see the base class.
        pattern: see the base class.

    Raises:
        ValueError: `num_clusters` is below 1 or gamma out of range.
    """

    def __init__(
        self,
        num_clusters: int = 16,
        gamma: float = 0.005,
        seed: int = 0,
        pattern: Sequence[bool] = (True,),
    ) -> None:
        super().__init__(seed, pattern)
        if num_clusters < 1 or not 0 <= gamma <= 1:
            raise ValueError(
                f"num_clusters is {num_clusters} and gamma {gamma}, expected at least 1 and 0 to 1."
            )
        self.num_clusters = num_clusters
        self.gamma = gamma

    def reset(self) -> None:
        """Forget the clusters."""
        super().reset()
        self.labels: Tensor | None = None
        self.centroids: Tensor | None = None

    def observe(self, features: Float[Tensor, "B N C"]) -> None:
        """Cluster the tokens, warm from the centroids before where there are as many channels."""
        super().observe(features)
        start = self.centroids
        if start is not None and start.shape[::2] != features.shape[::2]:
            start = None
        self.labels, self.centroids = kmeans(features, self.num_clusters, ITERATIONS, start)

    def select(self, step_index: int) -> Int[Tensor, "B n"]:
        """The best scored token of every cluster, then the best of all others for empty ones."""
        assert self.labels is not None  # an anchor comes first
        scores = self._scores(step_index)
        member = torch.nn.functional.one_hot(self.labels, self.num_clusters).bool()
        best = scores[..., None].where(member, -1.0).amax(1)  # (B, K)
        wins = scores == best.gather(1, self.labels)
        return (scores + wins).topk(self.num_clusters).indices.sort().values

    def merge(
        self,
        forecast: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
        branches: tuple[int, ...] = (0,),
    ) -> Float[Tensor, "M N D"]:
        """`innovate` with this policy's clusters and gamma."""
        assert self.labels is not None  # an anchor comes first
        labels = self.labels.repeat(len(forecast) // len(self.labels), 1)
        return innovate(forecast, fresh, selected, labels, self.gamma)

    def state_bytes(self) -> int:
        """Bytes of labels and centroids."""
        kept = [t for t in (self.labels, self.centroids) if t is not None]
        return sum(t.numel() * t.element_size() for t in kept)
