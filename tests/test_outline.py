"""Equal layers: one body is compiled, and called for each. Gradients are eager's; what differs is not merged."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import liger_compile
from tests.helpers.versions import INFERENCE_MODE
from tests.models.families import BY_NAME
from tests.models.harness import assert_within, batch, step

SIZE, ROWS, LAYERS = 8, 6, 5
FEWEST = 4  # layers that are merged; for whole models, whose layers take long to trace
MERGED = "is compiled for"
GRAPH = "eager"  # which layers are merged is decided before AOTAutograd, which takes half of the time


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    liger_compile.clear_reports()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """A residual layer. `change` differs from layer to layer where a test wants it."""

    def __init__(self, eps=1e-6, act=F.silu, scale=1.0, dtype=torch.float32):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))
        self.weight = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.eps, self.act, self.scale, self.dtype = eps, act, scale, dtype

    def forward(self, x):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        h = self.down((self.act(self.gate(h)) * self.up(h)).to(self.dtype).float())
        return x + h * self.scale if self.scale != 1.0 else x + h


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).sin()


def model_of(make=lambda at: Layer(), count=LAYERS):
    torch.manual_seed(0)
    return Model([make(at) for at in range(count)])


def inputs(*shape):
    return torch.randn(
        *(shape or (2, ROWS, SIZE)), generator=torch.Generator().manual_seed(1), requires_grad=True
    )


def compiled(function, inner="aot_eager", mode=None, outline="auto", **kwargs):
    options = {"liger.inner": inner, "liger.policy": "always", "liger.strict": True, "liger.outline": outline}
    return torch.compile(
        function,
        backend="liger",
        options={**options, "liger.mode": mode, **kwargs.pop("options", {})},
        **kwargs,
    )


def outcome(function, model, *args, seed=0):
    """Results and all gradients, also of the inputs."""
    model.zero_grad(set_to_none=True)
    args = [each.detach().clone().requires_grad_(each.requires_grad) for each in args]
    torch.manual_seed(seed)
    results = function(*args)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(each.float().square().sum() for each in results if each.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    gradients = [each.grad for each in (*args, *model.parameters())]
    return [*(each.detach() for each in results), *gradients, torch.rand(1)]


def notes():
    return [note for report in liger_compile.reports() for note in report.notes]


def counts():
    """For each body how many layers it stands for: "1 layer is compiled for 5" is 5."""
    said = [note for note in notes() if "compiled for" in note]
    return [int(note.split(" compiled for ")[1].split()[0]) for note in said]


def check(model, *args, expected=None, function=None, **kwargs):
    """The compiled function gives what eager mode gives, and bodies stand for so many layers."""
    function = function or model
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    want = outcome(function, model, *(args or (inputs(),)))
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    got = outcome(compiled(function, **kwargs), model, *(args or (inputs(),)))
    for found, wanted in zip(got, want, strict=True):
        assert_near(found, wanted)
    assert counts() == (expected or []), notes()


ROUNDING = 1e-5  # relative, L2, as for whole models in float32: an element near 0 may cancel


def assert_near(found, expected):
    """The same shape and dtype, and as near as sums in another order are."""
    if expected is None or not expected.is_floating_point():
        assert (found is None) == (expected is None) and (found is None or torch.equal(found, expected))
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert (found - expected).norm() <= ROUNDING * expected.norm()


def why():
    (note,) = (note for note in notes() if "one by one" in note)
    return note


# What is merged -------------------------------------------------------------------------------------------------


def test_equal_layers_are_compiled_once():
    check(model_of(), expected=[LAYERS])
    assert f"1 layer is compiled for {LAYERS} (layers.0 to layers.{LAYERS - 1})" in notes()


def test_option_off():
    check(model_of(), inner=GRAPH, outline="off", expected=[])


def test_few_layers_are_not_merged():
    check(model_of(count=3), inner=GRAPH, expected=[])


def test_groups_with_a_period():
    check(model_of(lambda at: Layer(act=(F.silu, F.gelu)[at % 2]), 8), inner=GRAPH, expected=[8])
    assert "2 layers are compiled for 8 (layers.0 to layers.7)" in notes()


@pytest.mark.parametrize("odd", [0, 4])
def test_an_odd_layer_at_an_end_stays(odd):
    check(model_of(lambda at: Layer(act=F.gelu if at == odd else F.silu)), inner=GRAPH, expected=[LAYERS - 1])


def test_two_stacks():
    check(model_of(lambda at: Layer(act=F.silu if at < 4 else F.gelu), 8), inner=GRAPH, expected=[4, 4])


def test_layers_without_modules():
    model = model_of()

    def function(x):
        for layer in model.layers:
            x = (
                x
                + F.silu(
                    F.linear(F.gelu(F.linear(x.sin().cos(), layer.gate.weight)).tanh(), layer.up.weight)
                ).exp()
                * 0.1
            )
            x = x * x.sigmoid() + F.linear(x.cos().tanh(), layer.down.weight).sigmoid() * layer.weight
        return x

    check(model, function=function, expected=[LAYERS])


def test_one_layer_called_often():
    layer = Layer()
    check(model_of(lambda _: layer), expected=[LAYERS])


def test_a_parameter_that_is_tied_in_one_layer_only():
    model = model_of()
    model.layers[0].up.weight = model.layers[0].gate.weight
    check(model, expected=[LAYERS])


def test_frozen_layers_with_adapters():
    class Adapted(Layer):
        def __init__(self):
            super().__init__()
            self.requires_grad_(False)
            self.a, self.b = nn.Linear(SIZE, 2, bias=False), nn.Linear(2, SIZE, bias=False)

        def forward(self, x):
            return super().forward(x) + self.b(self.a(x)) * 2.0

    check(model_of(lambda _: Adapted()), expected=[LAYERS])


def test_one_frozen_layer_is_not_merged_with_trained_ones():
    model = model_of(count=9)
    model.layers[4].requires_grad_(False)
    check(model, inner=GRAPH, expected=[4, 4])


@pytest.mark.parametrize("use_reentrant", [False])
def test_checkpointed_layers(use_reentrant):
    model = model_of()

    def function(x):
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return model.head(x)

    check(model, function=function, expected=[LAYERS])


class Dropping(Layer):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


def test_each_call_draws_its_own_random_numbers():
    check(model_of(lambda _: Dropping()), expected=[LAYERS])


def test_hidden_states_are_returned():
    model = model_of()

    def function(x):
        states = []
        for layer in model.layers:
            x = layer(x)
            states.append(x)
        return tuple(states)

    check(model, function=function, expected=[LAYERS])


def test_a_state_that_one_layer_returns_ends_a_run():
    model = model_of(count=9)

    def function(x):
        for at, layer in enumerate(model.layers):
            x = layer(x)
            if at == 0:
                first = x.sin()
        return model.head(x), first.cos()

    check(model, function=function, inner=GRAPH, expected=[8])


def test_a_table_is_shared_and_another_differs_by_layer():
    model = model_of()
    table, tables = (
        torch.rand(SIZE, requires_grad=True),
        [torch.rand(SIZE, requires_grad=True) for _ in range(LAYERS)],
    )

    def function(x, table, *tables):
        for layer, own in zip(model.layers, tables, strict=True):
            x = layer(x * table) + own.tanh()
        return x

    check(model, inputs(), table, *tables, function=function, expected=[LAYERS])


def test_writes_into_memory_of_a_layer_s_own():
    class Writing(Layer):
        def forward(self, x):
            buffer = torch.zeros_like(x)
            buffer[..., 1:] = super().forward(x)[..., :-1]
            return buffer.add_(1.0) + x.sin()

    check(model_of(lambda _: Writing()), expected=[LAYERS])


def test_values_that_pass_beside_the_residual_stream():
    """Two streams, a value of two layers before, and one for each layer that the end reads."""
    model = model_of()

    def function(x):
        y, before, means = x.cos(), x, []
        for layer in model.layers:
            x, y, before = layer(x) + y.sin() + before, layer(y).tanh(), x
            means.append(x.square().mean())
        return x * y, torch.stack(means).sum()

    check(model, function=function, expected=[LAYERS])


def test_skip_connections_between_stacks():
    model = model_of(count=8)

    def function(x):
        saved = []
        for layer in model.layers[:4]:
            x = layer(x)
            saved.append(x)
        for layer in model.layers[4:]:
            x = layer(x + saved.pop())
        return x, x[0]

    check(model, function=function, expected=[4, 4])


def test_operands_in_other_layouts():
    model = model_of()

    def function(x):
        table = model.head.weight[:1].expand(ROWS, SIZE)
        x = x.transpose(0, 1)
        for layer in model.layers:
            x = layer(x * table[:, None])
        return x

    check(model, function=function, expected=[LAYERS])


# What is not merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"eps": 1e-5}, {"act": F.gelu}, {"scale": 2.0}, {"scale": 3}, {"dtype": torch.bfloat16}],
    ids=["eps", "function", "operation", "number", "dtype"],
)
def test_a_planted_difference_is_not_merged(change):
    base = {"scale": 3.0} if "scale" in change and change["scale"] == 3 else {}
    check(
        model_of(lambda at: Layer(**{**base, **(change if at == 4 else {})}), 9), inner=GRAPH, expected=[4, 4]
    )


def test_another_mask_is_not_merged():
    def masked(x, at):
        positions = torch.arange(ROWS)
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance < (2 if at == 4 else 4))
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]

    model = model_of(count=9)

    def function(x):
        for at, layer in enumerate(model.layers):
            # tanh: scores of x are large, and one unit of rounding in x then moves eager's gradients by 1e-2.
            x = layer(x) + masked(x.tanh(), at)
        return x

    check(model, function=function, inner=GRAPH, expected=[4, 4])


def test_a_layer_that_writes_into_a_buffer():
    class Counting(Layer):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(SIZE))

        def forward(self, x):
            with torch.no_grad():
                self.seen.mul_(0.9).add_(x.detach().mean((0, 1)))
            return super().forward(x) + self.seen

    model = model_of(lambda _: Counting())
    check(model, inner=GRAPH, expected=[])
    assert "in place" in why()


def test_a_layer_that_writes_into_the_residual_stream():
    class InPlace(Layer):
        def forward(self, x):
            x += super().forward(x.detach().sin()) - x.detach().sin()
            return x

    model = model_of(lambda _: InPlace())
    check(model, function=lambda x: model(x * 1.0), inner=GRAPH, expected=[])
    assert "written in place" in why()


def test_a_layer_that_returns_a_view_of_what_it_reads():
    model = model_of()

    def function(x):
        views = []
        for layer in model.layers:
            views.append(x[..., 1:].transpose(0, 1))
            x = layer(x)
        return (x, *views)

    check(model, function=function, inner=GRAPH, expected=[])
    assert "view" in why()


@pytest.mark.parametrize(
    ("mode", "options", "sentence"),
    [
        (None, {"liger.fuel": 100}, "fuel"),
        ("reduce-overhead", {}, "CUDA graph"),
        (None, {"freezing": True}, "freezing"),
    ],
    ids=["fuel", "cudagraphs", "freezing"],
)
def test_settings_that_need_one_graph(mode, options, sentence):
    check(model_of(), inner=GRAPH, mode=mode, options=options, expected=[])
    assert sentence in why()


# Modes ----------------------------------------------------------------------------------------------------------

BF16 = torch.autocast("cpu", torch.bfloat16)
MODES = ["no_grad", "inference_mode", "autocast"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: BF16], ids=MODES)
def test_modes_around(context):
    model = model_of()
    x = inputs() if context() is BF16 else inputs().detach()  # the first layer is as the others
    with context():
        want, got = model(x), compiled(model)(x)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert got.dtype == want.dtype and got.requires_grad == want.requires_grad
    assert counts() == [LAYERS]


@pytest.mark.parametrize("context", [torch.no_grad, INFERENCE_MODE])
def test_modes_within_the_graph(context):
    model = model_of()

    def function(x):
        with context():
            return model(x)

    want, got = function(inputs().detach()), compiled(function, GRAPH)(inputs().detach())
    torch.testing.assert_close(got, want)
    assert counts() == [] and "modes" in why()


def test_gradients_under_autocast_within_the_graph():
    model = model_of()

    def function(x):
        y = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(y)
            y = F.linear(y, model.head.weight.t())
        return F.linear(y.float(), model.layers[0].gate.weight)

    want, got = outcome(function, model, inputs()), outcome(compiled(function), model, inputs())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert counts() == [LAYERS]


def test_autocast_that_ends_within_the_stack():
    model = model_of(count=8)

    def function(x):
        for layer in model.layers[:4]:
            x = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            for layer in model.layers[4:]:
                x = layer(x)
        return x

    want, got = outcome(function, model, inputs()), outcome(compiled(function), model, inputs())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert counts() == [4, 4]


def test_sizes_that_are_known_at_run_time():
    model = model_of()
    call = compiled(model)
    for rows in (6, 9, 12):
        x = inputs(2, rows, SIZE)
        torch._dynamo.mark_dynamic(x, 1)
        model.zero_grad()
        call(x).square().sum().backward()
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x.detach()).square().sum().backward()
        torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)
    assert counts() == [LAYERS]


def test_numbers_that_are_known_at_run_time():
    model = model_of()
    torch.testing.assert_close(
        outcome(compiled(model, GRAPH, dynamic=True), model, inputs()), outcome(model, model, inputs())
    )


def test_backward_twice_and_for_some_parameters():
    model = model_of()
    loss, want = compiled(model)(inputs()).square().sum(), model(inputs()).square().sum()
    for some in (list(model.layers[2].parameters()), list(model.parameters())) * 2:
        got = torch.autograd.grad(loss, some, retain_graph=True)
        torch.testing.assert_close(
            got, torch.autograd.grad(want, some, retain_graph=True), rtol=1e-4, atol=1e-5
        )
    assert counts() == [LAYERS]


def test_compiled_autograd():
    model = model_of(count=FEWEST)
    want = outcome(model, model, inputs())
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True):
        got = outcome(compiled(model), model, inputs())
    torch._dynamo.utils.counters["compiled_autograd"].clear()  # tests/test_compile.py counts there
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert counts() == [FEWEST]


def test_hooks_of_modules_and_parameters():
    model = model_of()
    model.layers[2].register_forward_hook(lambda *_: None)
    seen = []
    model.layers[1].weight.register_hook(lambda grad: seen.append(grad.shape))
    check(model, expected=[LAYERS])
    assert len(seen) == 2


# Whole models ---------------------------------------------------------------------------------------------------


def test_reports_say_what_they_say_of_the_whole_graph():
    family = BY_NAME["qwen3"]
    model, args = family.build(num_hidden_layers=FEWEST), batch(family)
    step(compiled(family.loss, GRAPH, outline="off"), model, *args)
    step(compiled(family.loss, GRAPH), model, *args)
    flat, outlined = liger_compile.reports()
    for kind in ("replace", "annotate", "leave"):
        assert flat.count(kind) == outlined.count(kind)
    assert flat.saved_bytes == outlined.saved_bytes
    assert {site.place.module for site in outlined.sites} >= {
        site.place.module for site in flat.sites if "causal" not in site.pattern
    }


def test_late_logits_and_their_gradients():
    family = BY_NAME["llama"]
    model, (ids, labels) = family.build(num_hidden_layers=FEWEST), batch(family)

    def function(ids, labels):
        output = model(input_ids=ids, labels=labels, use_cache=False)
        return output.loss, output.logits

    found = []
    for call in (function, compiled(function)):
        model.zero_grad()
        loss, logits = call(ids, labels)
        (loss + logits.float().square().mean()).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert counts() == [FEWEST] and any("first read" in note for note in notes())


def test_calls_with_and_without_padding():
    family = BY_NAME["llama"]
    model, (ids, labels) = family.build(num_hidden_layers=FEWEST), batch(family)

    def loss(model, ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    call = compiled(loss)
    for mask in (torch.ones_like(ids), padded):
        assert_within(step(call, model, ids, mask, labels), step(loss, model, ids, mask, labels), 1e-5)
    assert counts() == [FEWEST, FEWEST]


def test_a_cache_of_keys_and_values_is_returned():
    family = BY_NAME["llama"]
    model, (ids, labels) = family.build(num_hidden_layers=FEWEST), batch(family)

    def function(ids, labels):
        output = model(input_ids=ids, labels=labels, use_cache=True, output_hidden_states=True)
        cache = [each for layer in output.past_key_values.layers for each in (layer.keys, layer.values)]
        return (output.loss, *cache, *output.hidden_states)

    torch.testing.assert_close(compiled(function)(ids, labels), function(ids, labels), rtol=1e-4, atol=1e-5)
    assert counts() == [FEWEST]


# More layers than tests/models/test_families.py; every family against eager mode. The tests above have Llama, groups
# with a period, as Gemma 2 has, and two stacks and a value that all layers read, as T5 has.
FEW = ("mixtral",)
OTHERS = (
    "t5",
    "llama",
    "gemma2_window",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "cohere",
    "olmo",
    "glm4",
    "stablelm",
)
OTHERS += (
    "llama_written_out",
    "phi_written_out",
    "gpt2_written_out",
    "nanogpt",
    "meta_llama",
    "torchtitan",
    "packed",
)
OTHERS += ("mistral_window",)


def deep(name):
    """A family with so many layers that each of its stacks has equal ones: its model, and its loss."""
    layers = {
        "t5": {"num_layers": LAYERS, "num_decoder_layers": LAYERS},  # the first makes the bias
        "gemma2": {"num_hidden_layers": 8},
        "gemma2_window": {"num_hidden_layers": 8},
    }
    own = {"nanogpt", "meta_llama", "torchtitan", "packed"}
    family = BY_NAME[name]
    return family, family.build(
        **layers.get(name, {"layers" if name in own else "num_hidden_layers": FEWEST})
    )


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_families(name, inner):
    family, model = deep(name)
    args = batch(family)
    expected = step(family.loss, model, *args)
    assert_within(
        step(compiled(family.loss, inner), model, *args), expected, 1e-5 if inner == "aot_eager" else 1e-4
    )
    assert counts()


# Inductor -------------------------------------------------------------------------------------------------------


def test_inductor():
    check(model_of(lambda _: Dropping().eval()), inner="inductor", expected=[LAYERS])


def test_inductor_draws_random_numbers_for_each_call():
    model = model_of(lambda _: Dropping())

    def function(x):
        kept = []
        for layer in model.layers:
            kept.append(F.dropout(torch.ones_like(x), 0.5) + 0 * layer(x))
            x = x + layer(x).tanh()
        return tuple(kept)

    results = compiled(function, "inductor")(inputs())
    assert len({tuple(result.flatten().tolist()) for result in results}) == LAYERS
    assert counts()
