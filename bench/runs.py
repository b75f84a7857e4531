"""What was measured, in files.

A run is one JSON file, written anew after each row, so that whatever ends it keeps what was measured. A record is what is
committed: a file for each name of a case under bench/results/<gpu>/, made from a run (record.py). Both have

    schema          SCHEMA; files from before there was one have none, and no packages, tags and sources
    environment     machine and versions
    ceilings        what the machine can do
    rows            one for each case and provider
    measures        what stands beside the kernels: crossovers, growth, first call, host time

A run has the last two in `records`, by name and room, and `finished`: whether all that it was to measure is there.
"""

import csv
import json
import os
from pathlib import Path

SCHEMA = 2
BESIDE = ("tags", "source", "providers", "plotted", "goal_ms", "goal_over")  # fields of a case that change no result
HEAD = ("schema", "environment", "ceilings")
COLUMNS = ("name", "title", "source", "provider", "label", "status", "forward_ms", "backward_ms", "forward_percent_of_floor",
           "backward_percent_of_floor", "peak_bytes", "worst_output", "worst_error", "worst_limit", "note")


class Run:
    """A run's file and what is in it. done: (case, provider) of the rows that an earlier start measured."""

    def __init__(self, path, data):
        self.path, self.data = path, data
        self.done = {identity(row): row for record in data["records"] for row in record["rows"]}

    @classmethod
    def start(cls, path, environment, ceilings):
        head = {"schema": SCHEMA, "environment": environment, "ceilings": ceilings}
        run = cls(path, {**head, "finished": False, "records": []})
        run.save()
        return run

    @classmethod
    def resume(cls, path, environment):
        """Go on with a run of the same machine, versions and commit."""
        data = read(path)
        if "records" not in data:
            raise ValueError(f"{path} is a record, not a run: --resume needs a file that `run` wrote")
        changed = [key for key, value in environment.items() if key != "date" and data["environment"].get(key) != value]
        if changed:
            raise ValueError(f"{path} was measured with another {', '.join(changed)}: start a new run, without --resume")
        return cls(path, {**data, "finished": False})

    def record(self, name, room, fingerprint):
        """The record of a name, a new one unless an earlier start made it."""
        found = [record for record in self.data["records"] if record["name"] == name]
        if not found:
            new = {"name": name, "room": room, "fingerprint": fingerprint, "rows": [], "measures": []}
            self.data["records"].append(new)
        return found[0] if found else self.data["records"][-1]

    def finish(self):
        self.data["finished"] = True
        self.save()

    def save(self):
        """Replace the file by a complete one, at once."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def identity(row):
    """What distinguishes a row from the others of a run."""
    return f"{row['provider']} {case_identity(row['case'])}"


def case_identity(case):
    """What a case computes: its description but for what may change without another result."""
    return json.dumps({key: value for key, value in case.items() if key not in BESIDE}, sort_keys=True)


def read(path):
    """The JSON of a run or record."""
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not a file of results: {error}") from None
    if not isinstance(data, dict) or not {"records", "rows"} & set(data):
        raise ValueError(f"{path} is not a file of results: it has neither records nor rows")
    if data.get("schema", 0) > SCHEMA:
        raise ValueError(f"{path} has schema {data['schema']}, and this nearfar knows schemas up to {SCHEMA}")
    return data


def load(path):
    """All records of a run, of a record, or of a folder of records."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ValueError(f"{path} has no results: no file there ends in .json")
        return [record for file in files for record in load(file)]
    data = read(path)
    head = {key: data[key] for key in HEAD if key in data}
    return [{**head, **record} for record in data["records"]] if "records" in data else [data]


def write_record(folder, record):
    """One file for all cases of a name."""
    path = folder / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def write_csv(path, records):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_row(row) for record in records for row in record["rows"])
    return path


def csv_row(row):
    worst = row["check"]["worst"] if row["check"] else (None, None, None)
    found = {"name": row["case"]["name"], "source": row["case"].get("source"), "peak_bytes": row["peak_bytes"]}
    found |= {key: row[key] for key in ("title", "provider", "label", "status", "note")}
    found |= dict(zip(("worst_output", "worst_error", "worst_limit"), worst, strict=True))
    for direction in ("forward", "backward"):
        for key in ("ms", "percent_of_floor"):
            found[f"{direction}_{key}"] = row[direction] and row[direction][key]
    return found
