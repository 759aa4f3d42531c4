"""What is proven of a mask is so: proofs against the masks themselves, at sizes where dtypes round and wrap around."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from liger_compile.terms.exact import holds, stored, whole_numbers
from tests.helpers import mask_programs as programs

SIZES = (1, 2, 3, 6)
ROUNDS = 300  # positions of this size are rounded in bfloat16, and wrap around in eight bits
ROUNDS_IN_HALF = 2050

# A longer run: LIGER_MASK_EXAMPLES=20000 pytest -m slow tests/test_mask_proofs.py
EXAMPLES = int(os.environ.get("LIGER_MASK_EXAMPLES", 1000))
CAUSAL = "torch.ones(n, n, dtype=torch.bool).tril()"


def check_mask(expression):
    sizes = (*SIZES, ROUNDS)
    if programs.is_a_mask(expression, sizes):
        programs.tried(expression, sizes)


def check_attention(expression):
    if programs.is_attention(expression, (1, 5)):
        for n in (1, 5):
            programs.attended(expression, n)


def check_documents(expression):
    sizes = (1, 2, 3, 7)
    if programs.is_a_mask(expression, sizes, d=lambda n: programs.rows_of(n)[0]):
        programs.tried_of_documents(expression, sizes)


# What is drawn, what is checked, and of how many expressions in a normal run.
CHECKS = {
    "masks": (programs.MASKS, check_mask, 60),
    "attention": (programs.ATTENTION, check_attention, 200),
    "documents": (programs.DOCUMENTS, check_documents, 30),
    "padding": (programs.PADDED, check_documents, 30),
}


def tried(name, **more):
    strategy, check, examples = CHECKS[name]
    more = {"max_examples": examples, "derandomize": True, "phases": [Phase.generate], **more}
    settled = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **more)
    return settled(given(strategy)(check))


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_proven_is_so(name):
    """The same expressions every time, without shrinking: an expression is short."""
    tried(name)()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_what_is_proven_of_many_expressions_is_so(name, fuzz_seed):
    phases = [Phase.generate, Phase.shrink]
    seed(fuzz_seed)(tried(name, max_examples=EXAMPLES, derandomize=False, phases=phases))()


def same(positions, relation=">="):
    return f"({positions}[:, None] {relation} {positions}[None, :])"


# Masks whose arithmetic is not that of real numbers from some size on: that size, and what may be proven of them there.
INEXACT = {
    "bounds by keyword": ("torch.arange(n)[None] <= torch.arange(1, end=n + 1)[:, None]", 3, set()),
    "bounds by keyword, the same": (
        "torch.arange(1, end=n + 1)[None] <= torch.arange(1, end=n + 1)[:, None]",
        1,
        {"causal", "all"},
    ),
    "all bounds by keyword": (
        "torch.arange(start=1, end=n + 1)[None] < torch.arange(n)[:, None] + 2",
        1,
        {"causal", "all"},
    ),
    "start, end, and step by keyword": (
        "torch.arange(0, 2 * n, step=2)[:, None] >= torch.arange(n) * 2",
        1,
        {"causal", "all"},
    ),
    "part of a cumsum": (f"{CAUSAL} & ((torch.arange(n) == 0).long().cumsum(0)[-1:] < 1)", 2, set()),
    "part of a cumsum of keys": (
        f"{CAUSAL} & ((torch.arange(n) >= 0).long().cumsum(0) <= n)[None, :]",
        6,
        {"causal"},
    ),
    "a flag in bfloat16": ("torch.ones(n, n).tril().bfloat16() > 0.999", 1, set()),
    "a flag in float16": ("torch.ones(n, n).tril().half() >= 1.0001", 1, set()),
    "a flag in float32": ("torch.ones(n, n).tril() > 1 - 1e-9", 1, set()),
    "a flag that rounds to zero": (f"{CAUSAL}.long() != 1e-50", 2, set()),
    "a number that is exact": ("torch.ones(n, n).tril().bfloat16() > 0.5", 1, {"causal", "all"}),
    "bfloat16 positions": (same("torch.arange(n).bfloat16()"), ROUNDS, set()),
    "bfloat16 positions, few": (same("torch.arange(n).bfloat16()"), 200, {"causal"}),
    "float16 positions": (same("torch.arange(n, dtype=torch.float16)"), ROUNDS_IN_HALF, set()),
    "float16 positions, few": (same("torch.arange(n, dtype=torch.float16)"), 2048, {"causal"}),
    "float32 positions": (same("torch.arange(n).float()"), ROUNDS, {"causal"}),
    "float32 positions, far": (same("(torch.arange(n) + 2**24).float()"), 3, set()),
    "eight bits": (same("torch.arange(n).to(torch.int8)"), ROUNDS, set()),
    "eight bits, few": (same("torch.arange(n).to(torch.int8)"), 100, {"causal"}),
    "eight bits without sign": (same("(torch.arange(n).to(torch.uint8) - 1)"), 3, set()),
    "the negative of what has no sign": (f"(-{CAUSAL}.to(torch.uint8)).long() < 0", 2, set()),
    "thirty-two bits": (same("(torch.arange(n).int() + (2**31 - 3))"), 6, set()),
    "beyond what a float counts": (
        "(torch.arange(2**62, 2**62 + n)[:, None] + 1) >= torch.arange(2**62, 2**62 + n)",
        3,
        set(),
    ),
    "compared in float32": ("(torch.arange(n)[:, None] + 2**29) + 3.0 > torch.arange(n) + 2**29", 6, set()),
    "a fill scaled back into reach": (f"torch.zeros(n, n).masked_fill(~{CAUSAL}, -1e30) * 1e-40", 2, set()),
    "a fill that is divided": (f"torch.zeros(n, n).masked_fill(~{CAUSAL}, -1e30) / 1e30", 2, set()),
    "-inf times what rounds to zero": (f"torch.where({CAUSAL}, 0.0, float('-inf')) * 1e-50", 2, set()),
    "zero times what is infinite in float32": (f"(1 - {CAUSAL}.float()) * 0.0 * -1e300", 2, set()),
    "a fill added to a fill": (
        f"torch.where({CAUSAL}, 0.0, -1e30) + torch.where({CAUSAL}, 0.0, -1e30)",
        2,
        {"causal"},
    ),
    "a fill taken away again": (
        f"torch.where({CAUSAL}, 0.0, -1e30) - torch.where({CAUSAL}, 0.0, -1e30)",
        2,
        set(),
    ),
    "in reach of float16": (f"torch.zeros(n, n).half().masked_fill(~{CAUSAL}, -65504.0)", 2, set()),
    "-inf of float16": (
        f"torch.zeros(n, n).half().masked_fill(~{CAUSAL}, float('-inf'))",
        2,
        {"causal"},
    ),
    "truths added": (f"({CAUSAL} + {CAUSAL}.t()) & {CAUSAL}", 2, {"causal"}),
    "a distance": (f"{CAUSAL} & ((torch.arange(n)[:, None] - torch.arange(n)).abs() < 2)", 3, {"window"}),
    "a window of nothing": (f"{CAUSAL} & (torch.arange(n) > torch.arange(n)[:, None])", 2, set()),
    "a list for an index": ("torch.ones(2, n, n, dtype=torch.bool).tril()[[0, 1]][:, 0:1]", 2, set()),
    "a narrow part from the end": (
        "torch.arange(2 * n).narrow(0, -n, n)[:, None] >= torch.arange(n) + n",
        2,
        {"causal"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INEXACT)
def test_arithmetic_is_that_of_the_dtype(name):
    expression, size, kinds = INEXACT[name]
    assert programs.tried(expression, (size,)) <= kinds
    assert not kinds or programs.tried(expression, (size,))


ADDED = f"torch.where({CAUSAL}, 0.0, float('-inf'))"
FILLS = {
    "scaled": (f"q @ k.mT / 2 + {ADDED}", "causal_mask"),
    "filled, then scaled": (f"(q @ k.mT).masked_fill(~{CAUSAL}, -1e38) * 0.5", "causal_mask"),
    "a fill scaled back into reach": (f"(q @ k.mT).masked_fill(~{CAUSAL}, -1e30) * 1e-29", ""),
    "a mask scaled back into reach": (
        f"(q @ k.mT + torch.where({CAUSAL}, 0.0, -1e30)) * 1e-29",
        "",
    ),
    "-inf times what rounds to zero": (f"(q @ k.mT).masked_fill(~{CAUSAL}, float('-inf')) * 1e-50", ""),
    "a scale that rounds to zero": (f"q @ k.mT * torch.tensor(1e-8, dtype=torch.float16) + {ADDED}", ""),
    "two masks": (f"q @ k.mT + {ADDED} + torch.where({CAUSAL}, 0.0, -1e38)", "causal_mask"),
    "two masks that cancel": (f"q @ k.mT + {CAUSAL}.float() - {CAUSAL}.float()", ""),
    "a flag added": (f"q @ k.mT + {CAUSAL}", ""),
}


@pytest.mark.parametrize("name", FILLS)
def test_what_hides_is_out_of_reach(name):
    scores, kind = FILLS[name]
    assert programs.attended(f"torch.softmax({scores}, -1) @ v", 5) == kind


def test_which_numbers_a_dtype_holds():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        first, last = whole_numbers(dtype)
        assert holds(dtype, last) and holds(dtype, first) and not holds(dtype, last + 1)
    assert whole_numbers(torch.int8) == (-128, 127) and not holds(torch.uint8, -1)
    assert not holds(torch.int64, 0.5) and holds(torch.float16, float("-inf"))
    assert stored(torch.bfloat16, 0.999) == 1 and stored(torch.float32, 1e-50) == 0
