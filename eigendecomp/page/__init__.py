"""One HTML file to look at directions."""
