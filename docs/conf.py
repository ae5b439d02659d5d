"""The site, made from docs/, tutorials/, CHANGELOG.md and the docstrings:

    pip install -e '.[docs]' && sphinx-build -W -c docs . site    # then open site/index.html

Sources keep their places in the tree, so that links between them are the same on the site and in the repository.
"""

import pyro_flows

project = "pyro_flows"
author = "The pyro_flows developers"
version = release = pyro_flows.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
include_patterns = ["docs/**", "tutorials/*.ipynb", "CHANGELOG.md", "CONTRIBUTING.md"]
root_doc = "docs/index"

myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs; the tests execute them

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "params_style"), ("Warns", "returns_style")]

nitpicky = True  # references to names of ours must lead somewhere; those of other libraries and private classes do not
nitpick_ignore_regex = [
    ("py:.*", r"(torch|pyro|numpy|collections|abc|os|typing|pathlib|matplotlib)\..*"),
    ("py:.*", r"pyro_flows\.\w+\.\w+\..*"),  # where private classes are defined
    ("py:class", r"Tensor|Module|Picture|Draws|Drift|Missing|RowWeights|Shape|Spreads|optional"),
]

html_theme = "furo"
html_title = "pyro_flows"
html_extra_path = ["root"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
