"""What looks like a pattern and is none: what the report says of it, in which line; and what it says nothing of.

Each function is a graph. The line that differs from the pattern ends in "# here".
"""

import pytest
import torch
import torch.nn.functional as F

from liger_compile.pattern import Pattern

HALF = torch.bfloat16
X, Y, W = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.rand(16) + 0.5
COS, SIN = torch.randn(5, 16), torch.randn(5, 16)
COS_HALF, SIN_HALF = COS[:, :8], SIN[:, :8]
DOWN, TARGET = torch.randn(16, 16), torch.randint(0, 16, (3, 5))

TOLD, SILENT = [], []


def reports(pattern, sentence, *inputs, patterns=()):
    def add(function):
        TOLD.append(pytest.param(function, pattern, sentence, inputs, patterns, id=function.__name__))
        return function

    return add


def silent(*inputs):
    def add(function):
        SILENT.append(pytest.param(function, inputs, id=function.__name__))
        return function

    return add


# RMSNorm


@reports("rms_norm", "sum(x**2) is found where mean(x**2) is expected: this is an L2 norm", X)
def l2_norm(x):
    total = (x * x).sum(-1, keepdim=True)  # here
    return x * torch.rsqrt(total + 1e-6)


@reports(
    "rms_norm", "mean(x**2) + inf is shifted by inf, expected a number that float32 represents exactly", X, W
)
def norm_with_an_infinite_eps(x, w):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.inf)  # here
    return w * (x * inverse)


@reports("rms_norm", "this is an L2 norm, which does not divide by the number of channels", X, W)
def weighted_l2_norm(x, w):
    total = x.pow(2).sum(-1, keepdim=True)  # here
    return w * (x * torch.rsqrt(total + 1e-6))


@reports("rms_norm", "this is an L2 norm", X)
def l2_norm_by_vector_norm(x):
    return x / x.norm(dim=-1, keepdim=True)  # here


@reports("rms_norm", "var(...) is found where mean(x**2) is expected: this is LayerNorm", X, W)
def layer_norm_by_variance(x, w):
    centered = x - x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)  # here
    return w * (centered * torch.rsqrt(variance + 1e-6))


@reports("rms_norm", "the mean is subtracted in one of them only; LayerNorm subtracts it in both", X, W)
def variance_without_centring(x, w):
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.pow(2).mean(-1, keepdim=True)
    inverse = torch.rsqrt(variance + 1e-6)
    return w * (x * inverse)  # here


@reports("rms_norm", "x and y are found where x, one tensor, is expected", X, Y, W)
def norm_of_another_tensor(x, y, w):
    inverse = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (x * inverse)  # here


@reports("rms_norm", "the mean is taken over dimension -2, expected over dimension -1", X, W)
def norm_over_tokens(x, w):
    mean = x.pow(2).mean(-2, keepdim=True)  # here
    return w * (x * torch.rsqrt(mean + 1e-6))


@reports("rms_norm", "the mean is taken over dimensions -2, -1, expected over dimension -1", X, W)
def norm_over_all_but_the_batch(x, w):
    mean = x.pow(2).mean((-2, -1), keepdim=True)  # here
    return w * (x * torch.rsqrt(mean + 1e-6))


@reports("rms_norm", "eps is added to the root, not under it", X, W)
def eps_outside_the_root(x, w):
    root = x.pow(2).mean(-1, keepdim=True).sqrt()
    return w * (x / (root + 1e-6))  # here


@reports("rms_norm", "nothing is added to mean(x**2), expected eps", X, W)
def no_eps(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)  # here
    return w * (x * torch.rsqrt(mean))


@reports("rms_norm", "e is added, expected a number, eps", X, W, torch.rand(16))
def eps_for_each_channel(x, w, e):
    mean = x.pow(2).mean(-1, keepdim=True)
    shifted = mean + e  # here
    return w * (x * torch.rsqrt(shifted))


@reports("rms_norm", "clamp is between mean and a product", X, W)
def eps_as_a_bound(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    mean = mean.clamp(min=1e-6)  # here
    return w * (x * torch.rsqrt(mean))


@reports("rms_norm", "abs(x) is found where x**2 is expected", X, W)
def norm_of_absolute_values(x, w):
    size = x.abs()  # here
    return w * (x * torch.rsqrt(size.mean(-1, keepdim=True) + 1e-6))


@reports("rms_norm", "x**4 is found where x**2 is expected", X, W)
def fourth_power(x, w):
    power = x.pow(4)  # here
    return w * (x * torch.rsqrt(power.mean(-1, keepdim=True) + 1e-6))


@reports("rms_norm", "the root is missing", X, W)
def no_root(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    return w * (x / (mean + 1e-6))  # here


@reports("rms_norm", "sqrt(mean(x**2) + 1e-06) is found where rsqrt(mean(x**2) + eps) is expected", X, W)
def times_the_root(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    root = torch.sqrt(mean + 1e-6)  # here
    return w * (x * root)


@reports("rms_norm", "it normalizes by the largest channel, not by the root mean square", X, W)
def largest_channel(x, w):
    largest = x.pow(2).amax(-1, keepdim=True)  # here
    return w * (x * torch.rsqrt(largest + 1e-6))


# RMSNorm, rounded elsewhere


@reports("rms_norm", "x**2 is computed in bfloat16, expected in float32", X.to(HALF), W.to(HALF))
def norm_without_upcast(x, w):
    square = x.pow(2)  # here
    return w * (x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6))


@reports("rms_norm", "x**2 is computed in bfloat16, expected in float32", X.to(HALF), W.to(HALF))
def square_before_the_upcast(x, w):
    square = x.pow(2)  # here
    inverse = torch.rsqrt(square.float().mean(-1, keepdim=True) + 1e-6)
    return w * (x.float() * inverse).to(x.dtype)


@reports("rms_norm", "mean(x**2) is rounded to bfloat16, expected not to be", X.to(HALF), W.to(HALF))
def rounded_mean(x, w):
    mean = x.float().pow(2).mean(-1, keepdim=True)
    mean = mean.to(x.dtype)  # here
    return w * (x.float() * torch.rsqrt(mean.float() + 1e-6)).to(x.dtype)


@reports("rms_norm", "mean(x**2) + 1e-06 is rounded to bfloat16, expected not to be", X.to(HALF), W.to(HALF))
def rounded_sum(x, w):
    shifted = x.float().pow(2).mean(-1, keepdim=True) + 1e-6
    shifted = shifted.to(x.dtype)  # here
    return w * (x.float() * torch.rsqrt(shifted.float())).to(x.dtype)


# Rotary


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@reports("rotary", "x and y are found where q, one tensor, is expected", X, Y, COS, SIN)
def rotates_another_tensor(x, y, cos, sin):
    turned = rotate_half(y)
    return x * cos + turned * sin  # here


@reports(
    "rotary", "roll(...) is found where rotate_half(q) is expected: nothing in it is negated", X, COS, SIN
)
def rolled_halves(x, cos, sin):
    turned = x.roll(8, -1)  # here
    return x * cos + turned * sin


@reports("rotary", "nothing in it is negated, so pairs are mirrored instead of rotated", X, COS, SIN)
def mirrored_halves(x, cos, sin):
    first, second = x.chunk(2, -1)
    turned = torch.cat((second, first), -1)  # here
    return x * cos + turned * sin


@reports("rotary", "nothing in it is negated, so pairs are mirrored instead of rotated", X, COS, SIN)
def mirrored_pairs(x, cos, sin):
    turned = torch.stack((x[..., 1::2], x[..., ::2]), -1)
    turned = turned.flatten(-2)  # here
    return x * cos + turned * sin


@reports(
    "rotary",
    "cat(-q[..., 6:], q[..., :6]) is found where rotate_half(q) is expected: a rotation has",
    X,
    COS,
    SIN,
)
def uneven_halves(x, cos, sin):
    turned = torch.cat((-x[..., 6:], x[..., :6]), -1)  # here
    return x * cos + turned * sin


@reports("rotary", "cat(q[..., :8], -q[..., 8:]) is found where rotate_half(q) is expected", X, COS, SIN)
def halves_that_stay(x, cos, sin):
    first, second = x.chunk(2, -1)
    turned = torch.cat((first, -second), -1)  # here
    return x * cos + turned * sin


@reports("rotary", "cat(-q[..., 8:], -q[..., :8]) is found where rotate_half(q) is expected", X, COS, SIN)
def both_halves_negated(x, cos, sin):
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, -first), -1)  # here
    return x * cos + turned * sin


@reports("rotary", "sin * q[..., :8] has the other sign", X, COS_HALF, SIN_HALF)
def halves_with_two_plus_signs(x, cos, sin):
    a, b = x.chunk(2, -1)
    first = a * cos + b * sin
    second = b * cos + a * sin  # here
    return torch.cat((first, second), -1)


@reports("rotary", "are found where cos, one tensor, is expected", X, COS_HALF, SIN_HALF, COS_HALF + 1)
def halves_by_two_tables(x, cos, sin, other):
    a, b = x.chunk(2, -1)
    first = a * cos - b * sin
    second = b * other + a * sin  # here
    return torch.cat((first, second), -1)


@reports(
    "rotary",
    "freqs + view_as_complex(q) is found where freqs * view_as_complex(q) is expected",
    X,
    torch.randn(5, 8).cfloat(),
)
def shifted_complex_pairs(x, freqs):
    pairs = torch.view_as_complex(x.reshape(3, 5, 8, 2))
    pairs = pairs + freqs  # here
    return torch.view_as_real(pairs).flatten(-2)


@reports(
    "rotary",
    "s * cos is found where cos, one tensor, is expected, and no node computes it as one value; multiply these factors "
    "first",
    X,
    COS,
    SIN,
    torch.rand(5, 16),
)
def scaled_rotation(t, cos, sin, s):
    first = t * cos * s
    second = rotate_half(t) * sin * s  # here
    return first + second


@reports(
    "rotary",
    "nothing in it is negated, and whether signs or sin has the signs is not known; a rotation has cat((-second_half",
    X,
    COS,
    SIN,
    torch.tensor([-1.0, 1.0]).repeat_interleave(8),
)
def rolled_with_a_row_of_signs(x, cos, sin, signs):
    turned = x.roll(8, -1)  # here
    return x * cos + turned * signs * sin


# Gated MLP


@reports(
    "gated_mlp",
    "sigmoid(gate) is found where silu(gate) is expected: this is GLU, or an output gate",
    X,
    Y,
    DOWN,
)
def output_gate(attended, gate, w):
    gate = torch.sigmoid(gate)  # here
    return F.linear(attended * gate, w)


@reports("gated_mlp", "relu(gate) is found where silu(gate) is expected: this is ReGLU", X, Y, DOWN)
def reglu(gate, up, w):
    gate = F.relu(gate)  # here
    return F.linear(gate * up, w)


@reports("gated_mlp", "this gates with the square of tanh", X, Y, DOWN)
def squared_tanh_gate(gate, up, w):
    gate = torch.tanh(gate)  # here
    return F.linear(gate.square() * up, w)


@reports(
    "gated_mlp",
    "sigmoid(gate_up[..., 16:]) is found where silu(gate_up[..., :16]) is expected: this is GLU",
    torch.randn(3, 5, 32),
    DOWN,
)
def packed_glu(gate_up, w):
    h = F.glu(gate_up, -1)  # here
    return F.linear(h, w)


@reports(
    "gated_mlp", "this is the quick GELU, silu with a slope of 1.702", X.to(HALF), Y.to(HALF), DOWN.to(HALF)
)
def quick_gelu_gate_in_float32(gate, up, w):
    slope = torch.sigmoid(1.702 * gate.float())  # here
    return F.linear((gate * slope).to(up.dtype) * up, w)


@reports("gated_mlp", "up + silu(gate) is found where up * silu(gate) is expected", X, Y, DOWN)
def added_gate(gate, up, w):
    h = F.silu(gate) + up  # here
    return F.linear(h, w)


@reports("gated_mlp", "softplus(gate) is found where silu(gate) is expected", X, Y, DOWN)
def softplus_gate(gate, up, w):
    gate = F.softplus(gate)  # here
    return F.linear(gate * up, w)


@reports("gated_mlp", "mish(gate) is found where silu(gate) is expected: this gates with Mish", X, Y, DOWN)
def mish_gate(gate, up, w):
    gate = F.mish(gate)  # here
    return F.linear(gate * up, w)


@reports("gated_mlp", "hardsigmoid(gate) is found where silu(gate) is expected", X, Y, DOWN)
def hardsigmoid_gate(gate, up, w):
    gate = F.hardsigmoid(gate)  # here
    return F.linear(gate * up, w)


@reports("gated_mlp", "tanh(gate) is found where silu(gate) is expected: this is a tanh gate", X, Y, DOWN)
def tanh_gate(gate, up, w):
    gate = torch.tanh(gate)  # here
    return F.linear(gate * up, w)


@reports(
    "gated_mlp",
    "silu(gate) is computed in float32, expected in bfloat16",
    X.to(HALF),
    Y.to(HALF),
    DOWN.to(HALF),
)
def activation_in_float32(gate, up, w):
    gate = F.silu(gate.float()).to(up.dtype)  # here
    return F.linear(gate * up, w)


# Losses: the loss alone is replaced, and what keeps the head out of it is told.


def loss(logits, target):
    return F.cross_entropy(logits.view(-1, 16), target.view(-1))


@reports("linear_cross_entropy", "clamp is between linear and cross_entropy", X, DOWN, TARGET)
def clamped_logits(x, w, target):
    logits = F.linear(x, w)
    logits = logits.clamp(-30, 30)  # here
    return loss(logits, target)


@reports("linear_cross_entropy", "a mask is between linear and cross_entropy", X, DOWN, TARGET)
def masked_logits(x, w, target):
    logits = F.linear(x, w)
    logits = logits.masked_fill(w[0] > 0, -1e9)  # here
    return loss(logits, target)


@reports(
    "linear_cross_entropy", "1 / temperature is one factor more than expected", X, DOWN, TARGET, torch.rand(1)
)
def learned_temperature(x, w, target, temperature):
    logits = F.linear(x, w)
    logits = logits / temperature  # here
    return loss(logits, target)


@reports("linear_cross_entropy", "sigmoid is between linear and a scaling", X, DOWN, TARGET)
def softcap_by_sigmoid(x, w, target):
    logits = F.linear(x, w)
    logits = torch.sigmoid(logits / 7.5)  # here
    return loss(30 * logits, target)


@reports("linear_cross_entropy", "a sum is between linear and cross_entropy", X, DOWN, TARGET, Y)
def logits_with_a_prior(x, w, target, prior):
    logits = F.linear(x, w)
    logits = logits + prior  # here
    return loss(logits, target)


@reports("linear_cross_entropy", "layer_norm is between linear and cross_entropy", X, DOWN, TARGET)
def normed_logits(x, w, target):
    logits = F.linear(x, w)
    logits = F.layer_norm(logits, (16,))  # here
    return loss(logits, target)


@reports(
    "linear_cross_entropy",
    "a write in place (setitem) is between linear and cross_entropy",
    X,
    DOWN,
    TARGET,
)
def logits_written_over(x, w, target):
    logits = F.linear(x, w)
    logits[..., 3] = -1e4  # here
    return loss(logits, target)


@reports(
    "linear_cross_entropy",
    "a write in place (setitem) is between linear and cross_entropy",
    X.to(HALF),
    DOWN.to(HALF),
    TARGET,
)
def logits_written_over_and_cast(x, w, target):
    logits = F.linear(x, w)
    logits[..., 3] = -1e4  # here
    return loss(logits.float(), target)


@reports(
    "linear_cross_entropy", "a write in place (div_) is between linear and cross_entropy", X, DOWN, TARGET
)
def logits_divided_in_place(x, w, target):
    logits = F.linear(x, w)
    logits.div_(2)  # here
    return loss(logits, target)


# A pattern of the user's own


ATTEND = Pattern(
    "attend.mine",
    lambda scores, v: torch.softmax(scores, -1) @ v,
    lambda scores, v: torch.softmax(scores, -1) @ v,
    examples={"scores": torch.empty(2, 4, 4), "v": torch.empty(2, 4, 8)},
)


@reports("attend", "softmax has dim -2, expected -1", torch.randn(3, 5, 5), X, patterns=(ATTEND,))
def softmax_over_queries(scores, v):
    weights = torch.softmax(scores, 1)  # here
    return weights @ v


@pytest.mark.parametrize(("function", "pattern", "sentence", "inputs", "patterns"), TOLD)
def test_the_sentence_and_the_line(run_liger, function, pattern, sentence, inputs, patterns):
    result, (report,) = run_liger(function, *inputs, patterns=patterns)
    assert len(report.near_misses) == 1, report
    (near,) = report.near_misses
    assert near.pattern.split(".")[0] == pattern
    assert sentence in near.reason
    assert near.place.code.endswith("# here"), (near.reason, near.place.code)
    torch.testing.assert_close(result, function(*inputs))


def test_there_are_enough():
    assert len(TOLD) >= 40


# Nothing is told of these


@silent(X, Y, COS)
def a_product_and_a_sum(x, y, z):
    return x * y + z


@silent(X, Y, DOWN)
def a_product_projected(x, y, w):
    return F.linear(x * y, w)


@silent(X, DOWN, DOWN)
def an_mlp_without_a_gate(x, w, v):
    return F.linear(F.silu(F.linear(x, w)), v)


@silent(X, DOWN, DOWN)
def an_mlp_with_gelu(x, w, v):
    return F.linear(F.gelu(F.linear(x, w), approximate="tanh"), v)


@silent(X, W)
def a_layer_norm(x, w):
    return F.layer_norm(x, (16,), w)


@silent(X, Y)
def a_squared_error(x, y):
    return ((x - y) ** 2).mean()


@silent(X)
def a_normalized_adjacency(x):
    return x * x.sum(-1, keepdim=True).rsqrt()


@silent(X, Y)
def joined_products(x, y):
    return torch.cat((x * y + x, y * x - y), -1)


@silent(X, Y)
def attention_weights(x, y):
    return torch.softmax(x @ y.transpose(-1, -2), -1) @ y


@silent(torch.randn(3, 16, 5), torch.randn(16, 1, 3))
def silu_of_a_convolution(x, w):
    return F.silu(F.conv1d(x, w, padding=1, groups=16))


@silent(X[..., :1], Y)
def a_shared_expert(gate, expert):
    return torch.sigmoid(gate) * expert


@silent(X, Y)
def a_mix(x, y):
    share = torch.sigmoid(x.mean())
    return share * x + (1 - share) * y


@silent(X, Y, COS)
def three_factors_and_two(x, y, z):
    return x * y * z + x * y


@silent(X)
def a_unit_vector(x):
    return F.normalize(x, dim=-1)


@silent(X, W)
def an_rms_norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@silent(X, DOWN, TARGET)
def a_loss_of_its_head(x, w, target):
    return loss(F.linear(x, w), target)


@silent(X, TARGET)
def a_loss_of_given_logits(logits, target):
    return loss(logits, target)


@pytest.mark.parametrize(("function", "inputs"), SILENT)
def test_no_near_miss_is_reported(run_liger, function, inputs):
    _, (report,) = run_liger(function, *inputs)
    assert not report.near_misses, report


def test_one_difference_in_two_places_is_printed_once(run_liger):
    _, (report,) = run_liger(lambda x, y: (l2_norm(x), l2_norm(y)), X, Y)
    assert len(report.near_misses) == 2 and len({near.reason for near in report.near_misses}) == 1
    assert str(report).count("this is an L2 norm") == 1
