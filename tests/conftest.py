"""Every test starts from the same seed, on one thread, with deterministic algorithms only."""

import gc
import os
import random

import hypothesis
import numpy as np
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
hypothesis.settings.register_profile("foreseer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("foreseer")


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_collectors_sight():
    """A collection looks through a million objects of imports, and every training asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
