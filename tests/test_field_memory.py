"""Nothing of a run is held once it is over, however it ended; its report stays."""

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_hosts import STEPS, bare_pipeline, pipeline, run, seeded
from torch._subclasses.fake_tensor import FakeTensorMode

from foreseer.integration.forecasting import attach, forecasting
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import ClusterPolicy
from foreseer.schedules import FirstBlock, SpeCa, TeaCache

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:SpeCa")]
ANCHORS = (0, 1, 2, 4)
SCALARS = 64  # bytes of the outlines of a first block's outputs, which have no values


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors that are alive.

    A storage is known by its own address, not by that of its data: what `torch.compile` traced
    with earlier in the same process may still be alive and has no data to point at.
    """
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    held = [storage for storage in storages if storage.device.type != "meta"]
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def test_field_memory_counts_tensors_and_none_without_data():
    before = tensor_bytes()
    real = torch.zeros(256)
    view, functional = real[1:], torch._to_functional_tensor(torch.zeros(8))
    with FakeTensorMode():
        fake = torch.zeros(1024)
    added = tensor_bytes() - before
    assert added >= real.nbytes
    assert added < fake.nbytes
    assert view.untyped_storage()._cdata == real.untyped_storage()._cdata
    assert functional.numel() == 8


SETUPS: dict[str, Callable[[Any], Any]] = {
    "output": lambda pipe: forecasting(pipe, Taylor(2), ANCHORS, "output"),
    "hidden": lambda pipe: forecasting(pipe, Taylor(2), ANCHORS, "hidden"),
    "residual": lambda pipe: forecasting(pipe, Taylor(2), ANCHORS, "residual"),
    "clusters": lambda pipe: forecasting(pipe, Taylor(2), ANCHORS, tokens=ClusterPolicy(2)),
    "teacache": lambda pipe: forecasting(pipe, Taylor(2), schedule=TeaCache(0.3)),
    "first_block": lambda pipe: forecasting(pipe, Taylor(2), tap="residual", schedule=FirstBlock()),
    "speca": lambda pipe: forecasting(pipe, Taylor(2), schedule=SpeCa(0.3)),
}
every_setup = pytest.mark.parametrize("setup", SETUPS)


def at_the_end(found: list[int], pipe: Any, index: int, timestep: Any, kwargs: Any) -> Any:
    """What is alive when the last step is over, as while a VAE decodes."""
    if index == STEPS - 1:
        found.append(tensor_bytes())
    return kwargs


@every_setup
def test_field_memory_features_end_with_the_last_step(setup):
    pipe, found = pipeline("flux"), []
    calling = functools.partial(
        run, "flux", pipe, callback_on_step_end=functools.partial(at_the_end, found)
    )
    calling()
    before = tensor_bytes()
    with SETUPS[setup](pipe) as attached:
        calling()
        assert tensor_bytes() <= before + SCALARS
    assert tensor_bytes() <= before + SCALARS
    assert found[1] <= found[0] + SCALARS
    assert attached.report().state_bytes > 1000 and attached.report().anchors[0] == 0


class Stop(Exception):
    pass


def interrupting(refs: list[Any], pipe: Any, index: int, timestep: Any, kwargs: Any) -> Any:
    refs.append(weakref.ref(kwargs["latents"]))
    pipe._interrupt = index == 3
    return kwargs


def raising(refs: list[Any], pipe: Any, index: int, timestep: Any, kwargs: Any) -> Any:
    refs.append(weakref.ref(kwargs["latents"]))
    if index == 3:
        raise Stop
    return kwargs


@pytest.mark.parametrize("how", [interrupting, raising])
@every_setup
def test_field_memory_nothing_is_held_of_a_call_that_broke_off(setup, how):
    pipe, refs = pipeline("flux"), []
    expected = run("flux", pipe)
    before = tensor_bytes()
    with SETUPS[setup](pipe) as attached:
        with contextlib.suppress(Stop):
            run("flux", pipe, callback_on_step_end=functools.partial(how, refs))
        assert tensor_bytes() <= before + SCALARS
        assert [ref() for ref in refs] == [None] * len(refs) and refs
        assert attached.report().state_bytes > 0
    assert torch.equal(run("flux", pipe), expected)


@every_setup
def test_field_memory_a_call_that_broke_off_is_over_for_the_transformer(setup):
    pipe = pipeline("flux")
    calls: list[Any] = []
    with SETUPS[setup](pipe):
        run("flux", pipe, callback_on_step_end=functools.partial(interrupting, calls))
        with torch.no_grad():
            inputs = {
                "hidden_states": torch.randn(2, 4, 16, generator=seeded(3)),
                "encoder_hidden_states": torch.randn(2, 3, 12, generator=seeded(4)),
                "pooled_projections": torch.randn(2, 12, generator=seeded(5)),
                "timestep": torch.full([2], 0.4),
                "img_ids": torch.zeros(4, 3),
                "txt_ids": torch.zeros(3, 3),
            }
            found = pipe.transformer(**inputs).sample
    with torch.no_grad():
        assert torch.equal(pipe.transformer(**inputs).sample, found)


def test_field_memory_of_a_loop_by_hand_ends_when_detached():
    pipe = bare_pipeline(pipeline("dit"))
    attached = attach(pipe, Taylor(2), ANCHORS, "hidden")
    with torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        x_t, label = torch.randn(2, 1, 4, 4, generator=seeded()), torch.tensor([0, 1])
        for timestep in pipe.scheduler.timesteps[:4]:
            v = pipe.transformer(x_t, timestep.expand(2), label).sample
            x_t = pipe.scheduler.step(v, timestep, x_t, return_dict=False)[0]
    histories = attached.session.source.histories
    features = [weakref.ref(each) for history in histories for each in history.features]
    del histories
    assert len(features) == 3 and all(feature() is not None for feature in features)
    attached.detach()
    assert all(feature() is None for feature in features)  # till then the loop might have gone on


def test_field_memory_of_the_model_is_not_held_by_a_report():
    pipe = pipeline("flux")
    with forecasting(pipe, Reuse(), ANCHORS, "hidden") as attached:
        run("flux", pipe)
    model, scheduler = weakref.ref(pipe.transformer), weakref.ref(pipe.scheduler)
    del pipe
    gc.collect()
    assert model() is None and scheduler() is None
    attached.detach()  # once more, which is nothing
    assert attached.report().anchors == list(ANCHORS)


def test_field_memory_of_earlier_latents_ends_before_the_call_does():
    pipe, refs = pipeline("flux"), []

    def look(pipe: Any, index: int, timestep: Any, kwargs: Any) -> Any:
        if index == STEPS - 1:
            gc.collect()
            alive.append([ref() is not None for ref in refs])
        refs.append(weakref.ref(kwargs["latents"]))
        return kwargs

    alive: list[list[bool]] = []
    run("flux", pipe, callback_on_step_end=look)
    refs.clear()
    with forecasting(pipe, Taylor(1), ANCHORS, "hidden"):
        run("flux", pipe, callback_on_step_end=look)
    assert alive[1] == alive[0]
