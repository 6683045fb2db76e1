"""pushing.py SCRIPT [flags]: a script with the Hub that $HF_ENDPOINT names, in a process that has read another."""

import os
import runpy
import sys

from huggingface_hub import constants

constants.ENDPOINT = os.environ["HF_ENDPOINT"]
constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
constants.HF_HUB_OFFLINE = False
constants.HF_HUB_DISABLE_XET = True
constants.HF_HOME = os.environ["HF_HOME"]
constants.HF_HUB_CACHE = f"{constants.HF_HOME}/hub"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
