"""The benchmarks: `python -m bench`.

    cases/        cases.toml, the table of all cases, and one file per operator: its floors, and who competes
    formulas/     what a provider computes: its inputs, its work, its float64 oracle, its plain formula
    baselines/    the competitors
    accuracy      the rule of accuracy, which the tests share
    check         compares a provider with the oracle before any of its times is believed
    timing        medians, peak memory, ceilings of the machine
    overhead      what a call costs beside its kernels: first call, host time
    first_calls   compiles all kernels for sm_90 without a GPU: what first calls wait for; ahead does it for one
    suite         cases x providers -> rows
    running       which cases, how long they may take, and their rows into a run
    runs          files of runs and records; record keeps a run for committing, compare compares two
    fingerprint   whether a record is of today's kernels and cases
    trace         the kernels of a case and their times
    crossover     from which length nearfar is faster than softmax attention
    terminal      tables on a terminal; text writes their numbers
    page          the HTML report of a run; plots draws a sweep, figures those of the README and of the site
    report        the tables of README.md and docs/, which `python -m bench.report` refreshes
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler, which counts memory, announces itself at every call
