"""Fits of residual networks of one to three layers (notebook layers)."""
