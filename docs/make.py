"""Makes the picture of the family and the table of gains: python docs/make.py"""

from pathlib import Path

import torch

import hf_gem

DOCS = Path(__file__).resolve().parent
GAIN_NAMES = (
    *("gem", "gem_n2", "gem_n3", "egem_eps10", "egem_eps0.01", "egem", "egem_eps1em6", "egem_n2_eps10"),
    *("egem_n2_eps0.01", "egem_n2", "egem_n2_eps1em6", "segem_eps0.01", "segem", "segem_eps1em6", "segem_n2_eps0.01"),
    *("segem_n2", "segem_n2_eps1em6"),
)
BASELINES = {"relu": torch.nn.functional.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}


def gain_table() -> str:
    rows = [(f"`{name}`", hf_gem.gain(name)) for name in GAIN_NAMES]
    rows += [(name, hf_gem.gain(function)) for name, function in BASELINES.items()]
    return "| activation | gain |\n|---|---|\n" + "".join(f"| {name} | {value:.6f} |\n" for name, value in rows)


def write_gains() -> None:
    path = DOCS / "functions.md"
    before, start, rest = path.read_text().partition("<!-- gains -->\n")
    _, end, after = rest.partition("<!-- end of gains -->")
    path.write_text(before + start + gain_table() + end + after)


def draw_family() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("GEM", ("gem", "gem_n2", "gem_n3")),
        ("E-GEM, towards ReLU", ("egem_eps1", "egem_eps0.1", "egem_eps0.01", "egem")),
        ("SE-GEM", ("segem_eps1", "segem_eps0.1", "segem_n2_eps0.1", "segem")),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), dpi=110, sharex=True, sharey="row", layout="constrained")
    for column, (title, names) in enumerate(panels):
        axes[0, column].set_title(title)
        for name in names:
            x = torch.linspace(-3, 3, 2401, dtype=torch.float64, requires_grad=True)
            y = hf_gem.get_activation(name)(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
            for row, values in enumerate((y, slope)):
                axes[row, column].plot(x.detach(), values.detach(), lw=1.4, label=name)
        for row in range(2):
            axes[row, column].grid(alpha=0.3)
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xlabel("x")
    axes[0, 0].set_ylabel("f(x)")
    axes[1, 0].set_ylabel("f'(x)")
    figure.savefig(DOCS / "family.png")


if __name__ == "__main__":
    draw_family()
    write_gains()
