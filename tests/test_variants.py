"""Inputs that are masks of padding: a graph for calls without, another for all, and the choice between them."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import liger_compile
from liger_compile.compile import MOST_COMPILED, when_called
from liger_compile.forward_passes import specialize
from tests.helpers.attending import (
    BATCH,
    LENGTH,
    OPTIONS,
    assert_as_in_eager,
    attend,
    causal,
    compiled,
    found,
    inputs,
    masks,
)


def additive(q, k, v, padding):
    """As BERT's: hidden keys get the smallest number added to their scores."""
    mask = (1.0 - padding[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return attend(q, k, v, mask)


def expanded(q, k, v, padding):
    mask = padding[:, None, None, :].bool().expand(-1, 1, q.shape[1], -1)
    return attend(q, k, v, mask)


SPELLINGS = {f.__name__: f for f in (causal, additive, expanded)}
BOTH = {"without": (specialize.WITHOUT, 1), "general": (specialize.GENERIC, 0)}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("first", ["without", "general"])
def test_each_is_compiled_when_it_is_first_needed(first, inner):
    fast, (ones, left, right) = compiled(causal, inner=inner, fullgraph=True), masks()
    second = "general" if first == "without" else "without"
    args = inputs()
    order = [ones, left, right] if first == "without" else [right, ones, left]
    assert_as_in_eager(fast, causal, *args, order[0])
    assert found() == [BOTH[first]]
    for mask in (*order[1:], ones, left, ones):
        assert_as_in_eager(fast, causal, *args, mask)
    assert found() == [BOTH[first], BOTH[second]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
@pytest.mark.parametrize("name", SPELLINGS)
def test_masks_and_their_spellings(name, dtype):
    function = SPELLINGS[name]
    fast = compiled(function, inner="eager")  # the test above has AOTAutograd
    for mask in masks(dtype=dtype):
        assert_as_in_eager(fast, function, *inputs(), mask)
    assert found() == [BOTH["without"], BOTH["general"]]


@pytest.mark.parametrize(
    ("device", "scores", "checks"),
    [("cuda", 2**28, True), ("cuda", 2**28 - 1, False), ("cpu", 1, True)],
)
def test_a_check_that_waits_for_a_gpu_has_to_pay(device, scores, checks):
    why = specialize.why_not_checked({"mask": specialize.ONES}, scores, {device})
    assert why is None if checks else "for mask of all ones: the check waits for the GPU" in why


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "names"), [("auto", 1), ("always", 2)])
def test_few_scores_are_not_checked_on_a_gpu(policy, names):
    fast = torch.compile(causal, backend="liger", options={**OPTIONS, "liger.policy": policy})
    args = [value.detach().cuda() for value in inputs()]
    for mask in masks()[:2]:
        torch.testing.assert_close(fast(*args, mask.cuda()), causal(*args, mask.cuda()))
    generic = next(
        report for report in liger_compile.reports() if "no call" in str(report) or policy == "always"
    )
    assert len(liger_compile.reports()) == names
    assert ("no call is specialized for l_padding_ of all ones" in str(generic)) == (policy == "auto")


def test_a_row_that_is_padding_alone():
    fast, (ones, *_) = compiled(additive), masks()
    for hidden in (ones.clone(), ones):
        hidden[1] = 0
        assert_as_in_eager(fast, additive, *inputs(), hidden)


def test_masks_that_are_views():
    fast, (ones, left, _) = compiled(causal), masks(2 * LENGTH)
    for mask in (ones[:, :LENGTH], left[:, :LENGTH], ones[:, ::2], ones[:1, LENGTH:].expand(BATCH, -1)):
        assert_as_in_eager(fast, causal, *inputs(), mask)
    assert BOTH["without"] in found() and BOTH["general"] in found()


def test_only_ones_are_ones():
    fast, (ones, left, _) = compiled(expanded), masks()
    for mask in (2 * ones, ones + left):  # true, and yet not what the other graph was made for
        assert_as_in_eager(fast, expanded, *inputs(), mask)
    assert found() == [BOTH["general"]]


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_symbolic_sizes_compile_both_at_once(how):
    fast = compiled(causal, dynamic=True) if how == "dynamic=True" else compiled(causal)
    for length in (LENGTH, 9, 20):
        for mask in masks(length):
            args = inputs(length)
            if how == "mark_dynamic":
                for tensor in (*args, mask):
                    torch._dynamo.mark_dynamic(tensor, 1)
            assert_as_in_eager(fast, causal, *args, mask)
            assert found() == [BOTH["without"], BOTH["general"]]


@pytest.mark.parametrize(
    "inner",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 13),
                reason="of this function with symbolic sizes, Inductor of torch 2.11 and 2.12 writes C++ that does not "
                'compile, under backend="inductor" too: the check of an index comes before the index',
            ),
        ),
    ],
)
def test_automatic_dynamic(inner):
    fast = compiled(causal, inner=inner)
    for length, expected in ((LENGTH, 1), (9, 3), (20, 3)):
        for mask in masks(length)[:1]:
            assert_as_in_eager(fast, causal, *inputs(length), mask)
        assert len(found()) == expected
    assert_as_in_eager(fast, causal, *inputs(17), masks(17)[1])
    assert len(found()) == 3


def test_what_is_compiled_later_has_no_symbols():
    sizes = []

    def compile(args):
        mode = torch._guards.TracingContext.get().fake_mode
        sizes.extend(mode.from_tensor(arg).shape for arg in args)  # as AOTAutograd does
        return lambda *args: len(args)

    later = when_called(compile)
    assert [later(*inputs()), later(*inputs())] == [3, 3]
    assert sizes == [(BATCH, LENGTH, 16)] * 3
    assert all(isinstance(size, int) for shape in sizes for size in shape)


def is_large(size):
    return bool(size > 16)


@pytest.mark.parametrize("question", [is_large, int], ids=["a bound", "one size"])
def test_what_is_compiled_later_has_guards(question):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    asked = []

    def compile(args):
        asked.append(question(args[0].shape[0]))
        return lambda x: x + 1

    example = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(8, 5))
    later = when_called(compile, (example,), otherwise=lambda x: x + 2)
    sizes = (9, 12, 20, 24, 9, 17, 30, 3, 4, 6, 7)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = [later(torch.zeros(size, 5))[0, 0].item() for size in sizes]
    said = [
        str(each.message) for each in warned if "graphs were compiled for other sizes" in str(each.message)
    ]
    assert len(said) == found.count(2)
    if question is int:  # a graph for each size would be compiled anew in each call
        assert len(asked) == MOST_COMPILED and found == [1] * 9 + [2, 2]
    else:
        assert asked == [False, True] and found == [1] * 11


def test_sizes_that_were_marked_but_turned_out_static():
    args, (ones, left, _) = inputs(), masks()
    for mask in (ones, left):
        torch._dynamo.maybe_mark_dynamic(mask, 0)
    fast = compiled(causal)
    for mask in (ones, left):
        assert_as_in_eager(fast, causal, *args, mask)
    assert sorted(set(found())) == sorted(BOTH.values())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_evaluation(order):
    fast = compiled(causal, inner="inductor")
    with torch.no_grad():
        for i in order:
            assert_as_in_eager(fast, causal, *inputs(), masks()[i])
    for i in order:  # with gradients, all are compiled anew
        assert_as_in_eager(fast, causal, *inputs(), masks()[i])
    assert len(found()) == 4


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_autocast_is_that_of_the_call(order):
    def layer(q, k, v, padding):
        weight = torch.eye(16)
        return causal(*(F.linear(x, weight) for x in (q, k, v)), padding)

    fast = compiled(layer)
    with torch.autocast("cpu", torch.bfloat16):
        for i in order:
            result = fast(*inputs(), masks()[i])
            assert result.dtype is torch.bfloat16
            assert_as_in_eager(fast, layer, *inputs(), masks()[i], rtol=2e-2, atol=2e-2)
    assert len(found()) == 2


def test_two_masks():
    """As the encoder's and the decoder's."""

    def both(q, k, v, first, second):
        return causal(q, k, v, first) + additive(q, k, v, second)

    fast, (ones, left, right) = compiled(both), masks()
    for pair in ((ones, ones.clone()), (left, right), (ones, right), (left, ones)):
        assert_as_in_eager(fast, both, *inputs(), *pair)
    assert found() == [(specialize.WITHOUT, 2), (specialize.GENERIC, 0)]
    note, _ = (report.notes[0] for report in liger_compile.reports())
    assert "l_first_ and l_second_ of all ones" in note


def test_a_mask_in_a_checkpointed_layer_comes_from_outside():
    def layer(q, k, v, mask):
        return attend(q, k, v, mask).transpose(1, 2).flatten(2)

    def model(q, k, v, padding):
        i = torch.arange(q.shape[1])
        mask = (i[None, :] <= i[:, None]) & padding[:, None, None, :].bool()
        for _ in range(2):
            q = torch.utils.checkpoint.checkpoint(layer, q, k, v, mask, use_reentrant=False)
        return q

    fast = compiled(model)
    for mask in masks():
        assert_as_in_eager(fast, model, *inputs(), mask)
    assert found() == [(specialize.WITHOUT, 2), (specialize.GENERIC, 0)]
    notes = liger_compile.reports()[1].notes
    assert "attention 2x causal without the padding in padding: flex_attention" in notes
    assert not any("keeps its mask" in note for note in notes)


# What is left to one graph


def returned(q, k, v, padding):
    return additive(q, k, v, padding), padding[:, :3]


def written(q, k, v, padding):
    padding[:, -1] = 0
    return additive(q, k, v, padding)


def token_ids(q, k, v, ids):
    q = q + F.embedding(ids.view(-1, ids.shape[-1]), torch.ones(9, q.shape[-1]))
    return additive(q, k, v, ids.ne(0).long())


def dense(q, k, v, mask):
    return attend(q, k, v, mask.bool())


def positions(q, k, v, ids):
    return attend(q, k, v, ids[:, None, None, :] <= ids[:, None, :, None])


def learned(q, k, v, padding):
    return attend(q, k, v, torch.randn(q.shape[1], k.shape[1]) * padding[:, None, None, :])


SQUARE = torch.ones(LENGTH, LENGTH, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        *((each, masks()[0]) for each in (returned, written, token_ids, positions, learned)),
        (dense, SQUARE),
        (additive, masks(dtype=torch.float32)[0]),
    ],
)
def test_what_is_no_padding_is_not_checked(function, mask):
    args = inputs(requires_grad=False)
    torch.manual_seed(1)
    expected = function(*args, mask.clone())
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(function)(*args, mask.clone()), expected)
    assert found() == [("", 0)]


@pytest.mark.parametrize(
    "options", [{"padding": "general"}, {"policy": "never"}, {"skip": ("attention",)}, {"fuel": 0}]
)
def test_options_that_leave_nothing_to_choose(options):
    fast = compiled(causal, **options)
    for mask in masks():
        assert_as_in_eager(fast, causal, *inputs(), mask)
    assert found() == [("", 0)]


def test_fake_inputs_are_not_read():
    """DDP hands buckets fake ones."""
    from torch._subclasses import FakeTensorMode

    from liger_compile.backend import liger

    def backend(gm, example_inputs):
        mode = FakeTensorMode()
        return liger(
            gm, [mode.from_tensor(x) for x in example_inputs], options={**OPTIONS, "liger.inner": "eager"}
        )

    torch.compile(causal, backend=backend)(*inputs(), masks()[0])
    assert found() == [("", 0)]


def test_a_call_with_fake_inputs_runs_the_general_graph():
    from torch._subclasses import FakeTensorMode

    graphs = {False: lambda mask: "generic", True: lambda mask: "specialized"}
    dispatch = specialize.Dispatch([(0, specialize.ONES)], graphs)
    with FakeTensorMode() as mode:
        assert dispatch(mode.from_tensor(masks()[0])) == "generic"
    assert dispatch(masks()[0]) == "specialized"


def test_reports_say_which_graph_is_whose():
    fast, (ones, left, _) = compiled(causal), masks()
    fast(*inputs(), ones)
    fast(*inputs(), left)
    without, general = liger_compile.reports()
    assert without.name == general.name
    assert f"graph {without.name} (without padding), " in str(without)
    assert f"graph {general.name} (generic), " in str(general)
    assert (
        "specialized for l_padding_ of all ones (checked on every call, one device sync)" in without.notes[0]
    )
    assert "used by calls with padding" in general.notes[0]
    assert without.to_dict()["variant"] == "without padding"


def test_explain_reports_the_variant_of_its_call():
    (graph,) = liger_compile.explain(causal, *inputs(), masks()[0]).graphs
    assert graph.variant == specialize.WITHOUT
    (graph,) = liger_compile.explain(causal, *inputs(), masks()[1]).graphs
    assert graph.variant == specialize.GENERIC


def test_a_copy_is_rewritten_apart():
    copies = []

    def backend(gm, example_inputs):
        copies.append((gm, specialize.copied(gm)))
        return gm.forward

    def model(q, k, v, padding):
        return torch.utils.checkpoint.checkpoint(causal, q, k, v, padding, use_reentrant=False)

    torch.compile(model, backend=backend)(*inputs(), masks()[0])
    ((gm, copy),) = copies
    assert str(copy.graph) == str(gm.graph) and not set(copy.graph.nodes) & set(gm.graph.nodes)
    for name, body in gm.named_children():
        assert str(getattr(copy, name).graph) == str(body.graph) and getattr(copy, name) is not body
    for node, its_copy in zip(gm.graph.nodes, copy.graph.nodes, strict=True):
        assert its_copy.meta.get("example_value") is node.meta.get("example_value")
        assert getattr(its_copy, "_dynamo_source", None) == getattr(node, "_dynamo_source", None)
    assert copy.meta == gm.meta and copy._param_name_to_source is gm._param_name_to_source


CHILD = """
import json
import torch
import torch._inductor.config
import liger_compile
from liger_compile.torch_internals.aot_autograd import cache_counts
from tests.helpers.attending import causal, compiled, found, inputs, masks
from tests.helpers.gradients import gradients_of

fast = compiled(causal, inner="inductor")
ours = [gradients_of(fast, *inputs(), mask) for mask in masks()]
eager = [gradients_of(causal, *inputs(), mask) for mask in masks()]
torch.testing.assert_close(ours, eager)
print(json.dumps({"found": found(), **cache_counts()}))
"""


@pytest.mark.slow
def test_a_second_process_finds_both_in_the_cache(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    told = []
    for _ in range(2):
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        told.append(json.loads(child.stdout))
    both = [list(BOTH["without"]), list(BOTH["general"])]
    assert told[0] == {"found": both, "hit": 0, "miss": 2, "bypass": 0}
    assert told[1] == {"found": both, "hit": 2, "miss": 0, "bypass": 0}
