"""Any module in a loop written by hand: all anchors are the loop bit for bit, runs keep apart."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from module_hosts import (
    TIMES,
    ActionHead,
    MaskedModel,
    Wrapped,
    euler,
    host_with_loop,
    observation,
    seeded,
)

import foreseer as fs
from foreseer.evaluation.results import load_rows
from foreseer.integration.linear_sampler import probe_loop
from foreseer.predictors import Reuse, Taylor

ANCHORS = (0, 1, 3, 6)
ALL = range(len(TIMES))


class Output:
    """What some networks return."""

    def __init__(self, sample):
        self.sample = sample


def tick(net, run, seed: int, key=None, times=TIMES) -> torch.Tensor:
    """One run of a loop of the user's own."""
    with run.steps(times, key=key) as steps:
        return euler(net, observation(seed), seeded(seed), steps)


# ----------------------------------------------------------------------------- the loop, bit for bi


@pytest.mark.parametrize("tap", ["output", "hidden", "residual"])
def test_with_all_steps_anchors_three_ticks_are_those_of_the_loop_alone(tap):
    net = ActionHead()
    host = fs.host(net, blocks="layers", head="norm")
    with fs.forecasting(host, Taylor(1), anchors=ALL, tap=tap) as run:
        for seed in range(3):
            expected = euler(ActionHead(), observation(seed), seeded(seed))
            assert torch.equal(tick(net, run, seed), expected)
            assert run.report().anchors == list(ALL)
    assert "forward" not in vars(net)  # nothing is left behind


@pytest.mark.parametrize("form", [None, lambda v: (v,), Output], ids=["tensor", "tuple", "sample"])
@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_forecast_comes_in_the_form_of_the_module(form, tap):
    net = ActionHead(form)
    with fs.forecasting(fs.host(net), Taylor(1), anchors=ANCHORS, tap=tap) as run:
        found, calls = tick(net, run, 0), net.calls
        again = tick(net, run, 0)
    assert run.report().anchors == list(ANCHORS) and run.report().num_steps == len(TIMES)
    assert torch.equal(found, again)
    if tap == "output":  # the module is not even called
        assert calls == len(ANCHORS)
    plain = euler(ActionHead(form), observation(0), seeded(0))
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()


def test_blocks_deep_inside_are_found_or_named_and_proven_alike():
    expected = None
    for settings in (
        {},
        {"blocks": "model.transformer.layers"},
        {"head": "model.transformer.norm"},
    ):
        net = Wrapped(ActionHead())
        with fs.forecasting(fs.host(net, **settings), Reuse(), ANCHORS, "hidden") as run:
            found = tick(net, run, 0)
            trunk = run.session.experts["module"].trunk
        assert trunk.block_lists == ("model.transformer.layers",)
        assert trunk.head == "model.transformer.norm"
        assert expected is None or torch.equal(found, expected)
        expected = found


def test_token_ids_go_in_and_logits_come_out():
    net = MaskedModel()
    host = fs.host(net)

    @torch.no_grad()
    def unmask(steps) -> torch.Tensor:
        ids = torch.full((2, 6), 8)
        for place in steps:
            ids[:, place] = net(input_ids=ids).logits[:, place].argmax(-1)
        return ids

    expected = unmask(range(6))
    for tap in ("output", "hidden"):
        with fs.forecasting(host, Reuse(), range(6), tap) as run, run.steps(6) as steps:
            assert torch.equal(unmask(steps), expected)
        with fs.forecasting(host, Reuse(), (0, 3), tap) as run, run.steps(6) as steps:
            unmask(steps)
        assert run.report().anchors == [0, 3]


def test_rising_times_are_the_same_run_as_falling_ones():
    net = ActionHead()
    host = fs.host(net)
    with fs.forecasting(host, Taylor(1), ANCHORS) as run:
        with run.steps([1 - t for t in TIMES]) as steps:
            rising = euler(net, observation(0), seeded(0), (1 - t for t in steps))
        falling = tick(net, run, 0)
    torch.testing.assert_close(rising, falling, rtol=1e-5, atol=1e-5)


def test_a_scheduler_may_be_the_clock_of_a_loop():
    from diffusers import FlowMatchEulerDiscreteScheduler

    net, scheduler = ActionHead(), FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def loop() -> torch.Tensor:
        scheduler.set_timesteps(8)
        x = torch.randn(1, 6, 4, generator=seeded(0))
        for t in scheduler.timesteps:
            v = net(x, t / 1000, observation(0)["observation"])
            x = scheduler.step(v, t, x).prev_sample
        return x

    expected = loop()
    host = fs.host(net, scheduler=scheduler)
    with fs.forecasting(host, Taylor(1), range(8)) as run:
        assert torch.equal(loop(), expected)
    with fs.forecasting(host, Taylor(1), (0, 1, 4)) as run:
        loop()
        assert run.report().anchors == [0, 1, 4]
        with pytest.raises(ValueError, match="clock of this host is FlowMatchEuler"):
            run.steps(TIMES)


# -------------------------------------------------------------------------------- runs side by side


def test_environments_interleaved_with_keys_are_as_one_by_one():
    net = ActionHead()
    found = {}

    def environment(run, seed, key):
        x = torch.randn(1, 6, 4, generator=seeded(seed))
        with torch.no_grad(), run.steps(TIMES, key=key) as steps:
            for t in steps:
                x = x - 0.1 * net(x, t, observation(seed)["observation"])
                yield
        found[key] = x

    with fs.forecasting(fs.host(net), Taylor(1), ANCHORS) as run:
        alone = [tick(net, run, seed) for seed in range(3)]
        running = [environment(run, seed, seed or None) for seed in range(3)]  # one without a key
        while running:
            running = [each for each in running if next(each, "over") != "over"]
        held = [each.source.state_bytes() for each in run.session._beside.values()]
        assert held and not any(held)  # nothing is kept of runs that are over
    assert [torch.equal(found[seed or None], alone[seed]) for seed in range(3)] == [True] * 3


def test_threads_with_keys_are_as_one_by_one():
    net = ActionHead()
    with fs.forecasting(fs.host(net), Taylor(1), ANCHORS) as run:
        alone = [tick(net, run, seed) for seed in range(4)]
        found = {}
        threads = [
            threading.Thread(target=lambda s=seed: found.update({s: tick(net, run, s, key=s)}))
            for seed in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(4))


def test_runs_that_take_over_within_a_step_are_refused():
    net, samples = ActionHead(), [torch.randn(1, 6, 4, generator=seeded(seed)) for seed in (0, 1)]

    def guided(run, key):
        seen = observation(key)["observation"]
        with torch.no_grad(), run.steps(TIMES, key=key) as steps:
            x = samples[key]
            for t in steps:
                cond = net(x, t, seen)
                yield
                x = x - 0.1 * (2 * cond - net(x, t, 0 * seen))

    for begun in range(3):
        with fs.forecasting(fs.host(net), Taylor(1), ANCHORS) as run:
            running = [guided(run, key) for key in (0, 1)]
            for _ in range(begun):
                next(running[0])
            with pytest.raises(ValueError, match="key 0 was not over when the one under the key 1"):
                for each in (*running, running[0]):
                    next(each)
            del running, each


def test_a_run_inside_of_a_step_of_another_leaves_it_as_it_was():
    net = ActionHead()
    with fs.forecasting(fs.host(net), Taylor(1), ANCHORS) as run:
        expected, inner = tick(net, run, 0), tick(net, run, 1)

        def disturbed(steps):
            for t in steps:
                assert torch.equal(tick(net, run, 1, key="inner"), inner)
                yield t

        with run.steps(TIMES) as steps:
            assert torch.equal(euler(net, observation(0), seeded(0), disturbed(steps)), expected)


def test_two_runs_without_a_key_are_refused_and_the_first_goes_on():
    net = ActionHead()
    with fs.forecasting(fs.host(net), Taylor(1), ANCHORS) as run:
        expected = tick(net, run, 0)
        with run.steps(TIMES) as steps:

            def disturbed():
                for t in steps:
                    if t == TIMES[4]:
                        with pytest.raises(ValueError, match="a key each"):
                            tick(net, run, 1)
                    yield t

            assert torch.equal(euler(net, observation(0), seeded(0), disturbed()), expected)


def test_a_run_after_one_that_an_exception_ended_knows_nothing_of_it():
    net = ActionHead()
    with fs.forecasting(fs.host(net), Taylor(1), ANCHORS) as run:
        expected = tick(net, run, 0)
        with pytest.raises(ZeroDivisionError), run.steps(TIMES) as steps:
            for number, t in enumerate(steps):
                net(torch.ones(1, 6, 4), t, torch.ones(1, 3))
                1 // (4 - number)
        assert "broken off: 5 of 10" in str(run.report())
        assert torch.equal(tick(net, run, 0), expected)


def test_a_reset_in_mid_run_computes_the_next_call_and_is_told():
    net = ActionHead()
    with fs.forecasting(fs.host(net), Reuse(), (0, 3)) as run:
        with pytest.raises(ValueError, match="no run is under way"):
            run.reset("too early")
        with torch.no_grad(), run.steps(TIMES) as steps:
            for number, t in enumerate(steps):
                if number == 6:
                    run.reset("another observation")
                net(torch.ones(1, 6, 4), t, torch.ones(1, 3))
    assert run.report().anchors == [0, 3, 6]
    assert "reset at step 6: another observation" in str(run.report())


# --------------------------------------------------------------------------------- what is refused


def attached(net, **settings):
    return fs.forecasting(fs.host(net), Taylor(1), ANCHORS, **settings)


def test_a_call_outside_of_a_run_is_refused_and_nothing_is_forecast():
    net = ActionHead()
    with attached(net), pytest.raises(ValueError, match="called outside of a run"):
        euler(net, observation(0), seeded(0))
    euler(net, observation(0), seeded(0))  # detached: the module is its own again


def test_attach_and_detach_take_a_host_and_a_second_one_is_refused():
    net = ActionHead()
    host = fs.host(net)
    run = fs.attach(host, Taylor(1), ANCHORS)
    with pytest.raises(ValueError, match="already attached"):
        fs.attach(fs.host(net), Taylor(1), ANCHORS)
    tick(net, run, 0)
    assert fs.detach(host) and not fs.detach(host)
    assert "forward" not in vars(net)


def test_a_changed_weight_is_noticed_by_the_next_run(recording):
    fitted = fs.fit(recording, anchors=ANCHORS, method="lstsq", tap="output")
    net = ActionHead()
    with fs.forecasting(fs.host(net), fitted) as run:
        tick(net, run, 0)
        with torch.no_grad():
            net.leave.weight[0] += 1
        with pytest.raises(fs.PredictorMismatch, match="weights"):
            tick(net, run, 0)


def test_a_call_after_the_last_step_or_before_the_first_is_refused():
    net = ActionHead()
    with fs.forecasting(fs.host(net), Reuse(), (0,)) as run:
        with pytest.raises(ValueError, match="before its first step"), run.steps(TIMES):
            net(torch.ones(1, 6, 4), 1.0, torch.ones(1, 3))
        with pytest.raises(ValueError, match="after its last step"), run.steps(2) as steps:
            for t in steps:
                net(torch.ones(1, 6, 4), t, torch.ones(1, 3))
            net(torch.ones(1, 6, 4), 1.0, torch.ones(1, 3))


def test_a_step_without_a_call_is_refused():
    net = ActionHead()
    with attached(net) as run, pytest.raises(ValueError, match="step 0 of a run of 10 is over wit"):
        with run.steps(TIMES) as steps:
            for _ in steps:
                pass


def test_steps_are_gone_through_once_and_inside_of_their_with():
    net = ActionHead()
    with attached(net) as run:
        with pytest.raises(ValueError, match="inside of their `with`"):
            next(iter(run.steps(TIMES)))
        steps = run.steps(TIMES)
        with steps:
            euler(net, observation(0), seeded(0), steps)
        with pytest.raises(ValueError, match="gone through before"):
            steps.__enter__()
    with pytest.raises(ValueError, match="no loop to count"):
        run.steps(TIMES)


@pytest.mark.parametrize(
    "times",
    [
        *(
            [],
            0,
            [999.0, 500.0],
            [1.0, 0.5, 0.5],
            [1.0, 0.5, 0.0],
            [0.0, 0.5, 1.0],
            [math.nan, 0.5],
        ),
        *(None, True, 10.0, "10", torch.ones(1, 3), [[1.0, 0.5]]),
    ],
)
def test_what_are_no_flow_times_is_refused(times):
    with pytest.raises(ValueError, match="expected"):
        fs.host(ActionHead()).steps(times)


def test_times_may_be_an_array_an_iterator_or_a_number_of_any_library():
    net, expected = ActionHead(), euler(ActionHead(), observation(0), seeded(0))
    with fs.forecasting(fs.host(net), Taylor(1), range(10)) as run:
        for times in (np.array(TIMES), iter(TIMES), torch.tensor(TIMES, dtype=torch.float64)):
            torch.testing.assert_close(tick(net, run, 0, times=times), expected)
        for number in (np.int64(10), torch.tensor(10)):
            with run.steps(number) as steps:
                euler(net, observation(0), seeded(0), (TIMES[i] for i in steps))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_calls_of_one_step_at_several_times_are_refused(kind):
    net, seen = ActionHead(), torch.ones(1, 3)
    with attached(net) as run, pytest.raises(ValueError, match="take one step for each of these"):
        with run.steps(10) as steps:
            for index in steps:  # as Heun's method
                for later in (index, index + 1):
                    net(torch.ones(1, 6, 4), kind(1 - later / 10), seen)


def test_what_is_no_host_is_refused_with_how_to_make_one():
    for given in (ActionHead(), SimpleNamespace(transformer=ActionHead())):
        with pytest.raises(fs.UnsupportedHost, match=r"foreseer.host\(module\)"):
            fs.forecasting(given, Reuse(), (0,)).__enter__()


def test_a_compiled_module_is_refused_before_and_after_it_is_a_host():
    net = ActionHead()
    host = fs.host(net)
    net.compile()
    for action in (lambda: fs.host(net), lambda: fs.forecasting(host, Reuse(), (0,)).__enter__()):
        with pytest.raises(fs.UnsupportedHost, match="compile its blocks one by one"):
            action()
    with pytest.raises(fs.UnsupportedHost, match="compiled"):
        fs.host(torch.compile(ActionHead()))


def test_nan_in_the_network_is_refused_and_the_next_run_is_clean():
    net = ActionHead()
    with attached(net) as run:
        expected = tick(net, run, 0)
        bad = {"observation": torch.full((1, 3), math.nan)}
        with pytest.raises(ValueError, match="NaN or Inf"), run.steps(TIMES) as steps:
            euler(net, bad, seeded(0), steps)
        assert torch.equal(tick(net, run, 0), expected)


def test_names_that_are_not_there_are_refused_with_those_that_are():
    net = ActionHead()
    with pytest.raises(fs.UnsupportedHost, match="no ModuleList 'blocks'.*it has layers"):
        fs.host(net, blocks="blocks")
    with pytest.raises(fs.UnsupportedHost, match=r"'norm' \(a LayerNorm\)"):
        fs.host(net, blocks="norm")
    with pytest.raises(fs.UnsupportedHost, match="no module 'final'"):
        fs.host(net, head="final")
    with pytest.raises(fs.UnsupportedHost, match="expected a torch module"):
        fs.host("net")
    with fs.forecasting(fs.host(net, head="enter"), Reuse(), ANCHORS, "hidden") as run:
        with pytest.raises(fs.UnsupportedHost, match="no module enter called after block layers.2"):
            tick(net, run, 0)


def test_a_second_head_that_reads_the_blocks_too_is_refused_on_the_hidden_tap():
    class TwoHeads(ActionHead):
        def forward(self, x, t, observation):
            h = self.enter(x)
            for layer in self.layers:
                h = layer(h, self.observe(observation))
            return self.leave(self.norm(h)) + h.mean()

    net = TwoHeads()
    with fs.forecasting(fs.host(net), Reuse(), ANCHORS, "hidden") as run:
        with pytest.raises(fs.UnsupportedHost, match="expected bitwise equality"):
            tick(net, run, 0)
    with fs.forecasting(fs.host(net), Reuse(), ANCHORS, "output") as run:
        tick(net, run, 0)


def test_an_output_with_more_than_logits_is_refused():
    net = ActionHead(lambda v: SimpleNamespace(logits=v, states=v))
    with attached(net) as run, pytest.raises(fs.UnsupportedHost, match="`logits` and nothing else"):
        tick(net, run, 0)


# ------------------------------------------------------------------- record, fit, save, load, run


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("module") / "recording")
    inputs = [observation(seed) for seed in range(24)]
    return fs.record(host_with_loop(ActionHead()), inputs, folder)


def test_what_is_recorded_is_the_loop(recording):
    kept = recording.load(5)
    expected = euler(ActionHead(), observation(5), seeded(5))[0]
    torch.testing.assert_close(kept["final"], expected, rtol=1e-5, atol=1e-6)  # of a batch
    assert kept["states"].shape == (len(TIMES) + 1, *expected.shape)
    assert torch.equal(kept["states"][-1], kept["final"])
    assert recording.header.sigmas == TIMES and recording.header.host["class"] == "ActionHead"


def test_a_loop_may_change_its_tensors_in_place(recording, tmp_path):
    net = ActionHead()
    host = fs.host(net)

    def sample(inputs, generator):
        x = randn_tensor((len(inputs["observation"]), 6, 4), generator=generator)
        with host.steps(TIMES) as steps:
            for t in steps:
                x += net(x, t, inputs["observation"]).mul_(-0.1)
        return x

    host.sample = sample
    found = fs.record(host, [observation(seed) for seed in range(2)], str(tmp_path / "recording"))
    for name, expected in recording.load(1).items():
        torch.testing.assert_close(found.load(1)[name], expected, rtol=1e-5, atol=1e-6)
    expected = torch.full((10, 10), -0.1, dtype=torch.float64).tril()
    probed = probe_loop(host, lambda: host(generator=seeded(0), **observation(0)))
    torch.testing.assert_close(probed.response[1:], expected, rtol=1e-5, atol=1e-6)


def test_the_sample_is_the_tensor_that_steps_move(tmp_path):
    class Conditioned(ActionHead):
        def forward(self, image, x, t):
            return super().forward(x + image, t, image.mean(1)[:, :3])

    net = Conditioned()
    host = fs.host(net)

    def sample(inputs, generator):
        x = randn_tensor((len(inputs["image"]), 6, 4), generator=generator)
        with host.steps(TIMES) as steps:
            for t in steps:
                x = x - 0.1 * net(inputs["image"], x, t)
        return x

    host.sample = sample
    images = [{"image": torch.randn(1, 6, 4, generator=seeded(seed))} for seed in range(2)]
    kept = fs.record(host, images, str(tmp_path / "recording")).load(0)["states"]
    assert len({float(state.sum()) for state in kept}) == len(kept)
    assert torch.equal(kept[0], torch.randn(1, 6, 4, generator=seeded(0))[0])


def test_rows_fitted_on_a_loop_are_saved_loaded_and_refused_elsewhere(recording, tmp_path):
    fitted = fs.fit(recording, anchors=ANCHORS, method="lstsq", tap="output")
    folder = fs.save(fitted, str(tmp_path / "rows"))
    net = ActionHead()
    with fs.forecasting(fs.host(net), str(folder)) as run:
        found = tick(net, run, 30)
        with pytest.raises(fs.PredictorMismatch, match="this run has 5"):
            tick(net, run, 30, times=TIMES[::2])
        with pytest.raises(fs.PredictorMismatch, match="sigma grid differs"):
            tick(net, run, 30, times=[t**2 for t in TIMES])
        with (
            pytest.raises(fs.PredictorMismatch, match="begin a new run"),
            run.steps(TIMES) as steps,
        ):
            for number, t in enumerate(steps):
                if number == 4:
                    run.reset("another observation")
                net(torch.ones(1, 6, 4), t, torch.ones(1, 3))
    plain = euler(net, observation(30), seeded(30))
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()
    with pytest.raises(fs.PredictorMismatch, match="weights"):
        fs.forecasting(fs.host(ActionHead(seed=1)), str(folder)).__enter__()


def test_a_recording_goes_on_where_it_was_and_refuses_what_is_no_run(tmp_path):
    host = host_with_loop(ActionHead())
    inputs = [observation(seed) for seed in range(4)]
    whole = fs.record(host, inputs, str(tmp_path / "a"), batch_size=2)
    fs.record(host, inputs[:2], str(tmp_path / "b"), batch_size=2)
    resumed = fs.record(host, inputs, str(tmp_path / "b"), batch_size=2)
    assert all(torch.equal(whole.load(i)["final"], resumed.load(i)["final"]) for i in range(4))
    host.sample = lambda inputs, generator: torch.zeros(1, 6, 4)
    with pytest.raises(ValueError, match="sample made no run"):
        fs.record(host, inputs, str(tmp_path / "c"))
    with pytest.raises(ValueError, match="give it one run of your loop"):
        fs.record(fs.host(ActionHead()), inputs, str(tmp_path / "c"))
    with pytest.raises(ValueError, match="takes no guidance_scale, height"):
        fs.record(host, inputs, str(tmp_path / "c"), guidance_scale=2.0, height=8)
    with pytest.raises(ValueError, match="a mapping per sample"):
        fs.record(host, "words", str(tmp_path / "c"))


def test_guidance_in_one_call_says_its_branches(tmp_path):
    net = ActionHead()

    def guided(host):
        def sample(inputs, generator):
            def both(x, t, seen):
                v = net(torch.cat([x, x]), t, torch.cat([seen, 0 * seen]))
                cond, uncond = v.chunk(2)
                return uncond + 1.5 * (cond - uncond)

            with host.steps(TIMES) as steps:
                return euler(both, inputs, generator, steps)

        host.sample = sample
        return host

    inputs = [observation(seed) for seed in range(2)]
    with pytest.raises(ValueError, match="4 rows for 2 samples.*branches=2"):
        fs.record(guided(fs.host(net)), inputs, str(tmp_path / "a"))
    found = fs.record(guided(fs.host(net, branches=2)), inputs, str(tmp_path / "b"))
    assert found.load(0)["gram/output"].shape == (2, 10, 10)


# ---------------------------------------------------------- fits in closed loop, verify, bench


@pytest.mark.parametrize("method", ["readout", "closed_loop"])
def test_fits_in_closed_loop_run_the_loop_and_beat_their_start(recording, method):
    host = host_with_loop(ActionHead())
    fitted = fs.fit(recording, anchors=ANCHORS, method=method, pipeline=host)
    assert fitted.spec.metrics["val_error_db"] <= fitted.spec.metrics["val_error_db_start"]
    with fs.forecasting(host, fitted) as run:
        tick(host.module, run, 40)
    assert run.report().anchors == list(ANCHORS)


def test_the_map_of_a_loop_is_that_of_its_steps():
    host = host_with_loop(ActionHead())
    found = probe_loop(host, lambda: host(generator=seeded(0), **observation(0)))
    expected = torch.full((10, 10), -0.1, dtype=torch.float64).tril()
    torch.testing.assert_close(found.response[1:], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.start, torch.ones(11).double(), rtol=1e-6, atol=1e-6)

    def clipped(inputs, generator):
        with host.steps(TIMES) as steps:
            return euler(host.module, inputs, generator, steps).clamp(-0.5, 0.5)

    host.sample = clipped
    with pytest.raises(fs.UnsupportedHost, match="not affine"):
        probe_loop(host, lambda: host(generator=seeded(0), **observation(0)))


def test_verify_proves_a_host_and_its_predictor(recording):
    fitted = fs.fit(recording, anchors=ANCHORS, method="lstsq", tap="output")
    found = fs.verify(host_with_loop(ActionHead()), fitted, prompts=observation(3))
    assert found, str(found)
    names = [check.name for check in found.checks]
    assert {"replay output", "replay hidden", "abort hidden", "detach", "predictor"} <= set(names)
    with pytest.raises(ValueError, match="inputs of its own"):
        fs.verify(host_with_loop(ActionHead()))


def test_a_search_of_anchors_runs_the_loop(recording, tmp_path):
    host = host_with_loop(ActionHead())
    out = str(tmp_path / "search.json")
    options = {"num_anchors": [3], "num_samples": 4, "num_moves": 1}
    found = fs.search(recording, host, out, methods=["taylor_1|output"], **options)
    (anchors,) = found.values()
    assert anchors[0] == 0 and len(anchors) == 3


def test_bench_compares_what_runs_on_a_loop(recording, tmp_path):
    host = host_with_loop(ActionHead())
    fitted = fs.fit(recording, anchors=ANCHORS, method="lstsq", tap="output")
    prompts = [observation(seed) for seed in range(50, 54)]
    options = {"budgets": [4], "num_samples": 4, "predictors": [fitted]}
    page = fs.bench(host, str(tmp_path), prompts, methods=["reuse", "taylor_1"], **options)
    rows = load_rows(page.parent / "results.json")
    assert {row.method for row in rows} == {"full", "reuse", "taylor_1", "l2p"}
    best = {row.method: row.latent_rel_l2 for row in rows if row.tap in ("output", "none")}
    assert best["full"] == 0 < best["l2p"] < best["reuse"]
    with pytest.raises(ValueError, match="take the place of a scheduler"):
        fs.bench(host, str(tmp_path), prompts, methods=["euler"], **options)
