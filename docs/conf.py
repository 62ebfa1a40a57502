"""The site: ``python -m sphinx -W --keep-going -q -b html docs DIR``, with the package and its extra `docs` installed."""

import switchmoe

project = "switchmoe"
author = "the switchmoe authors"
version = release = switchmoe.__version__
html_title = f"switchmoe {release}"
html_theme = "furo"

extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Notebooks are shown as they were executed (CI executes them); a build runs none.
nb_execution_mode = "off"
