"""Two equal calls of an operator with several results are two tensors for the caller, not one twice."""

import pytest
import torch
import torch.nn.functional as F

from liger_compile.runtime.separate_outputs import separating


def two_losses(x, w, labels):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.float(), labels)


def two_norms(x, w, labels):
    return F.rms_norm(x, (8,), w[0], 1e-6), F.rms_norm(x, (8,), w[0], 1e-6)


def two_layer_norms(x, w, labels):
    """Not rewritten: stock torch.compile returns one tensor twice."""
    return F.layer_norm(x, (8,), w[0]), F.layer_norm(x, (8,), w[0])


def one_with_views(x, w, labels):
    first, second = two_layer_norms(x, w, labels)
    return first, second, second.view(-1), first.t(), second[1:]


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize(
    ("policy", "inner"), [("always", "aot_eager"), ("always", "inductor"), ("never", "aot_eager")]
)
@pytest.mark.parametrize("function", [two_losses, two_norms, two_layer_norms, one_with_views])
def test_a_write_changes_one_of_two_equal_outputs(function, policy, inner, has_gradients):
    x, w = torch.randn(6, 8), torch.randn(5, 8)
    labels = torch.randint(5, (6,))
    options = {"liger.policy": policy, "liger.inner": inner}
    compiled = torch.compile(function, backend="liger", options=options)
    for _ in range(2):  # the first call looks for shared memory, the others know
        results = []
        for each in (compiled, function):
            leaves = [tensor.clone().requires_grad_(has_gradients) for tensor in (x, w)]
            outputs = each(*leaves, labels)
            if has_gradients:
                total = sum((at + 1) * output.square().sum() for at, output in enumerate(outputs))
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)
            else:
                gradients = ()
            with torch.no_grad():
                outputs[0].add_(1)
                outputs[1].mul_(3)
            results.append((outputs, gradients))
        torch.testing.assert_close(results[0], results[1])


def test_copies_share_memory_only_where_the_outputs_of_the_graph_do():
    x, kept = torch.arange(6.0), torch.ones(2)
    call = separating(lambda: (x, x, x.view(2, 3), kept, None, x[2:]), [1, 2, 2, 3, None, 2])
    first, *rest = call()
    assert rest[2] is kept and rest[3] is None
    rest[0].zero_()
    assert first.sum() == 15 and not any(each.sum() for each in (rest[1], rest[4]))  # the larger group stays
    assert call()[0].data_ptr() != x.data_ptr() and call()[1].data_ptr() == x.data_ptr()


def test_nothing_is_copied_where_memory_is_shared_on_purpose():
    x = torch.ones(3)
    call = separating(lambda: (x, x.view(3, 1), torch.ones(2)), [1, 1, 2])
    assert call()[0] is x and call()[1].data_ptr() == x.data_ptr()
