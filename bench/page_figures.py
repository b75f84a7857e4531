"""The figures of the HTML report, by plotly, in colours for light and dark pages."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench import crossover, plots, text

COLORS = ("#2f7ed8", "#e4572e", "#17a398", "#a05fc9", "#d9a300", "#6c8ea0", "#c2185b", "#7a9e3a")
GRAY = "#808080"


def figures(records):
    """[(heading, what it shows, HTML)] of those that the records have data for."""
    rows = [row for record in records for row in record["rows"] if row["forward"]]
    sweeps = sweeps_of(records)
    drawn = [
        *((f"Time against length: {room}", "Crosses mark where nearfar becomes faster. Dashed: growth as N and as N².",
           sweep(swept, lambda row, total: crossover.total_ms(row, total), "ms", crossover.TOTALS))
          for room, swept in sweeps.items()),
        *((f"Memory against length: {room}", "The most in use during forward and backward, inputs included.",
           sweep(swept, lambda row, _: row["peak_bytes"] and row["peak_bytes"] / 2**20, "MiB", ("peak",)))
          for room, swept in sweeps.items() if any(row["peak_bytes"] for row in swept)),
        ("Roofline", "Each pass by the operations and bytes it needs at least. The roof is what copying and multiplying "
         "matrices reached in the same run.", roofline(records)),
        ("Accuracy", "The worst output of each provider over its limit, which is the line. Only what is below it has a time.",
         accuracy(rows)),
    ]
    return [(heading, about, to_html(figure)) for heading, about, figure in drawn]


def sweeps_of(records):
    """{room: rows} that draw lines of two lengths or more."""
    found = {}
    for record in records:
        plotted = [row for row in record["rows"] if row["case"]["plotted"] and row["forward"]]
        if len({row["case"]["length"] for row in plotted}) > 1:
            found.setdefault(f"{record['room']}, {record['environment']['device']}", []).extend(plotted)
    return found


def sweep(rows, value, unit, panels):
    """Lines of value(row, panel) against length."""
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.03)
    for column, panel in enumerate(panels, 1):
        for index, (label, line) in enumerate(plots.series(rows).items()):
            points = [(row["case"]["length"], y) for row in line if (y := value(row, panel)) is not None]
            ours = line[0]["ours"]
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], name=label, legendgroup=label, showlegend=column == 1,
                mode="lines+markers", line={"width": 3 if ours else 1.5, "color": COLORS[index % len(COLORS)]},
                marker={"symbol": "circle" if ours else "square", "size": 7}, row=1, col=column,
                hovertemplate=f"%{{x:,}} tokens: %{{y:.3g}} {unit}<extra>{label}</extra>",
            )
        crossed = [c for c in crossover.crossings(rows) if c.total == panel and c.length]
        if crossed:
            figure.add_scatter(
                x=[c.length for c in crossed], y=[c.ms for c in crossed], text=[c.what for c in crossed], mode="markers",
                marker={"symbol": "x", "size": 9, "color": GRAY}, name="crossover", showlegend=column == 1, row=1, col=column,
                hovertemplate="%{x:.0f} tokens<extra>%{text}</extra>",
            )
    lengths = sorted({row["case"]["length"] for row in rows})
    shown = lengths[:: -(-len(lengths) // 8)]
    figure.update_xaxes(type="log", tickvals=shown, ticktext=[text.token_count(n) for n in shown], title="length (tokens)")
    figure.update_yaxes(type="log")
    figure.update_yaxes(title=unit, col=1)
    guides(figure, rows, value, panels)
    return styled(figure, height=520)


def guides(figure, rows, value, panels):
    """Dashed lines of slope 1 and 2 from the lower left corner of each panel."""
    for column, panel in enumerate(panels, 1):
        points = [(row["case"]["length"], y) for row in rows if (y := value(row, panel))]
        if not points:
            continue
        first, last = min(x for x, _ in points), max(x for x, _ in points)
        low, high = min(y for _, y in points), max(y for _, y in points)
        for slope, name in ((1, "N"), (2, "N²")):
            end = min(last, first * (high / low) ** (1 / slope))
            figure.add_scatter(
                x=[first, end], y=[low, low * (end / first) ** slope], mode="lines+text", text=["", f"∝ {name}"],
                textposition="top left", line={"dash": "dash", "width": 1, "color": GRAY}, showlegend=False, hoverinfo="skip",
                row=1, col=column,
            )


def roofline(records):
    """Achieved TFLOP/s against operations for each byte, nearfar's and the others'."""
    figure = go.Figure()
    passes = [(record, row, d) for record in records for row in record["rows"] for d in text.DIRECTIONS if row[d]]
    for ours, name, color in ((True, "nearfar", COLORS[0]), (False, "others", GRAY)):
        chosen = [(row, d, row[d]) for _, row, d in passes if row["ours"] == ours and row[d]["bytes"] and row[d]["flops"]]
        figure.add_scatter(
            x=[p["flops"] / p["bytes"] for _, _, p in chosen], y=[p["tflop_per_s"] for _, _, p in chosen], mode="markers",
            name=name, marker={"color": color, "size": 8 if ours else 6, "symbol": "circle" if ours else "square"},
            text=[f"{row['case']['name']}: {row['title']}<br>{row['label']}, {d}" for row, d, _ in chosen],
            hovertemplate="%{text}<br>%{y:.3g} TFLOP/s<extra></extra>",
        )
    intensities = [row[d]["flops"] / row[d]["bytes"] for _, row, d in passes if row[d]["bytes"] and row[d]["flops"]]
    devices = {record["environment"]["device"]: record["ceilings"] for record in records}
    for device, ceilings in devices.items():
        knee = ceilings["flops_per_s"] / ceilings["bytes_per_s"]
        xs = [min(*intensities, knee), knee, max(*intensities, knee)]
        roof = [1e-12 * min(x * ceilings["bytes_per_s"], ceilings["flops_per_s"]) for x in xs]
        line = {"color": GRAY, "width": 2}
        figure.add_scatter(x=xs, y=roof, mode="lines", line=line, name=f"roof of {device}", hoverinfo="skip")
    figure.update_xaxes(type="log", title="operations for each byte")
    figure.update_yaxes(type="log", title="TFLOP/s")
    return styled(figure, height=480)


def accuracy(rows):
    """The worst error over its limit of every row, a column for each case."""
    figure = go.Figure()
    for ours, name, color in ((True, "nearfar", COLORS[0]), (False, "others", GRAY)):
        chosen = [row for row in rows if row["ours"] == ours and row["check"] and row["check"]["worst"][1]]
        figure.add_scatter(
            x=[row["case"]["name"] for row in chosen],
            y=[row["check"]["worst"][1] / row["check"]["worst"][2] for row in chosen],
            mode="markers", name=name, marker={"color": color, "size": 7, "symbol": "circle" if ours else "square"},
            text=[f"{row['title']}<br>{row['label']}, {row['check']['worst'][0]}" for row in chosen],
            hovertemplate="%{text}<br>%{y:.2g} of the limit<extra></extra>",
        )
    figure.add_hline(y=1, line={"color": COLORS[1], "width": 2})
    figure.update_yaxes(type="log", title="error / limit")
    return styled(figure, height=420)


def styled(figure, height):
    """Without a background of its own, in a gray that shows on light and on dark."""
    figure.update_layout(
        height=height, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": GRAY, "size": 13},
        margin={"l": 60, "r": 20, "t": 40, "b": 50}, legend={"orientation": "h", "y": -0.2},
    )
    grid = {"gridcolor": "rgba(128,128,128,0.2)", "linecolor": GRAY, "zeroline": False}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    return figure


def to_html(figure):
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
