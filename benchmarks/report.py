"""Makes pages with tables and plots from the records: python -m benchmarks.report

Makes a page for each machine, next to its records, and lists the machines with their goals in benchmarks/README.md.
Prints the table of goals. With --check, exits with status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import verify
from benchmarks.common import RESULTS
from hf_gem.compare import words
from hf_gem.files import markdown_table, replace_between, write_atomically

README = Path(__file__).resolve().parent / "README.md"
START, END = "<!-- results -->\n", "<!-- end of results -->"
PASSES = {"both": "both", "forward": "forward", "backward": "backward", "launched": "both, with launch"}
MIB = 2**20


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Loads machine -> name of the file -> record, in the order of the benchmarks."""
    machines: dict[str, dict[str, Any]] = {}
    for benchmark in SECTIONS:
        for path in sorted(results.glob(f"*/{benchmark}*.json")):
            machines.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    return dict(sorted(machines.items()))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_table(heads, rows) + "\n"


def number(value: float) -> str:
    return f"{value:g}" if value == int(value) else f"{value:.3f}"


def goal_table(records: dict[str, Any], brief: bool = False) -> str:
    """Makes a table of the goals of one machine and their results. `brief` sums up the goals of 0 that are met."""
    rows, num_zeros = [], 0
    for record in records.values():
        for goal in record["goals"]:
            if brief and goal["limit"] == 0 and goal["verdict"] == "pass":
                num_zeros += 1
                continue
            quartiles = "" if goal["low"] is None else f"{goal['low']:.3f} to {goal['high']:.3f}"
            sign = "≥" if goal["at_least"] else "≤"
            verdict = goal["verdict"] if goal["verdict"] == "pass" else f"**{goal['verdict']}**"
            rows.append([goal["name"], number(goal["value"]), quartiles, f"{sign} {goal['limit']:g}", verdict])
    parts = [table(["ratio or count", "measured", "quartiles", "goal", ""], rows)] if rows else []
    if num_zeros:
        parts.append(f"{num_zeros} {'more ' if rows else ''}goals are counts that must be 0, and all of them are.\n")
    return "\n".join(parts)


def ratio_table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], str, dict[str, Any]]]) -> str:
    """Makes a table with a column of ratios for each baseline in the rows.

    Args:
        heads: Heads of the first columns.
        rows: For each row, the cells of the first columns, the contestant, and ratios by baseline and contestant.
    """
    rows = list(rows)
    baselines = list(dict.fromkeys(to for _, _, ratios in rows for to in ratios))

    def cell(ratios: dict[str, Any], to: str, name: str) -> str:
        if name == to and to in ratios:
            return "1"
        ratio = ratios.get(to, {}).get(name)
        return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""

    return table(
        [*heads, *[f"time / {to}" for to in baselines]],
        [[*cells, *[cell(ratios, to, name) for to in baselines]] for cells, name, ratios in rows],
    )


def activation_table(record: dict[str, Any]) -> str:
    """Makes tables of the times of activations and their ratios to baselines. Gated MLPs get a separate table."""
    text = ""
    for group in record["results"].values():
        rows = []
        for result in group:
            case = f"{' x '.join(map(str, result['shape']))} {result['dtype']}"
            for what in ("both", "launched", "forward", "backward"):
                for name, seconds in result.get(what, {}).get("median_seconds", {}).items():
                    cells = [case, PASSES[what], name, f"{1e6 * seconds:,.1f}"]
                    rows.append((cells, name, result[what]["ratios"]))
        text += ("\n" if text else "") + ratio_table(["shape", "passes", "", "µs"], rows)
    return text


def memory_table(record: dict[str, Any]) -> str:
    results = record["results"]
    layers = results["extra_bytes_per_element"]
    text = table(
        ["between two linear layers", *[f"extra bytes per element, {dtype}" for dtype in layers]],
        [[name, *[f"{values[name]:g}" for values in layers.values()]] for name in next(iter(layers.values()))],
    )
    held, peaks = results["gpt2_held_bytes"], results["gpt2_peak_bytes"]
    largest = results.get("gpt2_largest_batch", {})
    rows = [
        [name, f"{size / MIB:,.0f}", f"{peaks[name] / MIB:,.0f}" if peaks else "-", str(largest.get(name, "-"))]
        for name, size in held.items()
    ]
    heads = [f"GPT-2 124M, {results['batch']} x 1024 tokens, bf16 autocast", "held for backward, MiB"]
    return text + "\n" + table([*heads, "peak of a step, MiB", "largest batch that fits"], rows)


def train_step_table(record: dict[str, Any]) -> str:
    rows = []
    for step in record["results"]["steps"]:
        (unit,) = (key for key in step if key.endswith("_per_second"))
        for name, rate in step[unit].items():
            held, peak = (step[key].get(name) for key in ("held_bytes", "peak_bytes"))
            cells = [
                f"{step['model']}, {step['mode']}",
                name,
                f"{rate:,.0f} {unit.partition('_')[0]}",
                f"{held / MIB:,.1f}" if held else "-",
                f"{peak / MIB:,.0f}" if peak else "-",
            ]
            rows.append((cells, name, step["ratios"]))
    heads = ["model", "activation", "per second", "held for backward, MiB", "peak, MiB"]
    return ratio_table(heads, rows)


def stage_table(record: dict[str, Any]) -> str:
    """Makes a table of how the stages of `benchmarks.gpu` ended, with the last lines of those that failed."""
    stages = record["results"]["stages"]
    text = table(
        ["stage", "ended", "seconds"],
        [[name, stage["outcome"], f"{stage['seconds']:.0f}"] for name, stage in stages.items()],
    )
    for name, stage in stages.items():
        if stage["last_lines"]:
            text += f"\nThe last lines of {name}:\n\n" + "".join(f"    {line}\n" for line in stage["last_lines"])
    return text


def device_table(record: dict[str, Any]) -> str:
    """Makes tables of the device's speeds, its clocks, and the results of the tests."""
    results = record["results"]
    facts = [
        ["copy", f"{results['copy_bytes_per_second'] / 1e9:,.0f} GB/s, read and written"],
        ["matrix product, bf16", f"{results['matmul_flops_per_second'] / 1e12:,.0f} TFLOP/s"],
    ]
    if results["peak_flops_per_second"]:
        facts.append(["peak in its data sheet, bf16", f"{results['peak_flops_per_second'] / 1e12:,.0f} TFLOP/s"])
    facts += [[name, value] for name, value in results["clocks"].items()]
    suites = results["suites"]
    text = table(["", ""], facts) + "\n"
    text += table(
        ["tests", "run", "failed", "skipped", "seconds"],
        [
            [name, str(s["tests"]), str(len(s["failures"])), str(sum(s["skipped"].values())), f"{s['seconds']:.0f}"]
            for name, s in suites.items()
        ],
    )
    for suite in suites.values():
        text += "".join(f"\nFailed: `{name}`: {message}\n" for name, message in suite["failures"].items())
    return text


def recipe_step_table(record: dict[str, Any]) -> str:
    """Makes a table of the tokens per second of the recipe, and of the recipe with one thing changed."""
    results = record["results"]
    rows = []
    for name, variant in results["variants"].items():
        mfu = f"{variant['mfu']:.1%}" if variant["mfu"] else "-"
        peak = f"{variant['peak_bytes'] / MIB:,.0f}" if variant["peak_bytes"] else "-"
        cells = [
            name,
            " ".join(f"`{flag}`" for flag in variant["flags"]),
            f"{variant['tokens_per_second']:,.0f}",
            mfu,
            peak,
        ]
        rows.append((cells, name, results["ratios"]))
    text = ratio_table(["", "flags", "tokens per second", "MFU", "peak, MiB"], rows)
    if rate := results["tokens_per_second_of_the_loop"]:
        text += f"\nThe loop itself, as shipped: {rate:,.0f} tokens per second.\n"
    return text


def evidence_table(record: dict[str, Any]) -> str:
    """Makes a table of the cost and the results of a study."""
    results = record["results"]
    if not results:
        return "It was not run.\n"
    if not results["comparisons"]:
        return "Its tuning is not finished.\n"
    facts = ", ".join(f"{name} {value}" for name, value in results["cost"].items())
    rows = [
        [
            c["arm"],
            f"{c['choice'][1]:g}",
            str(len(c["seeds"])),
            words.number(c["mean"]),
            words.number(c["baseline_mean"]),
            f"{words.signed(c['difference'])} ({words.span(c['interval'])})",
            words.cell(c["p_holm"], ".3g"),
            f"**{c['verdict']}**",
        ]
        for c in results["comparisons"]
    ]
    heads = ["arm", "learning rate", "seeds", results["metric"], results["baseline"], "difference, 95 %", "p, Holm", ""]
    link = f"[Report of the study]({results['study']}/report.md)"
    return table(heads, rows) + f"\n{link}; {facts}.\n"


def exhaustive_table(*records: dict[str, Any]) -> str:
    rows = []
    for record in records:
        found = record["results"]
        for quantity, kernels in found["kernels"].items():
            formulas = found["formulas"][quantity]
            differing = found["differing_bits"][quantity] if record["device"] == "cpu" else None
            rows.append(
                [
                    f"{found['name']}, {quantity}",
                    f"{found['inputs']:,}",
                    f"{kernels['max_ulp']:.3f} at {kernels['at']:.6g}",
                    f"{kernels['smallest_in_ulp']:.3g}",
                    f"{kernels['max_absolute_below']:.3g}",
                    f"{formulas['max_ulp']:.3f}",
                    "-" if differing is None else f"{differing:,}",
                ]
            )
    heads = [
        "function",
        "inputs",
        "worst ulp",
        "for results from",
        "worst absolute error below",
        "worst ulp of the formulas",
    ]
    return table([*heads, "results that differ from the formulas"], rows)


def headline(records: dict[str, Any]) -> str:
    """Describes a machine, and lists the versions, commits and commands of its records."""
    commits: dict[str, dict[str, None]] = {}
    for environment in (record["environment"] for record in records.values()):
        hardware, versions = environment["hardware"], environment["versions"]
        parts = [*hardware["gpus"], f"{hardware['cpu']}, {hardware['torch_threads']} threads"]
        parts += [f"{package} {versions[package]}" for package in ("python", "torch", "triton") if package in versions]
        commit = (environment["commit"] or "unknown")[:10] + (" with changes" if environment["dirty"] else "")
        commits.setdefault("; ".join(parts), {})[commit] = None
    lines = [f"{parts}; commit{'s' * (len(those) > 1)} {', '.join(those)}" for parts, those in commits.items()]
    commands = dict.fromkeys(f"    {record['environment']['command']}\n" for record in records.values())
    return "\n\n".join(lines) + "\n\n" + "".join(commands) + "\n"


SECTIONS: dict[str, tuple[str, Callable[..., str]]] = {
    "gpu": ("Stages", stage_table),
    "device": ("Device", device_table),
    "activation": ("Activations alone", activation_table),
    "memory": ("Memory", memory_table),
    "recipe_step": ("GPT-2 as the recipe trains it", recipe_step_table),
    "train_step": ("Training steps", train_step_table),
    "evidence": ("A study", evidence_table),
    "sweep": ("By size", lambda record: "![time by size](sweep.png)\n"),
    "exhaustive": ("All float32 inputs", exhaustive_table),
    "verify": ("How exact", lambda record: verify.table([verify.Row(**row) for row in record["results"]]) + "\n"),
}


def page(machine: str, records: dict[str, Any]) -> str:
    """Makes the page of a machine in Markdown, for a file next to its records."""
    text = f"# {machine}\n\n{headline(records)}{goal_table(records)}"
    quick = [name for name, record in records.items() if record["quick"]]
    if quick:
        text += f"\nQuick runs, whose figures mean nothing: {', '.join(quick)}.\n"
    skipped = dict.fromkeys(reason for record in records.values() for reason in record["skipped"])
    text += "".join(f"\nSkipped: {reason}.\n" for reason in skipped)
    for benchmark, (title, make) in SECTIONS.items():
        chosen = [record for record in records.values() if record["benchmark"] == benchmark]
        if chosen:
            text += f"\n## {title}\n\n{make(*chosen)}"
    return text


def render(machines: dict[str, dict[str, Any]], results: str) -> str:
    """Lists the machines and their goals in Markdown. `results` is the folder with a folder and page of each."""
    text = ""
    for machine, records in machines.items():
        text += f"\n## {machine}\n\n{headline(records)}{goal_table(records, brief=True)}"
        text += f"\n[All tables of {machine}]({results}/{machine}/README.md)\n"
    return text + "\n"


def write_pages(results: Path, machines: dict[str, dict[str, Any]]) -> None:
    """Writes the page and the plot of each machine next to its records."""
    for machine, records in machines.items():
        if "sweep" in records:
            from benchmarks.pictures import draw_sweep

            draw_sweep(records["sweep"], results / machine / "sweep.png")
        write_atomically(results / machine / "README.md", page(machine, records))


def report(results: Path, readme: Path) -> dict[str, dict[str, Any]]:
    """Writes the pages, and the goals of all machines into the readme. Returns the records.

    Raises:
        ValueError: The readme has no markers for them.
    """
    folder = Path(os.path.relpath(results, readme.parent)).as_posix()
    machines = load(results)
    text = replace_between(readme.read_text(encoding="utf-8"), START, END, render(machines, folder))
    write_atomically(readme, text)
    write_pages(results, machines)
    return machines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=README, help="file for the tables (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a goal is missed")
    arguments = parser.parse_args(argv)
    machines = report(arguments.results, arguments.readme)
    missed = 0
    for machine, records in machines.items():
        print(f"\n{machine}\n\n{goal_table(records)}")
        missed += sum(goal["verdict"] != "pass" for record in records.values() for goal in record["goals"])
    print(f"{missed} goals missed" if missed else "all goals met" if machines else "no records")
    if arguments.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
