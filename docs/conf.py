"""Settings of the documentation site: `make docs` builds it with Sphinx."""

project = "rlchat"
author = "the rlchat authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rlchat"
html_copy_source = False
myst_heading_anchors = 3
