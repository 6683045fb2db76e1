"""The recipes, with the plans of studies and the configs of launchers: `python -m hf_gem.recipes.gpt2_pretrain`.

In a clone they are in the folder `recipes/` beside the package. A wheel has them in this folder.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE if (_HERE / "plans").is_dir() else _HERE.parent.parent / "recipes"
__path__ = [str(FOLDER)]
_NO_RECIPES = ("__init__", "compare")


def recipe_files(folder: Path = FOLDER) -> dict[str, Path]:
    """Returns name -> file of the recipes in a folder."""
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem not in _NO_RECIPES}


def plan_files(folder: Path = FOLDER) -> dict[str, Path]:
    """Returns name -> file of the plans that come with the recipes in a folder."""
    return {path.stem: path for path in sorted((folder / "plans").glob("*.yaml"))}
