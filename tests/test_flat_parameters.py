"""Weights that are pieces of one buffer, as DeepSpeed, FSDP1 and flat optimizers make them, are weights like others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import liger_compile

CLASSES, WIDTH = 40, 16
FOUND = ["linear_cross_entropy.plain", "rms_norm.llama", "rms_norm.llama"]

LIBRARY = torch.library.Library("liger_test_flat_parameters", "DEF")
LIBRARY.define("unsaid(Tensor x) -> Tensor")  # its schema declares no write


def _writes_unsaid(x):
    with torch.no_grad():
        return x.mul_(1.5) + 0


LIBRARY.impl("unsaid", _writes_unsaid, "CompositeImplicitAutograd")
UNSAID = torch.ops.liger_test_flat_parameters.unsaid


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.first, self.last = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        hidden = hidden + self.layer(self.first(hidden))
        return F.cross_entropy(self.head(self.last(hidden)).flatten(0, 1), tokens.flatten())


def deepspeed(model):
    parameters = list(model.parameters())
    flat = torch._utils._flatten_dense_tensors([parameter.data for parameter in parameters])
    for parameter, piece in zip(
        parameters, torch._utils._unflatten_dense_tensors(flat, parameters), strict=True
    ):
        parameter.data = piece.data


def written_before(model):
    """In the pieces and in the buffer, before the first call."""
    deepspeed(model)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    flat = model.head.weight.detach().as_strided((CLASSES * WIDTH,), (1,), 0)
    flat.copy_(flat.clone() * 1.1)


def vector(model):
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    )


def no_first_piece(model):
    """No weight begins where the buffer begins."""
    for parameter in model.parameters():
        buffer = torch.zeros(3 + parameter.numel())
        buffer[3:] = parameter.data.flatten()
        parameter.data = buffer[3:].view(parameter.shape)


def tied(model):
    """Two parameters in the same memory."""
    deepspeed(model)
    model.last.weight.data = model.first.weight.data


def parameters_of(function, model, *args):
    """The loss, and the gradients of the parameters."""
    loss = function(*args)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), gradients


def compiled(function, **arguments):
    options = {"liger.policy": "always", "liger.inner": "aot_eager", "liger.strict": True}
    return torch.compile(function, backend="liger", options=options, **arguments)


def replaced():
    return sorted(
        site.pattern
        for report in liger_compile.reports()
        for site in report.sites
        if site.kind == "replace" and "attention" not in site.pattern
    )


def tokens_of(length):
    return torch.randint(CLASSES, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("way", "dynamic"),
    [
        *((deepspeed, True), (written_before, False), (vector, False)),
        *((no_first_piece, False), (tied, False)),
    ],
)
def test_pieces_of_a_buffer_are_found_like_other_weights(way, dynamic):
    model = Model()
    way(model)
    function = compiled(model, dynamic=dynamic)
    for length in (5, 8) if dynamic else (5,):
        tokens = tokens_of(length)
        torch.testing.assert_close(
            parameters_of(function, model, tokens), parameters_of(model, model, tokens)
        )
    assert replaced() == FOUND
    assert not any("written" in note or "writes" in note for r in liger_compile.reports() for note in r.notes)


def test_views_of_one_leaf_are_found():
    """The gradient is that of the buffer: weights are views of it, as in FSDP1."""
    model = Model()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    leaf = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).requires_grad_()

    def function(leaf, tokens):
        pieces = leaf.split([shape.numel() for shape in shapes.values()])
        weights = {name: p.view(shapes[name]) for name, p in zip(shapes, pieces, strict=True)}
        return functional_call(model, weights, (tokens,))

    def outside(leaf, tokens):
        pieces = leaf.split([shape.numel() for shape in shapes.values()])
        return inside({name: p.view(shapes[name]) for name, p in zip(shapes, pieces, strict=True)}, tokens)

    inside = compiled(lambda weights, tokens: functional_call(model, weights, (tokens,)))
    tokens, found = tokens_of(6), []
    for each in (function, compiled(function), outside):
        loss = each(leaf, tokens)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(found[1:], [found[0]] * 2)
    assert replaced() == sorted(2 * FOUND)


def with_default_policy(model):
    return torch.compile(model, backend="liger")


def test_training_under_inductor_writes_the_buffer_between_calls():
    """The optimizer has the buffer, and the weights change with it, without a new version."""
    found = []
    for compile_with in (copy.copy, with_default_policy):
        torch.manual_seed(0)
        model = Model()
        deepspeed(model)
        flat = model.embedding.weight.detach().as_strided((sum(p.numel() for p in model.parameters()),), (1,))
        function, losses = compile_with(model), []
        for length in (5, 5, 8):
            loss, gradients = parameters_of(function, model, tokens_of(length))
            losses.append(loss)
            flat.sub_(torch._utils._flatten_dense_tensors(gradients), alpha=0.5)
        found.append((losses, flat))
    torch.testing.assert_close(*found)
    assert "linear_cross_entropy.plain" in replaced()


def _scales_the_last(model, tokens):
    hidden = model.first(model.embedding(tokens))
    model.last.weight.data.mul_(1.5)
    return F.cross_entropy(model.head(model.last(hidden)).flatten(0, 1), tokens.flatten())


def _scales_before_backward(model, tokens):
    loss = model(tokens)
    model.last.weight.data.mul_(1.5)
    return loss


def _writes_unseen(model, tokens):
    return model(tokens) + UNSAID(model.layer.bias.detach()).sum() * 0


def _writes_data_unseen(model, tokens):
    return model(tokens) + UNSAID(model.last.weight.data).sum() * 0


def _writes_the_first_unseen(model, tokens):
    return UNSAID(model.embedding.weight.detach()).sum() * 0 + model(tokens)


@pytest.mark.parametrize(
    "write",
    [
        _scales_the_last,
        _scales_before_backward,
        _writes_unseen,
        _writes_the_first_unseen,
        _writes_data_unseen,
    ],
)
def test_writes_in_the_graph_count(write):
    """Loss and weights are those of eager code; what reads a weight that is written unseen is left alone."""
    model = Model()
    deepspeed(model)
    other = copy.deepcopy(model)  # pieces of one buffer, too
    tokens, function = tokens_of(5), compiled(write)
    found = function(model, tokens).detach(), list(model.parameters())
    torch.testing.assert_close(found, (write(other, tokens).detach(), list(other.parameters())))
    if "unseen" in write.__name__:
        assert replaced() == ["cross_entropy.upcast"]  # it reads no weight
