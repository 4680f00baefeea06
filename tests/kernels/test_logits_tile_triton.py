"""
The Triton path of `fold_tile`, as far as this machine goes: everywhere in Triton's interpreter, and compiled for GPUs that
are not there; on a CUDA device (`make test-gpu`) against the torch path and against float64.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.kernels.test_logits_tile import TILES, assert_close, check_series, check_small_kl, in_float64
from tests.kernels.test_logits_tile import TOLERANCES as TILE_TOLERANCES
from tests.kernels.test_position_kl import ALL_DIFFERENT, TOLERANCES, Heads, check

from trl_ext.kernels import logits_tile
from trl_ext.kernels.position_kl import log_probs, position_kl


triton = pytest.importorskip("triton")

from trl_ext.kernels import logits_tile_triton  # noqa: E402


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fp_fusion(monkeypatch):
    """What Triton 3.9 does by default, and warns of."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def test_interpreted():
    """The tests of `triton_interpreted.py`. Triton has to be imported under TRITON_INTERPRET, so in another process."""
    path = Path(__file__).with_name("triton_interpreted.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert re.search(r"\d+ passed", run.stdout), run.stdout


FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_REFERENCE", "HAS_REF_BIAS", "HAS_REF_SOFTCAP", "HAS_GRADIENT")


@pytest.mark.parametrize(
    ("capability", "flags", "dtype"),
    [
        (80, {"HAS_REFERENCE", "HAS_GRADIENT"}, "bf16"),
        (90, set(FLAGS), "fp32"),
        (90, {"HAS_GRADIENT"}, "bf16"),
        (80, set(), "fp32"),
    ],
)
def test_compiles(monkeypatch, tmp_path, capability, flags, dtype):
    """A cubin for the GPU named, whose registers suffice: nothing of a row is spilled to memory and read again."""
    pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = logits_tile_triton._fold_kernel
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {name: "fp32" for name in types if name.endswith(("scale", "softcap"))}
    types |= {name: "*fp32" for name in types if name.endswith("_ptr")}
    types |= {"labels_ptr": "*i64", "bias_ptr": f"*{dtype}", "ref_bias_ptr": "*bf16", "gradient_ptr": f"*{dtype}"}
    constants = {name: name in flags for name in FLAGS} | {"BLOCK_SIZE": logits_tile_triton.BLOCK_SIZE}
    types |= dict.fromkeys(constants, "constexpr")
    # Pointers, strides and vocabularies are multiples of 16, as they mostly are
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name.endswith(("_ptr", "stride", "vocab"))
    }
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": logits_tile_triton.NUM_WARPS})

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"_fold_kernel:\s+REG:\d+ STACK:0 .*LOCAL:0 ", usage), usage


# On a GPU


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.fixture
def calls(monkeypatch):
    """The tiles that the Triton path was given, as their shapes; a test of it that used another would say nothing."""
    shapes = []

    def recorded(z, *args, fold_tile=logits_tile_triton.fold_tile):
        shapes.append(z.shape)
        return fold_tile(z, *args)

    monkeypatch.setattr(logits_tile_triton, "fold_tile", recorded)
    return shapes


def torch_path(monkeypatch):
    """From here on, `fold_tile` does without Triton."""
    monkeypatch.setattr(logits_tile, "is_triton_available", lambda: False)


@gpu
@pytest.mark.parametrize("block_size", [128, 2048])
@pytest.mark.parametrize("name", TILES)
def test_tile_on_gpu(monkeypatch, calls, name, block_size):
    """Oracles: the torch path on the same GPU, and float64."""
    monkeypatch.setattr(logits_tile_triton, "BLOCK_SIZE", block_size)
    tile = TILES[name]("cuda")
    tolerances = TILE_TOLERANCES.get(name, {"rtol": 5e-5, "atol": 5e-5})  # a GPU's exp and / are approximate
    found = tile.fold()
    assert calls == [tile.z.shape]
    assert_close(found, in_float64(tile), **tolerances)
    rounded, without = tile.fold(gradient_dtype=torch.bfloat16), tile.fold(gradient_dtype=None)
    torch.testing.assert_close(rounded["gradient"].float(), found["gradient"], rtol=2**-7, atol=1e-6)
    assert_close(without, found, **tolerances)
    torch_path(monkeypatch)
    assert_close(found, tile.fold(), **tolerances)
    assert len(calls) == 3


@gpu
@pytest.mark.parametrize("drift", [1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("spread", [2.0, 6.0])
def test_small_kls_are_accurate_on_gpu(spread, drift):
    """Oracle: float64."""
    check_small_kl(spread, drift, device="cuda")


@gpu
def test_series_on_gpu():
    check_series(device="cuda")


@gpu
@pytest.mark.parametrize("name", ["plain", "all different"])
def test_policy_equal_to_reference_has_kl_zero_on_gpu(calls, name):
    """Limit: KL exactly 0, not nearly: if the compiler rounds a × b + c once, it must do so for both models."""
    tile = TILES[name]("cuda")
    tile.ref_z, tile.ref_head = tile.z, tile.head
    result = tile.fold()
    assert len(calls) == 1
    assert torch.equal(result["position_kl"], torch.zeros_like(result["position_kl"]))
    assert torch.equal(result["log_probs"], result["ref_log_probs"])


@gpu
@pytest.mark.parametrize("kept_rows", [41, 13, 0], ids=["kept", "partly-kept", "recomputed"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(41, 128256, 64), (7, 401, 33)], ids=str)
@pytest.mark.parametrize(
    ("function", "transform"),
    [(position_kl, {}), (position_kl, ALL_DIFFERENT), (log_probs, {"logit_scale": 0.5, "softcap": 2.0})],
)
def test_functions_on_gpu(monkeypatch, calls, function, transform, shape, dtype, kept_rows):
    """
    Oracles: float64 full logits, and the torch path on the same GPU, which has the same matrix products.

    Ten rows in a tile, so that there are several, and a rest.
    """
    tokens, vocabulary, _ = shape
    monkeypatch.setitem(sys.modules[position_kl.__module__].TILE_ELEMENTS, "cuda", 10 * vocabulary)
    heads = Heads(*shape, dtype=dtype, bias=bool(transform), device="cuda")
    options = transform | {"kept_gradient_bytes": kept_rows * vocabulary * dtype.itemsize}
    check(heads, function, tolerances=TOLERANCES[dtype], **options)
    assert {columns for _, columns in calls} == {vocabulary}

    def everything():
        result = heads(function, **options)
        return result, heads.gradients(next(iter(result.values())))

    values, gradients = everything()
    torch_path(monkeypatch)
    expected_values, expected_gradients = everything()
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    for name in values.keys() - {"is_top1"}:  # ties apart, it is `check` that decides
        torch.testing.assert_close(values[name], expected_values[name], rtol=value_tolerance, atol=value_tolerance)
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=gradient_tolerance, atol=gradient_tolerance * largest
        )


@gpu
@pytest.mark.parametrize("function", [position_kl, log_probs])
def test_no_completion_positions_on_gpu(function):
    """Without a row there is nothing to launch."""
    heads = Heads(0, 401, 16, bias=True, device="cuda")
    heads.gradients(next(iter(heads(function).values())))


@gpu
def test_trained_head_at_full_size_on_gpu():
    """Oracle: float64 full logits; the device's own tile sizes, a head in bf16 and a frozen reference of another width."""
    heads = Heads(600, 128256, 128, dtype=torch.bfloat16, device="cuda")
    larger = Heads(600, 128256, 256, dtype=torch.bfloat16, seed=1, device="cuda")
    heads.ref_hidden, heads.ref_weight = larger.ref_hidden, larger.ref_weight
    check(heads, tolerances=TOLERANCES[torch.bfloat16], kept_gradient_bytes=100 * 128256 * 2)
