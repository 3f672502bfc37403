"""DisCa's predictor starts exactly at its formula, sees the current step, and keeps its limits."""

import pytest
import torch
from student_cases import student_pipeline
from tiny_hosts import pipeline, seeded

from foreseer.integration.forecasting import forecasting
from foreseer.predictors.base import History, Predictor, Step
from foreseer.predictors.neural import AdaLNBlock, DiscaPredictor
from foreseer.predictors.rules import Newton, Reuse

STEPS = 8
WIDTH, MODULATION = 16, 16
SIZES = {"width": WIDTH, "modulation_width": MODULATION, "num_heads": 1}


def predictor(**changes) -> DiscaPredictor:
    torch.manual_seed(1)
    return DiscaPredictor(**{**SIZES, "max_gap": 1.0, **changes}).eval()


def awake(**changes) -> DiscaPredictor:
    """A predictor without zeros."""
    made = predictor(**changes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1, generator=seeded(7))
    return made


def history(count: int = 2) -> History:
    found = History(2)
    for index in range(count):
        feature = torch.randn(2, 4, WIDTH, generator=seeded(index))
        found.push(Step(index, 1 - index / STEPS, STEPS), feature)
    return found


def step(index: int = 3, **changes) -> Step:
    values = {
        "tokens": torch.randn(2, 4, WIDTH, generator=seeded(20)),
        "modulation": torch.randn(2, MODULATION, generator=seeded(21)),
    }
    return Step(index, 1 - index / STEPS, STEPS, **{**values, **changes})


# T18
def test_a_fresh_predictor_is_reuse_exactly():
    assert torch.equal(predictor()(history(1), step()), Reuse()(history(1), step()))
    assert torch.equal(predictor()(history(2), step()), history(2).features[-1])


def test_a_fresh_predictor_of_order_one_is_the_line_through_two_anchors():
    line = Newton(1, clock="sigma")(history(), step())
    torch.testing.assert_close(predictor(order=1)(history(), step()), line)
    one = predictor(order=1)(history(1), step())
    assert torch.equal(one, history(1).features[-1])


def test_without_a_base_the_output_is_the_networks_alone():
    made = awake(residual=False)
    found = history()
    gap = found.sigmas[-1] - step().sigma
    expected = made.correction(found.features[-1], step().tokens, step().modulation, gap)
    assert torch.equal(made(found, step()), expected)


@pytest.mark.parametrize("name", ["tokens", "modulation"])
def test_the_forecast_depends_on_the_current_step(name):
    made, now = awake(), step()
    other = step(**{name: getattr(now, name) + 1.0})
    assert not torch.allclose(made(history(), now), made(history(), other))
    with pytest.raises(ValueError, match="tokens and the modulation"):
        made(history(), step(**{name: None}))


def test_the_forecast_depends_on_the_distance_to_the_anchor():
    made = awake()
    assert not torch.allclose(made(history(), step(3)), made(history(), step(5)))


def test_a_gap_longer_than_trained_is_refused():
    made = predictor(max_gap=0.25)
    made(history(), step(3))
    with pytest.raises(ValueError, match="add an anchor"):
        made(history(), step(4))


def test_branches_and_samples_do_not_mix():
    made, found, now = awake(), history(), step()
    alone = History(2)
    for index, feature in enumerate(found.features):
        alone.push(Step(index, 1 - index / STEPS, STEPS), feature[:1])
    single = Step(3, now.sigma, STEPS, tokens=now.tokens[:1], modulation=now.modulation[:1])
    torch.testing.assert_close(made(alone, single), made(found, now)[:1])


def test_a_half_precision_history_keeps_its_dtype():
    found = History(2)
    for index, feature in enumerate(history().features):
        found.push(Step(index, 1 - index / STEPS, STEPS), feature.bfloat16())
    assert awake()(found, step()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"width_mult": 0.0},
        {"width_mult": 1.5},
        {"num_heads": 3},
        {"depth": 0},
        {"max_gap": 0.0},
        {"order": 2},
        {"order": 1, "residual": False},
    ],
)
def test_an_argument_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        predictor(**changes)


def test_a_fresh_block_is_the_identity_and_a_narrow_predictor_is_small():
    x, k = torch.randn(2, 4, WIDTH), torch.randn(2, MODULATION)
    assert torch.equal(AdaLNBlock(WIDTH, MODULATION, 1)(x, k), x)
    wide, narrow = (
        sum(p.numel() for p in predictor(width_mult=mult).blocks.parameters())
        for mult in (1.0, 0.5)
    )
    assert narrow < 0.5 * wide


class Oracle(Predictor):
    """Answers with true features, asked from inside the forward."""

    needs = frozenset({"tokens", "modulation"})
    window = 1

    def __init__(self, features: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.features = features
        self.caches: dict[int, int] = {}
        self.steps: list[Step] = []

    def forward(self, history: History, step: Step) -> torch.Tensor:
        self.caches[step.index] = id(history.features[-1])
        self.steps.append(step)
        return self.features[step.index]


HOSTS = ("student", "dit_guided", "flux")


def host(name: str):
    return student_pipeline() if name == "student" else pipeline(name)


def draw(name: str, pipe, batch: int = 2):
    from tiny_hosts import run

    if name == "flux":
        return run("flux", pipe, num_inference_steps=STEPS)
    labels = [0, 2, 1][:batch]
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(labels, generator=seeded(), **options).images


def true_features(name: str, pipe) -> dict[int, torch.Tensor]:
    """What enters the head at every step of a full run."""
    found: list[torch.Tensor] = []
    head = pipe.transformer.norm_out
    handle = head.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    draw(name, pipe)
    handle.remove()
    return dict(enumerate(found))


# T16
@pytest.mark.parametrize("name", HOSTS)
def test_all_anchors_give_the_plain_run_bit_for_bit(name):
    pipe = host(name)
    full = draw(name, pipe)
    with forecasting(pipe, Oracle({}), anchors=range(STEPS), tap="hidden"):
        assert torch.equal(draw(name, pipe), full)


# T17
@pytest.mark.parametrize("name", HOSTS)
def test_an_oracle_gives_the_plain_run(name):
    pipe = host(name)
    full, features = draw(name, pipe), true_features(name, pipe)
    oracle = Oracle(features)
    with forecasting(pipe, oracle, anchors=(0, 3), tap="hidden"):
        torch.testing.assert_close(draw(name, pipe), full, atol=1e-5, rtol=1e-5)
    assert [each.index for each in oracle.steps] == [1, 2, 4, 5, 6, 7]
    tokens = oracle.steps[0].tokens
    assert tokens is not None and tokens.shape == features[0].shape
    modulations = [each.modulation for each in oracle.steps]
    assert not any(torch.equal(a, b) for a, b in zip(modulations, modulations[1:], strict=False))


# T19
def test_the_cache_is_refreshed_at_anchors_alone():
    pipe = student_pipeline()
    oracle = Oracle(true_features("student", pipe))
    with forecasting(pipe, oracle, anchors=(0, 3), tap="hidden") as run:
        draw("student", pipe)
        assert run.report().anchors == [0, 3]
    first, second = (1, 2), (4, 5, 6, 7)
    assert len({oracle.caches[i] for i in first}) == len({oracle.caches[i] for i in second}) == 1
    assert oracle.caches[1] != oracle.caches[4]


def test_another_batch_size_starts_anew_and_step_0_is_an_anchor():
    pipe = student_pipeline()
    with forecasting(pipe, Newton(1), anchors=(0, 3), tap="hidden"):
        assert len(draw("student", pipe, 2)) == 2
        assert len(draw("student", pipe, 3)) == 3
    with pytest.raises(ValueError, match="0"):
        with forecasting(pipe, Reuse(), anchors=(1, 3), tap="hidden"):
            draw("student", pipe)


@pytest.mark.parametrize("tap", ["output", "residual"])
def test_a_tap_without_tokens_is_refused(tap):
    pipe = student_pipeline()
    with pytest.raises(ValueError, match="'hidden'"):
        with forecasting(pipe, Oracle({}), anchors=(0, 3), tap=tap):
            draw("student", pipe)


def test_a_learned_predictor_needs_its_host():
    made = predictor()
    with pytest.raises(ValueError, match="spec"):
        with forecasting(student_pipeline(), made, anchors=(0, 3), tap="hidden"):
            pass


def test_a_loaded_predictor_follows_the_features_to_their_device():
    seen = History(1)
    seen.push(Step(0, 1.0, STEPS), torch.empty(2, 4, WIDTH, device="meta"))  # stands for a GPU
    given = {
        "tokens": torch.empty(2, 4, WIDTH, device="meta"),
        "modulation": torch.empty(2, MODULATION, device="meta"),
    }
    assert predictor()(seen, step(**given)).device.type == "meta"
