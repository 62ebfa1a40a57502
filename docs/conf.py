"""The site: ``python -m sphinx -W --keep-going -q docs DIR``, with the package and its extra `docs` installed."""

import sys
from pathlib import Path

import switchmoe

sys.path.insert(0, str(Path(__file__).parent))

project = "switchmoe"
author = "the switchmoe authors"
version = release = switchmoe.__version__
html_title = f"switchmoe {release}"
html_theme = "furo"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Notebooks are shown as they were executed (CI executes them); a build runs none.
nb_execution_mode = "off"

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
