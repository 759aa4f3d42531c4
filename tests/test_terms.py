"""Equal mathematics is one term; different mathematics, or another rounding, is not."""

import math

import pytest
import torch
import torch.nn.functional as F

from liger_compile.graphs.aliasing import Mutations
from liger_compile.terms.build import Terms
from liger_compile.terms.term import Term

torch.manual_seed(0)


def terms_of(function, *args, dynamic=None):
    """The terms of what `function` returns, from the graph that Dynamo captures."""
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (gm,) = graphs
    terms = Terms(gm.graph, Mutations(gm.graph))
    outputs = gm.graph.output_node().args[0]
    return [terms.of[node] for node in outputs]


X = torch.rand(3, 4, 8) + 0.5
HALF = X.bfloat16()

SAME = {
    "square": (
        lambda x: x * x,
        lambda x: x.pow(2),
        lambda x: x**2.0,
        torch.square,
        lambda x: torch.pow(x, 2),
        lambda x: torch.mul(x, other=x),
    ),
    "rsqrt": (
        torch.rsqrt,
        lambda x: x**-0.5,
        lambda x: 1 / x.sqrt(),
        lambda x: torch.reciprocal(torch.sqrt(x)),
        lambda x: x.sqrt() ** -1,
        lambda x: 1.0 / torch.pow(x, 0.5),
    ),
    "mean": (
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.mean(dim=[-1], keepdim=True),
        lambda x: torch.mean(x, 2, True),
        lambda x: x.sum(-1, keepdim=True) / 8,
        lambda x: x.sum(-1, keepdim=True) * 0.125,
        lambda x: x.mean(-1).unsqueeze(-1),
        lambda x: x.mean(-1)[..., None],
        lambda x: x.sum(2).view(3, 4, 1) / x.shape[-1],
        lambda x: (x.sum(-1) / 8).unsqueeze(-1),
    ),
    "sum of squares": (
        lambda x: x.square().sum(-1),
        lambda x: torch.einsum("btd,btd->bt", x, x),
        lambda x: torch.einsum("...d, ...d -> ...", x, x),
    ),
    "transposed": (  # Dynamo calls aten for the attribute from torch 2.14 on
        lambda x: x.mT,
        lambda x: x.transpose(-1, -2),
        torch.ops.aten.mT,
        torch.ops.aten.mT.default,
    ),
    "transposed matrix": (
        lambda x: x[0].T,
        lambda x: x[0].t(),
        lambda x: torch.ops.aten.numpy_T(x[0]),
    ),
    "halves": (
        lambda x: x[..., :4] / x[..., 4:],
        lambda x: torch.div(*x.unflatten(-1, (2, -1)).unbind(-2)),
        lambda x: x.view(3, 4, 2, 4)[:, :, 0] / x.reshape(3, 4, 2, 4)[:, :, 1],
    ),
    "pairs": (
        lambda x: x[..., ::2] / x[..., 1::2],
        lambda x: x.view(3, 4, 4, 2)[..., 0] / x.view(3, 4, 4, 2)[..., 1],
        lambda x: torch.div(*x.unflatten(-1, (-1, 2)).unbind(-1)),
    ),
    "joined halves": (
        lambda x: torch.cat((x.sin(), x.cos()), -1),
        lambda x: torch.stack((x.sin(), x.cos()), -2).flatten(-2),
        lambda x: torch.stack((x.sin(), x.cos()), 2).view(3, 4, 16),
    ),
    "a view before or after": (
        lambda x: F.relu(x.view(12, 8)) ** 2,
        lambda x: F.relu(x).square().view(12, 8),
        lambda x: F.relu(x).flatten(0, 1) ** 2,
    ),
    "complex pairs": (
        lambda x: torch.view_as_complex(x.view(3, 4, 4, 2)),
        lambda x: torch.complex(x[..., ::2], x[..., 1::2]),
        lambda x: torch.complex(*x.unflatten(-1, (4, 2)).unbind(-1)),
    ),
    "parts of complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.view(3, 4, 4, 2)) * 2),
        lambda x: torch.stack(
            (
                (torch.complex(x[..., ::2], x[..., 1::2]) * 2).real,
                (torch.complex(x[..., ::2], x[..., 1::2]) * 2).imag,
            ),
            -1,
        ),
    ),
    "root mean square": (
        lambda x: x.pow(2).mean(-1, keepdim=True).sqrt(),
        lambda x: x.norm(2, dim=-1, keepdim=True) / math.sqrt(8),
        lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) * 8**-0.5,
    ),
    "silu": (
        F.silu,
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(x) * x,
        lambda x: x / (1 + torch.exp(-x)),
    ),
    "gelu": (
        F.gelu,
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * (torch.erf(x * 0.7071067811865476) + 1.0) / 2,
    ),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "rotate half": (
        lambda x: torch.cat((-x[..., 4:], x[..., :4]), dim=-1),
        lambda x: torch.cat([x.chunk(2, -1)[1].neg(), x.chunk(2, -1)[0]], -1),
        lambda x: torch.cat((-1 * x.split(4, dim=-1)[1], x.narrow(-1, 0, 4)), axis=2),
        lambda x: torch.concat((-x[:, :, 4:8], x[:, :, 0:4]), 2),
    ),
    "rotate pairs": (
        lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
        lambda x: torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).reshape(x.shape),
        lambda x: torch.cat((-x[..., 1::2, None], x[..., ::2].unsqueeze(-1)), -1).view(3, 4, 8),
    ),
    "nothing": (
        lambda x: x + 0,
        lambda x: (x * 1.0).contiguous(),
        lambda x: x[:, 0:, :] / 1,
        lambda x: F.dropout(x, 0.0),
        lambda x: x.view(12, 8).reshape(3, 4, 8),
        lambda x: x.transpose(0, 1).transpose(1, 0) + 0,
        lambda x: torch.cat((x, torch.empty(3, 4, 0)), -1),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_value_are_one_term(name):
    spellings = SAME[name]
    found = terms_of(lambda x: tuple(spelling(x) for spelling in spellings), X)
    assert all(term is found[0] for term in found), found


DIFFERENT = {
    "abs is no identity": (lambda x: (x * x).sqrt(), lambda x: x * 1.5),
    "sum is no mean": (lambda x: x.sum(-1), lambda x: x.mean(-1)),
    "another dimension": (lambda x: x.mean(-1, keepdim=True), lambda x: x.mean(-2, keepdim=True)),
    "another constant": (lambda x: x + 1e-5, lambda x: x + 1e-6),
    "sign of the rotation": (
        lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1),
        lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1),
    ),
    "another product of matrices": (
        lambda x: torch.einsum("btd,bsd->bts", x, x),
        lambda x: torch.einsum("btd,btd->bt", x, x),
    ),
    "halves of the tokens": (
        lambda x: x.view(3, 2, 2, 8)[:, 0],
        lambda x: x.view(3, 2, 2, 8)[:, :, 0],
    ),
    "order of the halves": (
        lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1),
        lambda x: torch.cat((-x[..., :4], x[..., 4:]), -1),
    ),
    "kinds of gelu": (F.gelu, lambda x: F.gelu(x, approximate="tanh")),
    "dropout": (lambda x: F.dropout(x, 0.5), lambda x: F.dropout(x, 0.5)),
    "random numbers": (torch.rand_like, torch.rand_like),
    "detached": (lambda x: x.detach() * 2, lambda x: x * 2),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_values_are_different_terms(name):
    first, second = DIFFERENT[name]
    a, b = terms_of(lambda x: (first(x), second(x)), X)
    assert a is not b


def test_a_cast_is_a_term_and_its_place_is_kept():
    def f(x, w):
        x32 = x.float()
        return w * x32.to(x.dtype), (w.float() * x32).to(x.dtype), w * x

    before, after, plain = terms_of(f, HALF, torch.rand(8).bfloat16())
    assert before is plain  # up and down again changes nothing
    assert after is not before and after.uncast is before.uncast


def test_promotion_is_a_cast():
    implicit, explicit = terms_of(lambda x, w: (x * w, x.float() * w), HALF, torch.rand(8))
    assert implicit is explicit


def test_a_cast_moves_out_of_what_moves_elements_only():
    def f(x):
        return (
            x.float()[..., :4],
            x[..., :4].float(),
            torch.cat((-x.float()[..., 4:], x.float()[..., :4]), -1),
            torch.cat((-x[..., 4:], x[..., :4]), -1).float(),
        )

    a, b, c, d = terms_of(f, HALF)
    assert a is b and c is d


def test_autocast_makes_casts_without_a_node():
    def f(x, w):
        return F.linear(x, w), F.linear(x.bfloat16(), w.bfloat16())

    with torch.autocast("cpu", torch.bfloat16):
        ambient, written_out = terms_of(f, X, torch.rand(5, 8))
    assert ambient is written_out


def test_heads_and_losses_take_their_tokens_in_any_shape():
    target = torch.randint(0, 5, (3, 4))

    def f(x, w):
        logits = F.linear(x, w)
        return (
            F.cross_entropy(logits.view(-1, 5), target.view(-1)),
            F.cross_entropy((x.view(-1, 8) @ w.t()), target.flatten()),
            F.cross_entropy(torch.einsum("btd,vd->btv", x, w).flatten(0, 1), target.flatten()),
            F.cross_entropy(torch.einsum("...d,dv->...v", x, w.T).flatten(0, 1), target.flatten()),
            F.cross_entropy(torch.matmul(x, w.T).flatten(0, 1).clone(), target.flatten()),
            F.cross_entropy(logits.transpose(1, 2), target),
            torch.nn.CrossEntropyLoss()(logits.flatten(0, 1), target.reshape(12)),
            F.nll_loss(F.log_softmax(logits, dim=-1).view(-1, 5), target.view(-1)),
        )

    losses = terms_of(f, X, torch.rand(5, 8))
    assert all(loss is losses[0] for loss in losses), losses


def test_a_slice_of_logits_is_the_head_of_a_slice():
    def f(x, w, target):
        logits = F.linear(x, w)
        shifted = F.cross_entropy(logits[:, :-1].float().reshape(-1, 5), target)
        return shifted, F.cross_entropy(F.linear(x[:, :-1], w).float().reshape(-1, 5), target)

    a, b = terms_of(f, X, torch.rand(5, 8), torch.randint(0, 5, (9,)))
    assert a is b


def test_symbolic_sizes_add_no_guard():
    def f(x, w):
        rows, inner = x.shape[0] * x.shape[1], x.shape[2]
        return F.linear(x.view(rows, inner), w).view(x.shape[0], x.shape[1], -1), F.linear(x, w)

    a, b = terms_of(f, X, torch.rand(5, 8), dynamic=True)
    assert a is b


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, None)], ids=str)
def test_views_of_no_elements_have_slices(part):
    (term,) = terms_of(lambda x: (x.reshape(2, 0, 8)[part],), torch.empty(2, 0, 2, 4))
    assert isinstance(term, Term) and term.shape == (1, 0, 8)


def test_an_unknown_operator_is_an_opaque_leaf():
    def f(x):
        return torch.cumsum(x, -1), torch.fft.fft(x), x.sort(-1)[0], x.roll(1, -1)

    assert all(isinstance(term, Term) and term.op == "leaf" for term in terms_of(f, X))


def test_terms_grow_linearly_with_a_residual_stream():
    def sizes(layers):
        def f(x, w):
            for _ in range(layers):
                x = x + torch.tanh(F.linear(x, w))
            return (x,)

        (term,) = terms_of(f, X, torch.rand(8, 8))
        return len(term.operations())

    assert sizes(12) - sizes(8) == sizes(8) - sizes(4)
