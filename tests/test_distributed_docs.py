"""docs/distributed.md and docs/compile.md quote their results files."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "torch"


def memory_table():
    rows = json.loads((RESULTS / "distributed-memory-4.json").read_text())["rows"]
    lines = [
        "| MB on a rank | base | adapters | gradients | Adam | peak of a step, on top |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (row[key] / 1e6 for key in ("frozen", "adapters", "gradients", "optimizer", "peak of a step"))
        lines.append(f"| {row['strategy']} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    return "\n".join(lines)


def overhead_table(file):
    rows = json.loads(file.read_text())["rows"]
    times = {(row["problem"], row["candidate"]): row for row in rows}
    lines = [
        "| step | eager, µs | compiled, µs | compiled ÷ eager | frozen base: compiled ÷ eager |",
        "|---|---|---|---|---|",
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows if row["candidate"] == "compiled"):
        eager, compiled = times[problem, "eager"], times[problem, "compiled"]
        frozen = times.get((problem, "frozen compiled"))
        cells = f"{eager['us']['median']:.0f} | {compiled['us']['median']:.0f} | {compiled['ratio']['median']:.2f}"
        base = "–" if frozen is None else f"{frozen['ratio']['median']:.2f}"
        lines.append(f"| {problem.removeprefix('step, ')} | {cells} | {base} |")
    return "\n".join(lines)


def python_cost(file):
    ours, linear = (
        next(row["us"]["median"] for row in json.loads(file.read_text())["rows"] if row["candidate"] == name)
        for name in ("ours", "linear")
    )
    return f"{ours - linear:.1f} µs more than `nn.Linear`'s"


def test_the_memory_table_is_the_results_file():
    assert memory_table() in (ROOT / "docs" / "distributed.md").read_text()


def test_the_cost_of_a_call_is_the_results_file():
    (file,) = RESULTS.glob("overhead-*.json")
    page = (ROOT / "docs" / "compile.md").read_text()
    assert file.name in page
    assert overhead_table(file) in page
    assert python_cost(file) in page
