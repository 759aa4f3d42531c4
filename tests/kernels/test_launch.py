"""How kernels are launched: on the device of their tensors, through one door."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
import liger_compile
from liger_compile import functional as L
from liger_compile import kernels

PACKAGE = Path(liger_compile.__file__).parent
DOOR = PACKAGE / "kernels" / "__init__.py"


def launches(tree):
    """Calls of something indexed, kernel[grid](...), and the ways to launch that Triton and torch have besides."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node.func.value
        elif isinstance(node, ast.Name) and node.id in ("wrap_triton", "capture_triton"):
            yield node


def is_kernel(name, tree):
    return any(
        isinstance(node, ast.FunctionDef) and node.name == name and node.decorator_list for node in tree.body
    )


@pytest.mark.parametrize(
    "path", sorted(set(PACKAGE.rglob("*.py")) - {DOOR}), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_kernel_is_launched_but_by_launch(path):
    tree = ast.parse(path.read_text())
    for launched in launches(tree):
        text = ast.unparse(launched)
        if path.parent != DOOR.parent:
            assert not text.endswith("_kernel") and "triton" not in text, text
        else:
            assert text.startswith("launch("), text


def test_every_kernel_is_launched_by_its_name():
    """So that the test above has seen it."""
    for path in set(DOOR.parent.glob("*.py")) - {DOOR}:
        tree = ast.parse(path.read_text())
        seen = [ast.unparse(launched) for launched in launches(tree)]
        kernels = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        kernels = [name for name in kernels if name.endswith("_kernel") and is_kernel(name, tree)]
        assert {f"launch({name})" for name in kernels} == set(seen), path.name


second_device = pytest.mark.skipif(
    torch.cuda.device_count() == 1,
    reason="torch makes fake tensors only on devices that a machine with GPUs has",
)


class Recorder:
    """A kernel that takes down what it is launched with, and on which device."""

    def __init__(self, *arg_names):
        self.arg_names, self.calls, self.current = arg_names, [], []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs, *self.current))


@second_device
def test_a_kernel_runs_where_its_first_tensor_is(monkeypatch):
    kernel = Recorder("x_ptr", "rows")

    @contextlib.contextmanager
    def device(index):
        kernel.current.append(index)
        yield
        kernel.current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        here, there = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
    for tensors in ((here,), (there, here), (torch.empty(2),)):
        kernels.launch(kernel)[(3,)](*tensors, 2, num_warps=4)
    assert [call[0] for call in kernel.calls] == [(3,)] * 3
    assert [call[2] for call in kernel.calls] == [{"num_warps": 4}] * 3
    assert [call[3:] for call in kernel.calls] == [
        (),
        (1,),
        (),
    ]  # nothing is done where it is current already


@second_device
@pytest.mark.parametrize("is_early", [True, False])
def test_whether_launches_overlap_is_a_question_to_the_device_of_the_tensors(monkeypatch, is_early):
    kernel = Recorder("x_ptr", "OVERLAPS")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # Private: the answer of a device that is not here.
    monkeypatch.setattr(kernels, "_launches_early", lambda device: is_early and device == 1)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    kernels.launch(kernel)[(1,)](x)
    kernels.launch(kernel)[(1,)](torch.empty(2))
    early = {"OVERLAPS": True, "launch_pdl": True} if is_early else {"OVERLAPS": False}
    assert [call[2] for call in kernel.calls] == [early, {"OVERLAPS": False}]


def inputs_on(device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 64), (64,), (1, 2, 32, 64), (1, 2, 32, 64), (50, 64)]
    leaves = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]
    tables = [torch.randn(32, 64, generator=generator).to(device, torch.bfloat16) for _ in range(2)]
    target = torch.randint(0, 50, (32,), generator=generator).to(device)
    return [leaf.requires_grad_() for leaf in leaves], tables, target


def everything(leaves, tables, target):
    """One of each op of a model."""
    x, weight, q, k, head = leaves
    rotated = (*L.rotary(q, k, *tables), *L.norm_rotary(q, k, weight, None, *tables))
    hidden = L.rms_norm(x, weight) + L.pre_norm(x, weight)
    loss = L.linear_cross_entropy(hidden, head, target) + L.cross_entropy(hidden, target)
    return loss + sum(each.float().square().mean() for each in rotated)


def outcome(function, device):
    leaves, tables, target = inputs_on(device)
    loss = function(leaves, tables, target)
    rows = torch.ops.liger_compile.embedding_backward.default(leaves[0].detach(), target, 50, -1, False)
    return [loss.detach(), rows, *torch.autograd.grad(loss, leaves)]


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [None, "inductor", "aot_eager"])
def test_tensors_on_a_device_that_is_not_current(inner):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    function = everything
    if inner:
        function = torch.compile(everything, backend="liger", options={"liger.inner": inner})
    with torch.cuda.device(0):
        found = outcome(function, "cuda:1")
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        expected = outcome(everything, "cuda:1")
    # Inductor rounds elsewhere than the ops alone do; a single element may be several units of bfloat16 away.
    for one, other in zip(found, expected, strict=True):
        assert (one - other).float().norm() <= 1e-2 * other.float().norm()
