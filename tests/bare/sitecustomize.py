"""On PYTHONPATH: a Python in which what training does not need is not installed."""

import sys
from importlib.machinery import PathFinder

HIDDEN = {
    *("datasets", "evaluate", "trackio", "tensorboard", "wandb", "dill", "multiprocess", "sklearn", "scipy"),
    *("matplotlib", "markdown_it", "peft", "onnxruntime", "onnxscript", "pyarrow", "pandas"),
}


class Finder(PathFinder):
    """Finds neither the modules nor the metadata of these packages, as if nobody had installed them."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (found for found in super().find_distributions(*args, **kwargs) if found.name not in HIDDEN)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
