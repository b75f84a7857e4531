"""The benchmarks: `python -m bench`.

    cases/        one file per operator: its cases, their floors and goals, and who competes
    formulas/     what a provider computes: its inputs, its work, its float64 oracle, its plain formula
    baselines/    the competitors
    accuracy      the rule of accuracy, which the tests share
    check         compares a provider with the oracle before any of its times is believed
    timing        medians, peak memory, ceilings of the machine
    overhead      what a call costs beside its kernels: first call, host time
    first_calls   compiles all kernels for sm_90 without a GPU: what first calls wait for; ahead does it for one
    suite         cases x providers -> rows
    crossover     from which length nearfar is faster than softmax attention
    report        tables, JSON, plot; `python -m bench.report` refreshes README.md and docs/
"""
