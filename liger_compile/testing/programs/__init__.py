"""The program fuzzer: random small training programs, each compared with eager mode in all that a caller can see.

    python -m liger_compile.testing.programs --programs 1000 --seed 1

`grammar.py` says what programs are made of, `program.py` what one is and its source, `strategies.py` how Hypothesis
draws and shrinks one, `differential.py` what is compared and with what. It needs Hypothesis.
"""
