"""Clusters of tokens, found by k-means on every sample, and the rows of selected tokens.

Shapes: B samples, N tokens, C channels, K clusters, n selected tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
