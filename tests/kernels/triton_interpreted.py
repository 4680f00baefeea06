"""
The Triton path on a CPU, in Triton's interpreter: its arithmetic, masks and pointers, not what a compiler makes of them.

`test_logits_tile_triton.py` runs this file in a process of its own, as TRITON_INTERPRET has to be set before Triton is
imported. By hand: `TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_interpreted.py`.
"""

import pytest
import torch
import triton
from tests.kernels.test_logits_tile import TILES, Tile, assert_close, check_series, check_small_kl
from tests.kernels.test_logits_tile import TOLERANCES as TILE_TOLERANCES
from tests.kernels.test_position_kl import ALL_DIFFERENT, Heads, check
from tests.kernels.test_position_kl import TOLERANCES as POSITION_KL_TOLERANCES

from trl_ext.kernels import logits_tile_triton, position_kl
from trl_ext.kernels.logits_tile_triton import fold_tile


pytestmark = [
    pytest.mark.usefixtures("single_thread"),
    # The interpreter is numpy, which warns of −inf − (−inf), of 0 · inf and of exp(1e4), whose results are not used
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks in a row."""
    assert triton.knobs.runtime.interpret
    monkeypatch.setattr(logits_tile_triton, "BLOCK_SIZE", 128)


@pytest.mark.parametrize("name", TILES)
def test_values_and_gradients(name):
    """Oracle: the torch path, which `test_logits_tile.py` compares with float64."""
    tile = TILES[name]("cpu")
    assert_close(tile.fold(fold_tile), tile.fold(), **TILE_TOLERANCES.get(name, {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("vocabulary", [2047, 2048, 2049])
def test_block_size_of_a_gpu(monkeypatch, vocabulary):
    """Oracle: the torch path, around the block size that a GPU is given."""
    monkeypatch.undo()
    assert logits_tile_triton.BLOCK_SIZE == 2048
    tile = Tile(3, vocabulary)
    assert_close(tile.fold(fold_tile), tile.fold(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["all different", "no reference"])
def test_other_gradients(name):
    """Limits: in a bf16 buffer, the same gradient rounded; without a gradient, the same statistics."""
    tile = TILES[name]("cpu")
    expected = tile.fold(fold_tile)
    rounded = tile.fold(fold_tile, gradient_dtype=torch.bfloat16)
    # The interpreter cuts bits off, a GPU rounds
    torch.testing.assert_close(rounded["gradient"].float(), expected["gradient"], rtol=2**-7, atol=0)
    assert_close(rounded | {"gradient": expected["gradient"]}, expected, rtol=0, atol=0)
    assert_close(tile.fold(fold_tile, gradient_dtype=None), expected, rtol=0, atol=0)


@pytest.mark.parametrize("drift", [1e-4, 1e-2, 1.0])
def test_small_kls_are_accurate(monkeypatch, drift):
    """Oracle: float64."""
    monkeypatch.undo()
    check_small_kl(6.0, drift, fold_tile)


def test_series():
    check_series(fold_tile)


@pytest.mark.parametrize("name", ["plain", "all different"])
def test_policy_equal_to_reference_has_kl_zero(name):
    """Limit: KL exactly 0, not nearly."""
    tile = TILES[name]("cpu")
    tile.ref_z, tile.ref_head = tile.z, tile.head
    result = tile.fold(fold_tile)
    assert torch.equal(result["position_kl"], torch.zeros(len(tile.z)))
    assert torch.equal(result["log_probs"], result["ref_log_probs"])


@pytest.mark.parametrize("dtype", POSITION_KL_TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("function", "transform"),
    [(position_kl.position_kl, ALL_DIFFERENT), (position_kl.log_probs, {"logit_scale": 0.5, "softcap": 2.0})],
)
def test_the_functions_that_use_it(monkeypatch, function, transform, dtype):
    """Oracle: float64 full logits; several tiles, into rows that are kept and into room that is used again."""
    monkeypatch.setattr(position_kl, "fold_tile", fold_tile)
    monkeypatch.setitem(position_kl.TILE_ELEMENTS, "cpu", 2 * 401)
    check(
        Heads(5, 401, 33, bias=True, dtype=dtype),
        function,
        tolerances=POSITION_KL_TOLERANCES[dtype],
        **transform,
        kept_gradient_bytes=3 * 401 * dtype.itemsize,
    )
