"""Keep a run for committing: `python -m bench record RUN` writes its records to bench/results/<gpu>/."""

from bench import runs


def record(path, results, without=()):
    """Write the records of a run, and return their paths.

    Raises ValueError, with everything that is amiss, where a figure could not be trusted or lacks those it belongs beside.
    without: providers that may be missing.
    """
    data = runs.read(path)
    if "records" not in data:
        raise ValueError(f"{path} is a record already: give a file that `python -m bench run` wrote")
    if amiss := list(reasons(data, set(without))):
        raise ValueError(f"{path} is not recorded:\n" + "\n".join(f"  {reason}" for reason in amiss))
    return [runs.write_record(results / data["environment"]["short_name"], record) for record in runs.load(path)]


def reasons(data, without):
    """Why a run is not to be recorded."""
    rows = [row for record in data["records"] for row in record["rows"]]
    if data["environment"]["short_name"] == "cpu":
        yield "it was measured on a CPU, and records are of GPUs"
    if not data["finished"]:
        yield "it was stopped before its end: go on with `python -m bench run --resume`"
    if not rows:
        yield "it has no rows"
    custom = sorted({row["case"]["name"] for row in rows if row["case"]["name"].endswith("-custom")})
    if custom:
        yield f"{', '.join(custom)} is of no case in bench/cases/cases.toml: add one, so that others can measure it again"
    for row in rows:
        if row["status"] in ("wrong", "failed"):
            yield f"{row['case']['name']}, {row['title']}: {row['label']} is {row['status']}: {row['note']}"
    missing = sorted({row["provider"] for row in rows if row["status"] == "missing"} - without)
    if missing:
        yield f"{', '.join(missing)} is not installed: install it, or say so with --without {','.join(missing)}"
