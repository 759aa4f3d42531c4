"""Half precision is rounded between two operations if the second undoes the first, under Inductor too."""

import pytest
import torch
import torch.nn.functional as F

import liger_compile


def underflows(x):
    return (x * 1e-8) * 1e8


def underflows_in_division(x):
    return torch.div(x, 2.0**22).view(-1) / 2.0**-22


def overflows(x):
    return x * 3e4 * 2.0**-14


def rounds_to_whole_numbers(x):
    return (x + 768.0) - 768.0


def rounds_before_a_head(x):
    shifted = torch.sub(x, 192.0)
    return F.relu(shifted + 192.0)


def in_a_chain_of_writes(x):
    return x.clone().mul_(1e-8).mul_(1e8)


def in_statements(x):
    y = x + 0.5
    y.mul_(1e-8)
    y.mul_(1e8)
    return y


def in_operators(x):
    y = x + 0.5
    y -= 768
    y += 768
    return y * 2


PROGRAMS = (
    underflows,
    underflows_in_division,
    overflows,
    rounds_to_whole_numbers,
    rounds_before_a_head,
    in_a_chain_of_writes,
    in_statements,
    in_operators,
)


IN_BFLOAT16 = (rounds_to_whole_numbers, rounds_before_a_head, in_operators)


@pytest.mark.parametrize(
    ("programs", "dtype"),
    [(PROGRAMS, torch.float16), (IN_BFLOAT16, torch.bfloat16)],
    ids=["float16", "bfloat16"],
)
def test_values_and_gradients_are_those_of_eager_mode(programs, dtype):
    """Every program has an input of its own; they are compiled together, as a compilation by Inductor takes long."""

    def all_of(*leaves):
        return [function(leaf) for function, leaf in zip(programs, leaves, strict=True)]

    def leaves():
        return [(torch.arange(-40, 40) * 0.37).to(dtype).requires_grad_() for _ in programs]

    ours, eagers = leaves(), leaves()
    compiled = torch.compile(all_of, backend="liger", options={"liger.strict": True})
    for results in zip(programs, compiled(*ours), all_of(*eagers), ours, eagers, strict=True):
        function, found, expected, leaf, eager = results
        assert torch.equal(found, expected), function
        for result in (found, expected):
            result.backward((torch.arange(80.0) * 0.11).to(dtype).view_as(result), retain_graph=True)
        assert torch.equal(leaf.grad, eager.grad), function


def notes_of(function, *arguments, **options):
    torch.compile(function, backend="liger", options=options)(*arguments)
    return [note for report in liger_compile.reports() for note in report.notes if "half precision" in note]


def test_the_report_says_it():
    (note,) = notes_of(underflows, torch.ones(4).half())
    assert note == "half precision is rounded between two operations in 1 place: the second undoes the first"


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: x * 0.5 * 0.25, torch.float16),
        (lambda x: x + 1 + 2, torch.bfloat16),
        (underflows, torch.bfloat16),  # its range is that of float32
        (underflows, torch.float32),
        (rounds_to_whole_numbers, torch.float32),
    ],
)
def test_other_numbers_stay_in_one_kernel(function, dtype):
    assert not notes_of(function, torch.ones(4, dtype=dtype))


def test_another_compiler_rounds_by_itself():
    assert not notes_of(underflows, torch.ones(4).half(), **{"liger.inner": "aot_eager"})
