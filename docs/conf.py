"""Sphinx settings: Markdown pages beside an API reference made from the docstrings."""

import memzoo

project = "memzoo"
author = "the memzoo contributors"
version = release = memzoo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
html_theme = "furo"
exclude_patterns = ["_build"]
