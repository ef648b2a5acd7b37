"""Which tensor a projection's output becomes part of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_prune.reconstruction.sums import SumWatch

X, Y, Z = torch.randn(3, 2, 3, 4).unbind()


def norm(x):
    return F.layer_norm(x, [4])


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda y: norm(Y + y), X + Y),
        (lambda y: norm(y + Y), X + Y),
        (lambda y: norm(torch.add(Y, y)), X + Y),
        (lambda y: norm(y.add_(Y)), X + Y),
        (lambda y: norm(Y + (Z + y)), X + Y + Z),
        (lambda y: norm(Y + F.dropout(y, 0.5, training=False)), X + Y),
        (lambda y: norm(Y.view(6, 4) + y.view(6, 4)), (X + Y).view(6, 4)),
        (lambda y: norm((Y + y).to(torch.float32)), X + Y),
        (lambda y: Y + y if y.shape == Y.shape and y.dtype == Y.dtype else y, X + Y),
        (lambda y: norm(y), None),
        (lambda y: y * 2 + Y, None),
        (lambda y: torch.add(Y, y, alpha=2), None),
        (lambda y: y + 1.0, None),
        (lambda y: y + Y[0, 0], None),
        (lambda y: y.mT + Y.mT, None),
        (lambda y: Y, None),
    ],
)
def test_what_is_added_is_followed_until_something_else_is_done(forward, expected):
    y, ended = X.clone(), []
    watch = SumWatch(lambda: ended.append(True))
    with watch:
        watch.follow("y", y)
        forward(y)
        found = watch.take().get("y")
    assert (found is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(found, expected)
    assert not watch.is_open
    assert len(ended) <= 1


def test_what_comes_behind_the_end_is_not_followed():
    y = X.clone()
    watch = SumWatch(lambda: None)
    with watch:
        watch.follow("y", y)
        s = y + Y
        norm(s)
        s + Z
    torch.testing.assert_close(watch.take()["y"], X + Y)
    with watch:
        y + Y
    assert watch.take() == {}


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x / x.norm()


class KernelNorm(nn.Module):
    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return Kernel.apply(x)


@pytest.mark.parametrize(("module", "expected"), [(KernelNorm(), X + Y), (nn.Dropout(0.5).eval(), X + Y + Z)])
def test_a_module_of_its_own_kernel_is_another_use(module, expected):
    y, watch = X.clone(), SumWatch()
    with watch:
        watch.follow("y", y)
        s = Y + y
        module(s)
        s + Z
    torch.testing.assert_close(watch.take()["y"], expected)


def test_several_are_followed_at_once():
    y, z, watch = X.clone(), Z.clone(), SumWatch()
    with watch:
        watch.follow("y", y)
        watch.follow("z", z)
        norm((y + z) + Y)
    found = watch.take()
    torch.testing.assert_close(found["y"], X + Z + Y)
    assert found["y"] is found["z"]
