"""One HTML file to look at directions."""

from eigendecomp.support.extras import need

need("page", "jinja2", "PIL")
