"""What only a GPU itself can show: what torch's allocators keep, streams, deterministic algorithms. Other tests
with the mark `gpu` stand beside what they are about.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch

import blockmerge
from blockmerge import LiveMerge
from tests import oracle
from tests.small_models import small_model
from tests.test_live import module_of, unet_of, values

pytestmark = pytest.mark.gpu


@pytest.fixture
def u_nets():
    return [unet_of(small_model(seed=seed)) for seed in range(3)]


@pytest.mark.parametrize("fails", [False, True])
def test_no_memory_is_kept_after_a_merge_of_files(big_pair, tmp_path, fails):
    calls = count()

    @blockmerge.merge_method()
    def half(a, b, *, alpha):
        """Fails in the fifth piece, if at all."""
        if next(calls) == 4 and fails:
            raise ValueError("the fifth")
        return (a + b) / 2

    torch.ones(1, device="cuda").add_(1)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    given = {"method": half, "weights": 0.5, "device": "cuda", "output": tmp_path / "out.safetensors"}
    if fails:
        with pytest.raises(blockmerge.RecipeError, match="the fifth"):  # the error is held
            blockmerge.merge(*big_pair, **given)
    else:
        blockmerge.merge(*big_pair, **given)
    assert torch.cuda.memory_reserved() == before


def test_apply_on_a_side_stream(u_nets):
    wanted = module_of(u_nets[0])
    LiveMerge(wanted, *u_nets[:2]).apply(weights=0.4)
    module = module_of(u_nets[0]).cuda()
    live = LiveMerge(module, *u_nets[:2])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # so that `close` comes before it
        live.apply(weights=0.4)
        found = {name: one.clone() for name, one in values(module).items()}
    live.close()
    del live
    filled = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    assert filled
    for name, one in values(wanted).items():
        step = oracle.step_at(torch.maximum(u_nets[0][name].abs(), u_nets[1][name].abs()), one.dtype)
        assert ((found[name].cpu().double() - one.double()).abs() <= step).all(), name


def test_ties_is_deterministic(u_nets):
    there = [{name: tensor.cuda() for name, tensor in model.items()} for model in u_nets]
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (blockmerge.merge_state_dicts(*there, method="ties", weights=0.4) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = blockmerge.merge_state_dicts(*u_nets, method="ties", weights=0.4)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert torch.allclose(tensor.cpu(), wanted[name], rtol=1e-2, atol=1e-3), name
