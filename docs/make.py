"""Makes the picture of the family and the tables of the pages: python docs/make.py"""

import ast
from pathlib import Path

import torch
import torch.nn.functional as F

import hf_gem
from hf_gem.cli.choosing import caveat, findings
from hf_gem.cli.drawing import FIGURES, save
from hf_gem.family.names import grammar
from hf_gem.family.table import FAMILIES
from hf_gem.files import markdown_table, replace_between
from hf_gem.fit import Histogram, error, fit

DOCS = Path(__file__).resolve().parent
OURS = ("gem", "egem", "segem")
GAIN_NAMES = (
    *("gem", "gem_n2", "gem_n3", "egem_eps10", "egem_eps0.01", "egem", "egem_eps1em6", "egem_n2_eps10"),
    *("egem_n2_eps0.01", "egem_n2", "egem_n2_eps1em6", "segem_eps0.01", "segem", "segem_eps1em6", "segem_n2_eps0.01"),
    *("segem_n2", "segem_n2_eps1em6"),
)
BASELINES = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def gain_table() -> str:
    rows = [(f"`{name}`", f"{hf_gem.gain(name):.6f}") for name in GAIN_NAMES]
    rows += [(name, f"{hf_gem.gain(function):.6f}") for name, function in BASELINES.items()]
    return markdown_table(["activation", "gain"], rows) + "\n"


def fit_table() -> str:
    """The closest members to other activations on normal inputs, by the share of `E[f^2]` that changes."""
    uniform = (torch.arange(2**18, dtype=torch.float64) + 0.5) / 2**18
    rows = []
    for target in (F.gelu, F.silu, F.mish):
        for mean, deviation in ((0.0, 1.0), (-1.0, 2.0)):
            values = Histogram()
            values.update(torch.distributions.Normal(mean, deviation).icdf(uniform))
            found = [fit(values, target, family) for family in ("egem", "segem")]
            rows.append(
                [
                    target.__name__,
                    f"N({mean:g}, {deviation**2:g})",
                    *(f"`{member.spec.name}` {member.relative_error:.4f}" for member in found),
                    f"{error('egem_eps1em12', values, target, relative=True):.4f}",
                ]
            )
    return markdown_table(["f", "inputs", "E-GEM", "SE-GEM", "ReLU"], rows) + "\n"


def family_table() -> str:
    rows = [(FAMILIES[name].title, f"`{FAMILIES[name].formula}`", f"`{grammar(FAMILIES[name])}`") for name in OURS]
    return markdown_table(["family", "f(x)", "names"], rows) + "\n"


def floors() -> dict[str, set[str]]:
    """Floor of the package -> the other floors that its files import, inside functions too; read from the source."""
    package = Path(hf_gem.__file__).parent
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).with_suffix("").parts
        if place == ("__init__",):
            continue
        targets = found.setdefault(place[0], set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(place):
                # `from ..family.names import x`, or `from .. import functional`
                targets |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return {floor: targets & found.keys() - {floor} for floor, targets in found.items()}


def floor_table() -> str:
    """The floors, each after all that it imports, and then by how many these are."""
    left, rows = floors(), []
    while left:
        name = min((name for name in left if not left[name] & left.keys()), key=lambda name: (len(left[name]), name))
        rows.append((f"`{name}`", ", ".join(f"`{other}`" for other in sorted(left.pop(name))) or "nothing"))
    return markdown_table(["floor", "imports"], rows) + "\n"


def write_table(page: str, name: str, table: str) -> None:
    path = DOCS / page
    path.write_text(replace_between(path.read_text(), f"<!-- {name} -->\n", f"<!-- end of {name} -->", table))


def choosing_table() -> str:
    rows = [(row["model"], row["use"] or "not known", row["why"]) for row in findings()]
    return f"{markdown_table(['model', 'use', 'why'], rows)}\n\n{caveat()}\n"


if __name__ == "__main__":
    save(FIGURES["family"], DOCS / "family.png")
    write_table("functions.md", "families", family_table())
    write_table("functions.md", "gains", gain_table())
    write_table("functions.md", "fits", fit_table())
    write_table("choosing.md", "findings", choosing_table())
    write_table("architecture.md", "floors", floor_table())
