"""Past and gain of a token policy, by least squares on runs: what `TokenRows` holds.

At every step of the runs the true values are computed beside those that the policy gives, from the
same inputs; the runs go on with the latter, so that the second round meets its own history.

Shapes: M rows of a call, R rows of an attention, N tokens, n computed ones, k kept ones, u or p
others, D channels, S sampling steps.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.call import Call
from foreseer.integration.host.expert import Expert
from foreseer.integration.observers import Source
from foreseer.integration.pruning_runner import AttentionCall, PruningRunner
from foreseer.integration.runner import Answer, Runner
from foreseer.integration.session import Session
from foreseer.integration.token_runner import TokenRunner
from foreseer.predictors.base import LinearPredictor, Step
from foreseer.predictors.innovation import fitted_pair
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.linear import L2P
from foreseer.predictors.pruning_policy import Choice, PruningPolicy
from foreseer.predictors.token_rows import TokenRows
from foreseer.predictors.tokens import take
from foreseer.trajectories.prompts import Item, generate_batch

SHARES = (
    1.0,
    0.5,
    0.0,
)  # of the way from the forecasts alone to the fitted pairs, tried at the end


class PairSums:
    """Sums of the Grams of (true, forecast, near, forecast of near) by branch and step.

    Args:
        num_branches: guidance branches.
        num_steps: sampling steps.
    """

    def __init__(self, num_branches: int, num_steps: int) -> None:
        self.grams = torch.zeros(num_branches, num_steps, 4, 4, dtype=torch.float64)

    def add(self, step: Step, parts: Sequence[Float[Tensor, "M u D"]]) -> None:
        """Add a call's tokens.

        Args:
            step: of the call.
            parts: the four, of the rows of all its branches.
        """
        by_branch = [part.chunk(len(step.branches)) for part in parts]
        for place, branch in enumerate(step.branches):
            flat = torch.stack([part[place].flatten() for part in by_branch]).double()
            self.grams[branch, step.index] += (flat @ flat.mT).cpu()

    def solve(self, pairs: Float[Tensor, "branches S 2"]) -> None:
        """Set the pairs of all steps that were met."""
        for branch, step in self.grams[..., 0, 0].nonzero().tolist():
            pairs[branch, step] = fitted_pair(self.grams[branch, step])


class LatticeFit(TokenRunner):
    """Run the network beside every partial step and sum up what the policy has to go by.

    Args:
        sums: where to.
        arguments: see `TokenRunner`.
    """

    policy: LatticePolicy

    def __init__(self, sums: PairSums, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sums = sums
        self.truth: Tensor = torch.empty(0)

    def forecast(self, expert: Expert, call: Call, step: Step, source: Source) -> Answer:
        """The policy's answer, once the network has run."""
        answer = Runner.run(self, expert, call, step)
        assert answer.taps is not None  # it ran
        self.truth = answer.taps["hidden"]
        return super().forecast(expert, call, step, source)

    def merge(
        self,
        step: Step,
        feature: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
    ) -> Float[Tensor, "M N D"]:
        """The policy's answer, whose parts are added to the sums."""
        others = self.policy.others.to(feature.device)
        beside = self.policy.beside(feature, fresh, selected)
        self.sums.add(step, (self.truth[:, others], *beside))
        return super().merge(step, feature, fresh, selected)


class PruningFit(PruningRunner):
    """Ask every pruned attention about all tokens, too.

    Args:
        sums: where to.
        arguments: see `PruningRunner`.
    """

    def __init__(self, sums: PairSums, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sums = sums

    def recover(
        self,
        step: Step,
        call: AttentionCall,
        own: Float[Tensor, "R N C"] | None,
        fresh: Float[Tensor, "R k C"],
        choice: Choice,
    ) -> Float[Tensor, "R N C"]:
        """The policy's answer, whose parts are added to the sums."""
        assert own is not None  # its pairs are set
        _, truth = call(None)
        near = take(fresh, choice.partner)
        beside = self.policy.beside(own, near, choice)
        self.sums.add(step, (take(truth, choice.pruned), *beside))
        return super().recover(step, call, own, fresh, choice)


@torch.no_grad()
def fit_tokens(
    pipe: Any,
    rows: L2P,
    policy: LatticePolicy | PruningPolicy,
    items: Sequence[Item],
    attention_rule: LinearPredictor | None = None,
    choose_on: Sequence[Item] = (),
    rounds: int = 2,
    batch_size: int = 16,
    **call: Any,
) -> TokenRows:
    """Fit the past and gain of a policy on rows that were fitted before.

    (past, gain)_t = argmin sum |F_i - past F_hat_i - gain (near_i - past F_hat_near_i)|^2 over the
    tokens of step t that the policy does not compute, per branch, see `fitted_pair`. With a pruning
    policy F are attention outputs, summed over blocks. Least error of a step is not least error of
    the sample, so on other items the whole way from (1, 0) to the pairs, half of it and none are
    tried, and the one kept whose samples are nearest to full runs.

    Args:
        pipe: the pipeline.
        rows: fitted on its tap `hidden`, with their spec; their anchors are the steps that run. For
            pruning at every step, `fit_rows(recording, range(num_steps), "hidden")`.
        policy: which tokens are computed, or take part in attention.
        items: prompts and seeds to run.
        attention_rule: see `attach`; the deployed predictor needs the same.
        choose_on: other items, on which that is chosen; without any the pairs stay as fitted.
        rounds: runs of all items; each goes on with what the one before has fitted.
        batch_size: items of a call.
        call: of the pipeline, its number of steps among it.

    Raises:
        ValueError: the rows have no spec, are of another tap, of parts or of several transformers,
            or nothing is to be fitted.
    """
    spec = _checked(rows, items, rounds)
    made = TokenRows(rows.num_steps, rows.anchors, rows.num_branches, policy)
    made.set_rows(rows.weight)
    made.spec = replace(spec, metrics={}, num_trajectories=spec.num_trajectories or len(items))
    for _ in range(rounds):
        sums = PairSums(made.num_branches, made.num_steps)
        with _measuring(pipe, made, attention_rule, sums):
            for start in range(0, len(items), batch_size):
                generate_batch(
                    pipe, items[start : start + batch_size], output_type="latent", **call
                )
        sums.solve(made.pairs)
    if choose_on:
        batches = [choose_on[i : i + batch_size] for i in range(0, len(choose_on), batch_size)]
        share = _choose(pipe, made, attention_rule, batches, call)
        made.spec = replace(made.spec, metrics={"share_of_fit": share})
    return made


def _checked(rows: L2P, items: Sequence[Item], rounds: int) -> PredictorSpec:
    """The rows' spec, once they can be fitted on."""
    spec = rows.spec
    if spec is None or spec.tap != "hidden" or not items or rounds < 1:
        raise ValueError(
            f"found rows {'without a spec' if spec is None else f'of the tap {spec.tap!r}'}, "
            f"{len(items)} items and {rounds} rounds; expected rows fitted on 'hidden', and at "
            "least one item and round."
        )
    if rows.partition is not None or len(rows.expert_steps) > 1 or rows.first_time is not None:
        raise ValueError(
            "the rows have parts, several transformers or a first time of their own, which a token "
            "policy does not go with; fit plain rows."
        )
    return spec


def _choose(
    pipe: Any,
    made: TokenRows,
    attention_rule: LinearPredictor | None,
    batches: Sequence[Sequence[Item]],
    call: dict[str, Any],
) -> float:
    """Go the share of the way to the pairs that leaves the least error of the samples."""

    def drawn() -> Tensor:
        found = [generate_batch(pipe, b, output_type="latent", **call)[0] for b in batches]
        return torch.cat(found).double()

    full, fitted = drawn(), made.pairs.clone()
    start = torch.tensor([1.0, 0.0], dtype=fitted.dtype, device=fitted.device)
    errors: dict[float, float] = {}
    for share in SHARES:
        made.pairs.copy_(start + share * (fitted - start))
        with forecasting(pipe, made, attention_rule=attention_rule):
            squares = (drawn() - full).flatten(1).square().mean(1)
        errors[share] = float(squares.clamp_min(1e-20).log10().mean())
    best = min(SHARES, key=errors.__getitem__)
    made.pairs.copy_(start + best * (fitted - start))
    return best


@contextlib.contextmanager
def _measuring(
    pipe: Any, made: TokenRows, attention_rule: LinearPredictor | None, sums: PairSums
) -> Iterator[None]:
    """Runs that go by a predictor and add to the sums."""
    policy = made.tokens
    source = Forecaster(made, "hidden", made.anchors, made.spec, pipe, tokens=policy)
    kind = PruningFit if isinstance(policy, PruningPolicy) else LatticeFit
    runner = kind(sums, pipe, source, policy, attention_rule)
    session = Session(pipe, source, [runner], runner)
    try:
        yield
    finally:
        session.detach()
