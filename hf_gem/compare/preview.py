"""What a study will do and cost, before it runs."""

from __future__ import annotations

from pathlib import Path

from .plan import Plan
from .report import detectable
from .study import PLAN, Study, freeze
from .words import render


def preview(plan: Plan) -> str:
    """What a plan runs, and which differences that can find."""
    tuning, final = plan.num_runs()
    return render("preview.txt.j2", plan=plan, tuning=tuning, final=final, detectable=detectable(plan))


def dry_run(plan: Plan, folder: Path, jobs: int) -> str:
    """The runs that would be started now, and how long what is planned takes.

    Args:
        plan: Of the study.
        folder: Of the study; it need not be there.
        jobs: Runs at once.

    Raises:
        PlanError: the folder is that of another plan.
    """
    missing, left, seconds = list(plan.tuning_runs()), sum(plan.num_runs()), list[float]()
    if (folder / PLAN).exists():
        freeze(plan, folder)  # which refuses another plan
        study = Study(folder)
        missing, left, seconds = study.missing(), study.left(), study.seconds()
    each = sum(seconds) / max(1, len(seconds))
    return render(
        "dry_run.txt.j2",
        plan=plan,
        missing=missing,
        left=left,
        done=len(seconds),
        seconds=each,
        hours=left * each / 3600 / jobs,
    )
