"""The private parts of torch that this project uses. No other package names one; `tests/test_layering.py` checks it.

A part is private if a component of its name begins with one underscore: `torch._dynamo.config`, `tensor._version`. Each
module has the parts of one subject, and a table of them in its docstring:

    part        the private name, with all names that are reached through it
    torch       the versions of torch that have the part in this form; 2.11 and 2.13 were read
    can go      the version of torch from which a public name serves, or "no public name": no module of torch 2.13
                whose name is public lists it in `__all__`, and its documentation has no equivalent

The modules import none of ours, import nothing slow before it is needed, and know neither terms nor patterns.
"""
