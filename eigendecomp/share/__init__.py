"""Directions handed on: as files, adapters, folders of the hub, words and lines to label."""
