"""Numbers and names as tables show them, on a terminal and on pages."""

DIRECTIONS = ("forward", "backward")


def part(row, direction, key, digits, factor=1):
    return "-" if row[direction] is None else significant(factor * row[direction][key], digits)


def both(row, key, digits, factor=1):
    return " / ".join(part(row, direction, key, digits, factor) for direction in DIRECTIONS if row[direction]) or "-"


def significant(value, digits):
    """Text of so many significant digits, never fewer than the whole part has."""
    if abs(value) < 1:
        return f"{value:#.{digits}g}"
    return f"{value:.{max(digits - len(str(int(abs(value)))), 0)}f}"


def measured(m):
    digits = 0 if m["unit"] == "tokens" else 2
    return "-" if m["value"] is None else f"{m['value']:.{digits}f} {m['unit']}"


def goal(m):
    return "" if m["goal"] is None else f"<= {m['goal']:g} {m['unit']}"


def met(m):
    return m["goal"] is None or (m["value"] is not None and m["value"] <= m["goal"])


def token_count(n):
    return f"{n >> 20}M" if n >= 2**20 else f"{n >> 10}k" if n >= 2**10 else str(n)
