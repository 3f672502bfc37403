"""A small untrained masked model whose tokens differ, and prompts for it."""

import pytest
import torch

pytest.importorskip("masked_model", reason="the wheel holds no examples")
from digit_tasks import addition, running_sums
from masked_model import Config, MaskedLanguageModel


def small_model(num_layers=2, seed=0):
    """Grouped-query attention; layers of random weights with outputs as large as the stream."""
    torch.manual_seed(seed)
    config = Config(num_layers, width=32, num_heads=4, num_key_value_heads=2, mlp_width=48)
    model = MaskedLanguageModel(config).eval()
    with torch.no_grad():  # at its initial weights all confidences are nearly one
        for block in model.model["transformer"]["blocks"]:
            block.attn_out.weight.mul_(20)
            block.ff_out.weight.mul_(20)
        model.model["transformer"]["ff_out"].weight.mul_(30)
    return model


def equal_prompts(count=3, seed=0):
    """Prompts of running sums."""
    return running_sums(count, torch.Generator().manual_seed(seed)).prompts


def unequal_prompts(seed=1):
    """A prompt of one number and one of two."""
    generator = torch.Generator().manual_seed(seed)
    return [make(1, generator).prompts[0] for make in (running_sums, addition)]
