"""`make fuzz MINUTES=5`: draw calls of every operator and step from a fresh seed, and sum up what came out.

    python tests/fuzz.py --minutes 5                                        all functions in turn, for so long
    python tests/fuzz.py --minutes 60 --calls 500 --json FILE               until each function has had 500 calls, with a record
    python tests/fuzz.py --only krause_attention --seed 7
"""

import argparse
import json
import secrets
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import conftest  # noqa: F401  decides where the kernels run, before anything of nearfar is imported
import hypothesis
import torch
from strategies import CALLS

ROUND = 10  # calls of a function before the next one's turn
SHRINKING = 30  # seconds for making a failing call smaller


class Record:
    """The calls of one function, and the smallest one that failed."""

    def __init__(self, name):
        self.strategy, self.check = CALLS[name]
        self.calls, self.smallest = 0, None

    def one(self, spec, started):
        self.calls += 1
        try:
            self.check(spec)
        except Exception as error:
            if self.smallest is None or len(repr(spec)) <= len(repr(self.smallest[0])):
                self.smallest = spec, f"{type(error).__name__}: {error}"[:400]
            if time.monotonic() < started + SHRINKING:
                raise

    def draw(self, calls, seed, until):
        """Some calls from this seed; after the first one that fails those that follow are not made smaller."""
        phases = [hypothesis.Phase.generate] + ([hypothesis.Phase.shrink] if self.smallest is None else [])
        settings = hypothesis.settings(
            max_examples=calls, database=None, derandomize=False, deadline=None, phases=phases, print_blob=False,
            report_multiple_bugs=False, suppress_health_check=list(hypothesis.HealthCheck),
        )
        started = time.monotonic()

        @hypothesis.seed(seed)
        @settings
        @hypothesis.given(self.strategy)
        def test(spec):
            if time.monotonic() < until:
                self.one(spec, started)

        with suppress(Exception):  # recorded above, or hypothesis missing a failure that it was making smaller for too long
            test()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="how long to draw")
    parser.add_argument("--calls", type=int, help="stop when each function has had so many calls")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--only", choices=CALLS, action="append", help="a function; several times for several")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    records = {name: Record(name) for name in options.only or CALLS}
    started, seed = time.monotonic(), options.seed
    until = started + 60 * options.minutes
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    while time.monotonic() < until:
        left = {n: r for n, r in records.items() if options.calls is None or r.calls < options.calls}
        if not left:
            break
        for record in left.values():
            record.draw(ROUND, seed, until)
            seed += 1
    for name, record in records.items():
        print(f"{name:28} {record.calls:6} calls  {'ok' if record.smallest is None else 'FAILED'}")
        if record.smallest is not None:
            print("    smallest input: {}\n    {}".format(*record.smallest))
    if options.json is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
        found = {n: {"calls": r.calls, "smallest failure": r.smallest} for n, r in records.items()}
        summary = {"device": gpu, "torch": torch.__version__, "seed": options.seed, "functions": found}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return any(record.smallest is not None for record in records.values())


if __name__ == "__main__":
    sys.exit(main())
