"""The program fuzzer: compares random small training programs with eager mode in everything that a caller can see.

    python -m liger_compile.testing.programs --programs 1000 --seed 1

`grammar.py` defines the statements of programs, `program.py` a program and its source, `strategies.py` how Hypothesis
draws and shrinks programs, `differential.py` the comparison. It needs Hypothesis.
"""
