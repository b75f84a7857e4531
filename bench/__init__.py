"""The benchmark room: `python -m bench`.

    cases/        one file per operator: its cases, their floors and goals, and who competes
    formulas      what a provider computes: its pairs, its float64 oracle, its plain formula
    baselines     the competitors from torch
    check         compares a provider with the oracle before any of its times is believed
    timing        medians, peak memory, ceilings of the machine
    overhead      what a call costs beside its kernels: first call, host time
    suite         cases x providers -> rows
    report        tables, JSON, plot; `python -m bench.report` refreshes README.md and docs/
"""
