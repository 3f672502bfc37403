"""How much a run caches is known after its first step, exactly, and too much is refused there."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, call
from lesa_cases import lesa, lesa_values
from test_predictors import PREDICTORS, STATIC
from tiny_hosts import HOSTS, STEPS, pipeline, run, spec_for
from torch import Tensor

from foreseer.evaluation.verify import check_tap, final_latents
from foreseer.integration import memory
from foreseer.integration.forecaster import Forecaster
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.trunk import modulation_width
from foreseer.integration.memory import available_bytes, readable
from foreseer.integration.observers import CallRecord
from foreseer.predictors.any_anchors import L2PGram
from foreseer.predictors.base import Step
from foreseer.predictors.continuous import L2PContinuous
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.linear import L2P
from foreseer.predictors.neural import DiscaPredictor
from foreseer.predictors.partition import ChannelGroups
from foreseer.predictors.per_part import FreqCa, HyCa
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.rules import Newton, Reuse, Taylor
from foreseer.predictors.spectrum import Bands
from foreseer.predictors.tokens import ClusterPolicy, RandomPolicy
from foreseer.schedules import FirstBlock, SpeCa, TeaCache

ANCHORS = (0, 1, 3, 5, 6)
FEATURE = 2 * 4 * 16 * 4  # bytes of the tiny DiT's hidden tap: 2 samples, 4 tokens, 16 channels
LABELS = [channel % 2 for channel in range(16)]


def disca(pipe: Any) -> DiscaPredictor:
    width = modulation_width(pipe.transformer)
    return DiscaPredictor(16, width, num_heads=2, order=1, max_gap=1.0)


LEARNED: dict[str, Callable[[Any, tuple[float, ...]], Any]] = {
    "l2p": lambda pipe, sigmas: L2P(STEPS, ANCHORS, 2),
    "l2p_gram": lambda pipe, sigmas: L2PGram(STEPS, 2),
    "l2p_gram_window": lambda pipe, sigmas: L2PGram(STEPS, 2, window=3),
    "l2p_continuous": lambda pipe, sigmas: L2PContinuous([sigmas], 2, order=2),
    "l2p_bands": lambda pipe, sigmas: L2P(STEPS, ANCHORS, 2, partition=Bands([0.4], [2, 2])),
    "l2p_groups": lambda pipe, sigmas: L2P(STEPS, ANCHORS, 2, partition=ChannelGroups(LABELS)),
    "freqca": lambda pipe, sigmas: FreqCa([2, 2]),
    "hyca": lambda pipe, sigmas: HyCa(LABELS, ["ab2", "reuse"]),
    "lesa": lambda pipe, sigmas: lesa(sigmas=sigmas),
    "lesa_no_feedback": lambda pipe, sigmas: lesa(sigmas=sigmas, feedback=False),
    "lesa_values": lambda pipe, sigmas: lesa_values(sigmas=sigmas),
    "disca": lambda pipe, sigmas: disca(pipe),
}
every_host = pytest.mark.parametrize("host", HOSTS)


def predictor_for(name: str, pipe: Any) -> Any:
    if name in STATIC:
        return PREDICTORS[name]()
    spec = spec_for(pipe, tap="hidden", anchors=ANCHORS)
    made = LEARNED[name](pipe, spec.sigmas)
    made.spec = spec
    return made


def attached(name: str, pipe: Any, **more: Any) -> Any:
    """A predictor of every kind on the hidden tap."""
    return forecasting(pipe, predictor_for(name, pipe), ANCHORS, "hidden", **more)


def kept_tensors(source: Forecaster) -> list[Tensor]:
    """Every feature that a forecaster's histories hold."""
    return [feature for history in source.histories for feature in history.features]


def storage_bytes(tensors: list[Tensor]) -> int:
    """Memory that tensors keep alive, which a view's own size does not tell."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def at_the_end(source: Any, look: Callable[[], Any]) -> list[Any]:
    """A list of what `look` finds when a run ends, before its features are let go of."""
    found: list[Any] = []
    finish = source.finish

    def looking(report: Any) -> None:
        found.append(look())
        finish(report)

    source.finish = looking
    return found


def check_refused(attach: Callable[..., Any], host: str, pipe: Any, step: int = 0) -> None:
    """A run fits into what is predicted, and into a byte less it does not."""
    with attach() as free:
        image = run(host, pipe)
    report = free.report()
    assert 0 < report.state_bytes == report.predicted_bytes
    with attach(memory_budget=report.predicted_bytes):
        assert torch.equal(run(host, pipe), image)
    with attach(memory_budget=report.predicted_bytes - 1) as tight:
        with pytest.raises(MemoryError, match="this run is going to cache up to .* memory budget"):
            run(host, pipe)
        assert tight.report().anchors == [step]


@pytest.mark.parametrize("name", [*STATIC, *LEARNED])
def test_what_every_predictor_holds_is_known_after_the_first_step(name):
    pipe = pipeline("dit_guided")
    check_refused(lambda **more: attached(name, pipe, **more), "dit_guided", pipe)
    with attached(name, pipe) as shown:
        source = shown.session.source
        held = at_the_end(source, lambda: storage_bytes(kept_tensors(source)))
        run("dit_guided", pipe)
    assert held == [shown.report().state_bytes]
    window = source.predictor.window or len(ANCHORS)
    assert shown.report().state_bytes == 2 * FEATURE * min(window, len(ANCHORS))


@every_host
@pytest.mark.parametrize("tap", ["output", "hidden", "residual"])
def test_every_tap_of_every_host_is_counted(host, tap):
    pipe = pipeline(host)
    check_refused(lambda **more: forecasting(pipe, Taylor(2), ANCHORS, tap, **more), host, pipe)


@every_host
@pytest.mark.parametrize(
    "policy",
    [
        lambda: RandomPolicy(2),
        lambda: ClusterPolicy(2),
        lambda: LatticePolicy(0.5),
        lambda: PruningPolicy(0.5, past=1.0),
    ],
)
@pytest.mark.parametrize("rule", [Reuse, lambda: Taylor(1)])
def test_attention_outputs_and_clusters_are_counted(host, policy, rule):
    pipe = pipeline(host)

    def attach(**more):
        more |= {"tokens": policy(), "attention_rule": rule()}
        return forecasting(pipe, Taylor(1), ANCHORS, **more)

    check_refused(attach, host, pipe)


SCHEDULES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # all steps; some of them
    "teacache": (lambda: TeaCache(1e-9), lambda: TeaCache(0.1)),
    "first_block": (lambda: FirstBlock(1e-9), lambda: FirstBlock(0.6)),
    "speca": (lambda: SpeCa(0.0), lambda: SpeCa(0.05)),
}
HOSTS_AND_RULES = [(host, "taylor_1") for host in HOSTS] + [("dit_guided", "l2p_gram")]


@pytest.mark.filterwarnings("ignore:SpeCa")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("host", "rule"), HOSTS_AND_RULES)
def test_a_schedule_that_decides_is_counted_at_its_most(host, rule, name):
    pipe = pipeline(host)
    predictor = predictor_for(rule, pipe)

    def attach(make: Callable[[], Any], **more: Any) -> Any:
        return forecasting(pipe, predictor, (0,), "hidden", make(), **more)

    every, some = SCHEDULES[name]
    check_refused(functools.partial(attach, every), host, pipe)
    with attach(some) as attached:
        source = attached.session.source

        def held() -> tuple[int, int]:
            held = storage_bytes(kept_tensors(source)) + source.schedule.state_bytes()
            return held, source.state_bytes()

        found = at_the_end(source, held)
        run(host, pipe)
    report = attached.report()
    assert len(report.anchors) < STEPS
    assert report.state_bytes <= report.predicted_bytes
    assert found[0][0] == found[0][1] > 0


def test_a_sample_computed_on_its_own_keeps_no_other_alive():
    source = Forecaster(Reuse(), "hidden", (0,), schedule=SpeCa(0.1))
    source.open([1 - step / STEPS for step in range(STEPS)])
    source.keep(CallRecord(Step(0, 1.0, STEPS), {"hidden": torch.ones(2, 4, 16)}))
    source.schedule.refused[1] = [0]
    source.keep(CallRecord(Step(1, 0.875, STEPS), {"hidden": torch.ones(1, 4, 16)}))
    kept = kept_tensors(source)
    assert len(kept) == 2 and storage_bytes(kept) == source.state_bytes() == FEATURE


@pytest.mark.parametrize(("predictor", "features"), [(Taylor(1), 4), (Newton(2), 5)])
def test_two_transformers_are_counted_when_the_second_one_starts(predictor, features):
    family = FAMILIES["wan22"]
    pipe = family.build()
    anchors = (0, 1, 3, 4, 6)  # the second starts at 3
    with forecasting(pipe, predictor, anchors, "hidden") as attached:
        source = attached.session.source
        pushed = at_the_end(source, lambda: sum(map(len, source.histories)))
        image = call(family, pipe)
    report = attached.report()
    assert report.predicted_bytes == report.state_bytes
    assert pushed == [2 * features]  # two calls per step
    budget = report.predicted_bytes
    with forecasting(pipe, predictor, anchors, "hidden", memory_budget=budget):
        assert torch.equal(call(family, pipe), image)
    with forecasting(pipe, predictor, anchors, "hidden", memory_budget=budget - 1) as attached:
        with pytest.raises(MemoryError):
            call(family, pipe)
    assert attached.report().anchors[-1] == 3


def test_verify_tells_the_same_bytes():
    pipe = pipeline("dit_guided")
    calling = functools.partial(run, "dit_guided", pipe)
    with forecasting(pipe, Reuse(), ANCHORS, "hidden") as attached:
        calling()
    checks = {
        c.name: c.found for c in check_tap(pipe, calling, "hidden", final_latents(pipe, calling))
    }
    told = attached.report().predicted_bytes / 1024
    assert checks["memory hidden"] == f"{told:,.1f} KiB per anchor kept"


@pytest.mark.fault
def test_case_17_memory(monkeypatch):
    pipe = pipeline("flux")
    plain = run("flux", pipe)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with forecasting(pipe, Taylor(3), ANCHORS, "hidden") as attached:
        with pytest.raises(MemoryError) as refused:
            run("flux", pipe)
        source = attached.session.source
        assert attached.report().anchors == [0]
        held = attached.report().state_bytes
        assert held == 2 * 4 * 16 * 4 and kept_tensors(source) == []  # let go of since
        assert attached.report().predicted_bytes == 4 * held
        monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * held)
        run("flux", pipe)  # with the one that is held already
    assert str(refused.value) == (
        "this run is going to cache up to 2.0 KiB of features (512 bytes after step 0), but 1.5 "
        "KiB are available on cpu. To need less, draw fewer samples per call, forecast the tap "
        "'output' or use a predictor that looks at fewer anchors (Reuse at 1, Taylor(1) at 2); "
        "memory_budget sets another limit."
    )
    assert torch.equal(run("flux", pipe), plain)


def test_a_budget_of_nothing_is_refused_at_attach():
    pipe = pipeline("dit")
    for attach in (
        lambda: forecasting(pipe, Reuse(), ANCHORS, memory_budget=0),
        lambda: forecasting(pipe, Reuse(), ANCHORS, tokens=RandomPolicy(2), memory_budget=-1),
    ):
        with pytest.raises(ValueError, match="expected a number of bytes >= 1"), attach():
            pass


def test_a_budget_holds_where_the_system_does_not_tell(monkeypatch):
    pipe = pipeline("dit")
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    with forecasting(pipe, Reuse(), ANCHORS):
        run("dit", pipe)
    with forecasting(pipe, Reuse(), ANCHORS, memory_budget=1), pytest.raises(MemoryError):
        run("dit", pipe)


def test_what_is_available_is_what_the_system_says(monkeypatch, tmp_path):
    cuda = {"mem_get_info": (700, 9999), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_bytes(torch.device("cuda:0")) == 900
    assert available_bytes(torch.device("meta")) is None
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:       3 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", told)
    assert available_bytes(torch.device("cpu")) == 3072
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert available_bytes(torch.device("cpu")) is None


def test_the_device_is_asked_once_per_run(monkeypatch):
    pipe, asked = pipeline("dit_guided"), []
    monkeypatch.setattr(memory, "available_bytes", lambda device: asked.append(device) or 1 << 40)
    with forecasting(pipe, Newton(4), ANCHORS, "hidden"):
        for count in (1, 2):
            run("dit_guided", pipe)
            assert asked == [torch.device("cpu")] * count


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (9.5 * 2**30, "9.5 GiB")],
)
def test_bytes_are_told_in_units_a_person_reads(num_bytes, words):
    assert readable(int(num_bytes)) == words
