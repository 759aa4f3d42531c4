"""Low-rank adapters beside linear layers: which are found, what is found beside them, what is kept, and the numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import liger_compile
from liger_compile.diagnose.sentences import input_name
from liger_compile.patterns.lora import profit
from liger_compile.testing import precision
from tests.helpers.adapters import Adapted, Form, inputs, layer
from tests.helpers.gradients import gradients_of

ALWAYS = {"liger.policy": "always", "liger.strict": True, "liger.inner": "aot_eager"}
BESIDE = ("rms_norm", "rotary", "gated_mlp")  # attention is as it should be already

FORMS = {
    "float32 beside bfloat16": (Form(), 7),
    "all bfloat16, alpha equals rank": (Form(adapter=torch.bfloat16, scaling=1.0), 7),
    "all float32, rank 4, rank-stabilized": (Form(layer=torch.float32, rank=4, scaling=16 / 4**0.5), 7),
    "dropout, one of two adapters is active": (Form(dropout=0.1, names=("a", "b"), active=("b",)), 7),
    "two adapters are active": (Form(names=("a", "b"), active=("a", "b")), 7),
    "two adapters are active, all bfloat16": (
        Form(adapter=torch.bfloat16, names=("a", "b"), active=("a", "b")),
        14,
    ),
    "B has a bias": (Form(bias=True), 0),
}


def compiled(function, **options):
    torch._dynamo.reset()
    liger_compile.clear_reports()
    return torch.compile(function, backend="liger", options={**ALWAYS, **options})


def found():
    (report,) = liger_compile.reports()
    return Counter(site.pattern.partition(".")[0] for site in report.sites if site.kind != "leave")


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_with_adapters_is_found_and_so_is_all_beside_them(name):
    form, adapters = FORMS[name]
    model = layer(form)
    compiled(model, **{"liger.inner": "report"})(inputs(form))
    counts = found()
    assert [counts[op] for op in BESIDE] == [2, 1, 1]
    assert counts["lora"] == adapters


def trained(function, model, x):
    torch.manual_seed(3)  # for dropout
    return gradients_of(function, x, parameters=[p for p in model.parameters() if p.requires_grad])


def one(form):
    torch.manual_seed(0)
    return Adapted(64, 96, form)


@pytest.mark.parametrize(
    ("make", "form", "tokens"),
    [
        (layer, Form(scaling=1.7), 5),
        (one, Form(adapter=torch.bfloat16, scaling=0.3), 16),
        (one, Form(layer=torch.float32), 3),
        (one, Form(scaling=0.6, names=("a", "b"), active=("b", "a")), 11),
    ],
    ids=["float32 beside bfloat16", "bfloat16", "float32", "two adapters"],
)
def test_a_step_is_as_exact_as_eager(make, form, tokens):
    model, x = make(form), inputs(form, tokens)
    double = precision.as_double(model)
    with precision.in_double():
        exact = trained(double, double, precision.as_double(x))
    eager, run = trained(model, model, x), compiled(model)
    for _ in range(2):
        precision.assert_no_worse(trained(run, model, x), eager, exact)
    assert found()["lora"] == (7 if make is layer else 1)


def assert_near(got, expected):
    """Results and gradients differ by 2% at most, in the L2 norm."""
    for tensor, reference in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert (tensor is None) == (reference is None)
        assert reference is None or (tensor - reference).norm() <= 0.02 * reference.norm()


def flat(step):
    """The results and the gradients of a step with two results, in the form of one result."""
    (first, second), gradients = step
    return first, [second, *gradients]


def test_dropout_draws_what_it_draws_without_this_package():
    form = Form(dropout=0.3)
    model, x = one(form), inputs(form)
    torch._dynamo.reset()
    expected = trained(torch.compile(model, backend="aot_eager"), model, x)
    assert_near(trained(compiled(model), model, x), expected)
    assert found()["lora"] == 1


def test_the_user_switches_adapters_and_merges_them():
    form = Form(names=("a", "b"), active=("a",))
    model, x = one(form), inputs(form)
    run = compiled(model)
    for active in ("a", "b", "a"):
        model.active = [active]
        assert_near(trained(run, model, x), trained(model, model, x))
    assert [len(report.sites) for report in liger_compile.reports()] == [1, 1]
    model.merge()
    torch.testing.assert_close(run(x), model(x))


def test_autocast_computes_float32_adapters_in_bfloat16():
    form = Form(layer=torch.float32)
    model, x = Two(_nothing), inputs(form)
    model.float()

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_near(flat(trained(compiled(step), model, x)), flat(trained(step, model, x)))
    assert found()["lora"] == 2
    assert joined() == ["adapters that read the same input are joined: 1 of 2 matmuls remain"]


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_compiled_by_inductor_adds_in_place(adapter):
    form = Form(adapter=adapter)
    model, x = Adapted(64, 96, form), inputs(form)
    options = {"liger.inner": "inductor", "liger.backward_passes": "always", "fx_graph_cache": False}
    double = precision.as_double(model)
    with precision.in_double():
        exact = trained(double, double, precision.as_double(x))
    run = compiled(model, **options)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        found, code = run_and_get_code(trained, run, model, x)
    precision.assert_no_worse(found, trained(model, model, x), exact)
    assert sum(text.count("add_product_in_place.default(") for text in code) == 1


# What is joined ----------------------------------------------------------------------------------------------


def joined():
    (report,) = liger_compile.reports()
    return [note for note in report.notes if "adapters" in note]


class Two(nn.Module):
    """Two projections of one input, with something between them."""

    def __init__(self, between, dropout=0.0):
        super().__init__()
        self.between, form = between, Form(dropout=dropout)
        self.first, self.second = Adapted(64, 96, form), Adapted(64, 32, form)

    def forward(self, x):
        x = x * 1.5
        first = self.first(x)
        x = self.between(x)
        with torch.set_grad_enabled(self.between is not _without_gradients):
            return first, self.second(x)


def _nothing(x):
    return x


def _without_gradients(x):
    return x


def _written(x):
    return x.mul_(2)


def _another(x):
    return x * 2


BETWEEN = {_nothing: 1, _without_gradients: 0, _written: 0, _another: 0}


@pytest.mark.parametrize("between", BETWEEN, ids=lambda function: function.__name__)
def test_adapters_are_joined_where_they_read_the_same_value_in_the_same_mode(between):
    torch.manual_seed(0)
    model, x = Two(between), inputs(Form())
    x = x.detach()  # so that a write is allowed
    assert_near(flat(trained(compiled(model), model, x)), flat(trained(model, model, x)))
    assert found()["lora"] == 2 and len(joined()) == BETWEEN[between]


def test_adapters_with_dropout_read_values_of_their_own():
    model = Two(_nothing, dropout=0.2)
    compiled(model)(inputs(Form()))
    assert found()["lora"] == 2 and not joined()


# What is kept and what is left -------------------------------------------------------------------------------


def kept(model, x, **options):
    """The tensors that a step keeps for backward, except the parameters."""
    saved = {}

    def pack(tensor):
        if type(tensor) is torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    run = compiled(model, **options)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return [*saved.values()]


def test_no_float32_copy_of_an_input_is_kept():
    form = Form()
    model, x = layer(form), inputs(form)
    wide = [tensor for tensor in kept(model, x) if tensor.dtype == torch.float32]
    assert max(tensor.numel() for tensor in wide) < x.numel() // 2


def test_an_upcast_that_no_gradient_needs_is_not_marked():
    def trained_weight(x, weight):
        return F.linear(x.float(), weight)

    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for policy, needs_grad in (("always", True), ("always", False), ("auto", True)):
        given = x, torch.randn(3, 8, requires_grad=needs_grad)
        compiled(trained_weight, **{"liger.policy": policy})(*given)
        (report,) = liger_compile.reports()
        assert any("upcast" in note for note in report.notes) == (needs_grad and policy == "always")


def test_what_was_not_measured_is_left_by_default():
    reasons = {}
    for device, form in (("cpu", Form()), ("meta", Form()), ("meta", Form(layer=torch.float32))):
        match = {
            "base": torch.empty(8192, 2048, dtype=form.layer, device=device),
            "a": torch.empty(16, 2048, dtype=form.adapter, device=device),
            "b": torch.empty(2048, 16, dtype=form.adapter, device=device),
        }
        reasons[device, form.layer] = profit(match)
    assert "on a CPU" in reasons["cpu", torch.bfloat16]
    assert reasons["meta", torch.bfloat16] is None
    assert "not measured" in reasons["meta", torch.float32]
    few = {name: tensor[:64] if name == "base" else tensor for name, tensor in match.items()}
    few["base"] = few["base"].bfloat16()
    assert "few rows" in profit(few)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (Form(rank=20), "rank 20 is not small"),
        (Form(layer=torch.float32, adapter=torch.bfloat16), "expected one dtype, or float32 adapters"),
        (Form(layer=torch.float16), ""),
    ],
    ids=["large rank", "narrow adapter", "float16"],
)
def test_other_dtypes_and_large_ranks(form, reason):
    model, x = one(form), inputs(form)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=0.02, atol=0.02)
    (report,) = liger_compile.reports()
    (site,) = (site for site in report.sites if site.pattern == "lora.scaled")
    assert reason in site.reason and bool(reason) == (site.kind == "leave")


def test_dynamic_lengths():
    model = one(Form())
    torch._dynamo.reset()
    run = torch.compile(model, backend="liger", options=ALWAYS, dynamic=True)
    for tokens in (4, 7, 30):
        x = inputs(Form(), tokens)
        assert_near(trained(run, model, x), trained(model, model, x))


def test_a_checkpointed_layer():
    model, x = Two(_nothing), inputs(Form())

    def step(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    assert_near(flat(trained(compiled(step), model, x)), flat(trained(step, model, x)))
    assert found()["lora"] == 2 and joined()


# Layers that are one opaque op -------------------------------------------------------------------------------


@torch.library.custom_op("tests_lora::quantized_linear", mutates_args=())
def quantized_linear(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """As the matmul of a layer of 4 bits: the weight is made of codes, and is not kept."""
    return x @ (codes.to(x.dtype) / 8).t()


@quantized_linear.register_fake
def _(x, codes):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


quantized_linear.register_autograd(
    lambda ctx, dy: (dy @ (ctx.saved_tensors[0].to(dy.dtype) / 8), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


class Quantized(Adapted):
    """The statements of PEFT's layer of 4 bits: a copy of the result, and a rounded product."""

    def forward(self, x):
        result = quantized_linear(x, self.codes).clone()
        down, up = self.lora_A["default"], self.lora_B["default"]
        product = up(down(x.to(down.weight.dtype))) * self.scaling["default"]
        return result + product.to(result.dtype)


def test_an_adapter_beside_a_layer_of_4_bits():
    torch.manual_seed(0)
    model, x = Quantized(64, 96, Form()), inputs(Form())
    model.register_buffer("codes", torch.randint(-8, 8, (96, 64), dtype=torch.int8))
    assert_near(trained(compiled(model), model, x), trained(model, model, x))
    assert found() == {"lora": 1}


# Names -------------------------------------------------------------------------------------------------------


class Headed(nn.Module):
    """As PEFT's models, a class with a __getattr__, for which Dynamo writes self.__dict__['_modules'][...]."""

    def __init__(self):
        super().__init__()
        self.base_model, self.lm_head = one(Form(layer=torch.float32)), nn.Linear(96, 11)

    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return F.cross_entropy(
            self.lm_head(self.base_model(x)).flatten(0, 1), x.new_zeros(16, dtype=torch.long)
        )


def test_modules_have_the_names_that_the_user_gave():
    compiled(Headed(), **{"liger.inner": "report"})(inputs(Form(layer=torch.float32)))
    (report,) = liger_compile.reports()
    modules = {site.pattern.partition(".")[0]: site.place.module for site in report.sites}
    assert modules["lora"] == "base_model"
    assert "__dict__" not in str(report)
    names = {
        "l_self_dict_modules_model_dict_modules_lora_a_modules_x_parameters_weight_": "model.lora_a.x.weight",
        "l_self_dict_modules_lm_head_parameters_weight_": "lm_head.weight",
        "l_self_modules_word_dict_modules_table_parameters_weight_": "word_dict.table.weight",
    }
    assert {name: input_name(name) for name in names} == names


# PEFT --------------------------------------------------------------------------------------------------------


def test_peft():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(64, 96, bias=False, dtype=torch.bfloat16))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    model.add_adapter("other", dataclasses.replace(config, lora_alpha=5))
    run, x = compiled(model), inputs(Form())
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        torch.testing.assert_close(run(x), model(x), rtol=0.02, atol=0.02)
    assert all(
        any(site.pattern == "lora.scaled" for site in report.sites) for report in liger_compile.reports()
    )
    model.merge_adapter()
    torch.testing.assert_close(run(x), model(x), rtol=0.02, atol=0.02)
