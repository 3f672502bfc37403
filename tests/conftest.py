"""Every test starts from the same seed, on one thread, with deterministic algorithms only."""

import gc
import os
import random
import re

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

# Files that put together what others test on its own. Checks of shapes and types are a third of
# their time, so they are for the others, and for these in `make test-all`.
SITUATIONS = re.compile(
    r"test_(bench|bundled|comfyui|composition|demo|docs|examples|face|fault|field|fit_|integrations"
    r"|mistakes|modes|modular|offline|readme|recipes|refit|readout_refit|search|security|shallow"
    r"|solvers_hosts|storage|text_host|truncated|verdict|verify)"
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
hypothesis.settings.register_profile("foreseer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("foreseer")


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_the_collectors_sight():
    """A collection looks through half a million objects of imports; every training asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def shapes_where_they_are_the_subject(request):
    """Shapes and types are checked, but in files of situations unless all tests run."""
    unchecked = request.config.option.markexpr and SITUATIONS.match(request.path.name)
    jaxtyping.config.update("jaxtyping_disable", bool(unchecked))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


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
