"""The measured choices between backends as pages show them: a table of an operator, or a sentence about all."""

from nearfar.runtime import choices
from nearfar.runtime.dispatch import CUDA_FIRST

OVERVIEW = "overview"
NAMES = {"cuda": "CUDA", "triton": "Triton"}


def markdown(operator):
    """The table of an operator's rows with the runs that they are of, or the overview."""
    if operator == OVERVIEW:
        return overview()
    rows, runs = choices.rows(operator), choices.table()["runs"]
    numbers = {run: 1 + i for i, run in enumerate(dict.fromkeys(row[b]["run"] for row in rows for b in CUDA_FIRST))}
    keys = [name.replace("_", " ") for name in rows[0]["key"]]
    head = [*keys, "measured case", *NAMES.values(), '"auto"', "runs"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [*map(value, row["key"].values()), case(row["case"]), *(times(row[name]) for name in CUDA_FIRST), chosen(row)]
        lines.append([*cells, ", ".join(str(n) for n in dict.fromkeys(numbers[row[name]["run"]] for name in CUDA_FIRST))])
    table = ["| " + " | ".join(line) + " |" for line in lines]
    notes = [f"{number}. {described(runs[run])}" for run, number in numbers.items()]
    heading = f"Milliseconds, {' / '.join(directions(rows[0]))}.\n"
    return "\n".join([heading, *table, "\nRuns (CUDA's, Triton's):\n", *notes, ""])


def value(expected):
    if isinstance(expected, bool):
        return "yes" if expected else "no"
    if isinstance(expected, list):
        least, most = expected
        return f"from {least}" if most is None else f"{least} to {most}"
    return str(expected)


def case(measured):
    """Sizes as the other tables have them, and the options."""
    sizes = "".join(f"{name}{measured[name]} " for name in ("B", "H", "Hkv", "N", "D") if name in measured)
    options = {name: option for name, option in measured.items() if name not in ("B", "H", "Hkv", "N", "D", "dtype")}
    words = [name if option is True else f"{name} {written(option)}" for name, option in options.items() if option]
    return ", ".join([sizes + measured["dtype"], *words])


def written(option):
    return ",".join(map(str, option)) if isinstance(option, list) else str(option)


def directions(row):
    return [name for name in ("forward", "backward") if name in row["cuda"]]


def times(backend):
    return " / ".join(f"{backend[name]:g}" for name in ("forward", "backward") if name in backend)


def chosen(row):
    return " / ".join(NAMES[choices.order(row, direction)[0]] for direction in directions(row))


def described(run):
    """Where and when, and what nobody wrote down."""
    versions = {"torch": run["torch"], "Triton": run["triton"], "commit": run["commit"]}
    unknown = [name for name, version in versions.items() if version == "unknown"]
    known = [f"{name} {version}" for name, version in versions.items() if version != "unknown"]
    words = [run["gpu"], run["date"][:10] if run["date"] != "unknown" else "date unknown", *known]
    if unknown:
        words.append(f"{', '.join(unknown)} unknown")
    return f"{', '.join(words)}; method: {run['method']}; source: {run['source']}."


def overview():
    """How many cases there are, where they were measured, and how often CUDA C++ is the faster."""
    table = choices.table()
    rows = [row for rows in table["choices"].values() for row in rows]
    counts = []
    for direction in ("forward", "backward"):
        measured = [choices.order(row, direction) for row in rows if direction in directions(row)]
        counts.append(f"{measured.count(CUDA_FIRST)} of {len(measured)} {direction}s")
    days = sorted({run["date"][:10] for run in table["runs"].values()} - {"unknown"})
    named = {run["gpu"] for run in table["runs"].values()}
    gpus = sorted(gpu for gpu in named if not any(gpu in other for other in named - {gpu}))  # H100 is one of the full names
    architectures = sorted({f"{row['key']['capability']}.x" for row in rows})
    return (
        f"`python/nearfar/runtime/choices.json` has {len(rows)} cases of {len(table['choices'])} operators, of compute "
        f"capability {', '.join(architectures)}, measured on {', '.join(gpus)} from {days[0]} to {days[-1]}: CUDA C++ was the "
        f"faster in {' and '.join(counts)}.\n"
    )
