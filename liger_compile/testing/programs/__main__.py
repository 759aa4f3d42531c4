"""python -m liger_compile.testing.programs: a long run. Prints each faulty program; exit status 1 if there are any.

--programs N      the number of programs (default 1000)
--seed N          the first seed (default 0); a seed gives the same programs with the same version of Hypothesis
--processes N     the number of parallel processes (default 1)
--inner NAME      the compiler of the rewritten graphs (default aot_eager)
--device NAME     cpu or cuda
--policies NAMES  the policies that each program draws from (default auto,always,auto,never)
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter

from liger_compile.testing.programs.search import Settings, worker

PER_SEARCH = 100  # programs that one Hypothesis search draws


def _total(counts: Counter[str]) -> int:
    return sum(count for kind, count in counts.items() if kind != "with a rewrite")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m liger_compile.testing.programs")
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--inner", default="aot_eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policies", default="auto,always,auto,never")
    arguments = parser.parse_args()
    searches = -(-arguments.programs // PER_SEARCH)
    how = Settings(tuple(arguments.policies.split(",")), arguments.inner, arguments.device)
    tasks = [(arguments.seed + i, how, PER_SEARCH) for i in range(searches)]
    counts: Counter[str] = Counter()
    faults, start = 0, time.time()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes, maxtasksperchild=1) as pool:
        for seed, found, fault in pool.imap_unordered(worker, tasks):
            counts += found
            if fault:
                faults += 1
                print(f"--- seed {seed}\n{fault}\n", flush=True)
            print(f"{_total(counts)} programs, {time.time() - start:.0f} s: {dict(counts)}", flush=True)
    print(f"{_total(counts)} programs, {faults} wrong")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
