"""Weights are told apart through whatever holds them, or refused before anything is drawn."""

import copy

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig
from tiny_hosts import pipeline, run, spec_for
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.predictors.linear import L2P

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)
CPU = torch.device("cpu")


def weights_of(transformer):
    return host_fingerprint(transformer)["weights_sha256"]


def fitted(pipe):
    """A predictor that says it was fitted on what the pipeline runs."""
    run("flux", pipe)
    predictor, sigmas = L2P(8, ANCHORS, 1), tuple(flow_sigmas(pipe.scheduler))
    predictor.spec = spec_for(pipe, num_branches=1, guidance_scale=3.5, sigmas=sigmas)
    return predictor


def to_disk(transformer, folder, kind="leaf_level"):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    transformer.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        offload_to_disk_path=str(folder),
        **blocks,
    )


def spoil(transformer):
    """Fill the memory that stands in for offloaded weights, as another program may at any time."""
    for parameter in transformer.parameters():
        parameter.data.normal_()


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_field_offload_to_disk_keeps_the_fingerprint_and_the_predictor(kind, tmp_path):
    pipe = pipeline("flux")
    predictor = fitted(pipe)
    plain, expected = run("flux", pipe), weights_of(pipe.transformer)
    with forecasting(pipe, predictor):
        forecast = run("flux", pipe)
    to_disk(pipe.transformer, tmp_path, kind)
    for _ in range(2):  # before and after the network ran
        spoil(pipe.transformer)
        assert weights_of(pipe.transformer) == expected
        with forecasting(pipe, predictor):
            assert torch.equal(run("flux", pipe), forecast)
        assert torch.equal(run("flux", pipe), plain)


def test_field_offload_to_disk_after_attaching_and_back(tmp_path):
    pipe = pipeline("flux")
    predictor = fitted(pipe)
    with forecasting(pipe, predictor):
        forecast = run("flux", pipe)
        to_disk(pipe.transformer, tmp_path)
        assert torch.equal(run("flux", pipe), forecast)


def test_field_offload_to_disk_other_weights_are_other_weights(tmp_path):
    pipe = pipeline("flux")
    predictor = fitted(pipe)
    pipe.transformer.proj_out.weight.data.mul_(1.5)
    to_disk(pipe.transformer, tmp_path)
    with pytest.raises(PredictorMismatch, match="weights"), forecasting(pipe, predictor):
        pass


def test_field_offload_to_disk_a_lora_loaded_afterwards_is_seen(tmp_path):
    pipe = pipeline("flux")
    to_disk(pipe.transformer, tmp_path)
    before = weights_of(pipe.transformer)
    adapter = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"])
    pipe.transformer.add_adapter(adapter)
    assert weights_of(pipe.transformer) != before


def test_field_offload_to_a_disk_that_is_gone_is_refused(tmp_path):
    pipe = pipeline("flux")
    to_disk(pipe.transformer, tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot be read .*cannot be told which weights these are"):
        host_fingerprint(pipe.transformer)


def test_field_offload_by_accelerate_keeps_the_fingerprint(tmp_path):
    pipe = pipeline("dit")
    expected = weights_of(pipe.transformer)
    disk_offload(pipe.transformer, str(tmp_path), CPU)
    assert weights_of(pipe.transformer) == expected


def test_field_offload_weights_wrapped_in_other_tensors_are_unwrapped():
    transformer = pipeline("dit").transformer
    layer = transformer.transformer_blocks[0].attn1.to_q

    def wrapped(factor):
        second = layer.weight.data.clone()
        other = copy.deepcopy(transformer)
        weight = nn.Parameter(TwoTensor(second, second * factor))
        other.transformer_blocks[0].attn1.to_q.weight = weight
        return weights_of(other)

    assert wrapped(1.0) == wrapped(1.0) != wrapped(2.0)


def test_field_offload_weights_quantised_into_buffers_are_seen():
    transformer = pipeline("dit").transformer

    def packed(shift):
        other = copy.deepcopy(transformer)
        linear = nn.Module()
        linear.register_buffer("qweight", torch.arange(64, dtype=torch.int32).view(8, 8) + shift)
        other.transformer_blocks[0].attn1.to_q = linear
        return weights_of(other)

    assert packed(0) == packed(0) != packed(1)


@pytest.mark.filterwarnings("ignore")
def test_field_offload_weights_packed_by_torch_are_seen():
    def packed(seed):
        transformer = copy.deepcopy(pipeline("dit").transformer)
        torch.manual_seed(seed)
        transformer.proj_out_2.weight.data.normal_()
        return weights_of(torch.ao.quantization.quantize_dynamic(transformer, {nn.Linear}))

    assert packed(0) == packed(0) != packed(1)


def test_field_offload_sharded_weights_are_those_of_the_whole_model(tmp_path):
    transformer = pipeline("dit").transformer
    expected = weights_of(transformer)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = transformer.transformer_blocks[0].attn1.to_q
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Replicate()]))
        assert weights_of(transformer) == expected
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["freed", "elsewhere", "meta"])
def test_field_offload_weights_that_are_nowhere_are_refused(how):
    pipe = pipeline("dit")
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    if how == "freed":  # as FSDP does between calls
        layer.weight.data.untyped_storage().resize_(0)
    elif how == "elsewhere":  # as DeepSpeed's third stage does
        layer.weight.ds_numel, layer.weight.data = layer.weight.numel(), torch.empty(0)
    else:
        layer.to("meta")
    with pytest.raises(ValueError, match="cannot be told which weights these are"):
        host_fingerprint(pipe.transformer)
