"""Splits the uncertainty of a mean difference into parts from the seeds and from the evaluation sample.

The difference of a pair of runs is a mean over documents (or images). For seed s and a group g of samples, which holds
a share h_g of all tokens (or images), the difference is

    d_sg = mean + seed_s + group_g + rest_sg.

The mean difference over S seeds is the mean of all d_sg with weights h_g. Other seeds would have given a different
mean, and so would other documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .estimates import Estimate


@dataclass(frozen=True)
class Components:
    """The components of the variance of a mean difference.

    Attributes:
        mean: The mean difference.
        seeds: The part that only more seeds reduce: Var(seed_s) / S.
        groups: The part that only a larger evaluation sample reduces: Var(group_g) sum h_g^2.
        both: The part that either reduces: Var(rest_sg) sum h_g^2 / S.
        num_seeds: Number of seeds, S.
        num_groups: Number of groups of samples.
        group_degrees: Degrees of freedom of the mean squares of groups. This is num_groups - 1 if all have equal size.
    """

    mean: float
    seeds: float
    groups: float
    both: float
    num_seeds: int
    num_groups: int
    group_degrees: float

    @property
    def variance(self) -> float:
        """The variance of the mean difference."""
        return self.seeds + self.groups + self.both

    @property
    def estimate(self) -> Estimate:
        """The mean with its standard error and Satterthwaite's degrees of freedom.

        The variance is V_s + V_g - V_e, with V_s = seeds + both, V_g = groups + both and V_e = both. Each is a mean
        square with its own degrees of freedom. Satterthwaite's formula was made for sums, and can give too few degrees
        here. The variance is never below V_s or V_g, so the degrees never need to be below the smaller of theirs.
        """
        one, other = self.num_seeds - 1, self.group_degrees
        spread = (self.seeds + self.both) ** 2 / one + (self.groups + self.both) ** 2 / other
        spread += self.both**2 / (one * other)
        degrees = self.variance**2 / spread if spread else 0.0
        return Estimate(self.mean, self.variance**0.5, max(degrees, min(one, other)))

    @property
    def limited_by(self) -> str:
        """What would help most if there were more of it: "seeds" or "groups"."""
        return "seeds" if self.seeds >= self.groups else "groups"

    def planned(self, num_seeds: int, num_groups: int) -> Components:
        """Predicts the components for other numbers of seeds and groups, assuming they behave like these."""
        seeds, groups = self.num_seeds / num_seeds, self.num_groups / num_groups
        return replace(
            self,
            seeds=self.seeds * seeds,
            groups=self.groups * groups,
            both=self.both * seeds * groups,
            num_seeds=num_seeds,
            num_groups=num_groups,
            group_degrees=self.group_degrees / groups,
        )


def components(differences: np.ndarray, counts: np.ndarray) -> Components:
    """Estimates the components by an analysis of variance of two crossed factors.

    Let d_s. be the means of seeds, d_.g the means of groups and d the mean of all, each with weights
    h_g = counts_g / sum counts. Then

        V_s = sum_s (d_s. - d)^2 / (S (S - 1))
        V_g = sum_g a_g (d_.g - d)^2
        V_e = sum_sg a_g (d_sg - d_s. - d_.g + d)^2 / (S (S - 1)),    a_g = h_g^2 / (1 - 2 h_g + sum h^2),

    are unbiased for seeds + both, groups + both, and both, if all groups have the same variance. With groups of equal
    size they are the usual mean squares. A negative part is set to zero. Groups of very different size leave few
    degrees of freedom (Bell and McCaffrey 2002): (sum h^2)^2 / sum_gk a_g a_k M_gk^2, with
    M_gk = [g = k] - h_g - h_k + sum h^2.

    In simulated studies without a true difference, with 8 to 20 seeds and 40 or 350 documents, Student's t with this
    variance found a difference in 2 to 5 % of studies, and in 1 to 3 % where `both` is most of the variance. The
    two-way bootstrap (Owen 2007, arXiv 0712.1111) counts `both` three times. It found a difference in 8 % of studies
    where seeds are all of the variance, and in less than 1 % where `both` is half of it. docs/comparing.md has the
    table.

    Args:
        differences: Sums of arm minus baseline for each seed and group, (seeds, groups), with at least two seeds.
        counts: Number of summands of each group, (groups,), such as tokens. At least two groups must not be empty.

    Returns:
        The components, with the mean difference sum(differences) / (seeds * sum(counts)).
    """
    counted = counts > 0
    sums, sizes = differences[:, counted], counts[counted]
    num_seeds, num_groups = sums.shape
    assert num_seeds > 1, num_seeds
    assert num_groups > 1, num_groups
    share, values = sizes / sizes.sum(), sums / sizes
    squares = float(share @ share)
    mixing = np.eye(num_groups) - share[:, None] - share + squares
    weights = share**2 / np.diag(mixing)
    of_seeds, of_groups = values @ share, values.mean(0)
    mean = float(of_seeds.mean())
    rest = values - of_seeds[:, None] - of_groups + mean
    both = float((rest**2 @ weights).sum() / (num_seeds * (num_seeds - 1)))
    return Components(
        mean=mean,
        seeds=max(0.0, float(of_seeds.var(ddof=1) / num_seeds) - both),
        groups=max(0.0, float(weights @ (of_groups - mean) ** 2) - both),
        both=both,
        num_seeds=num_seeds,
        num_groups=num_groups,
        group_degrees=float(squares**2 / (weights @ mixing**2 @ weights)),
    )
