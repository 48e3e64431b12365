"""Directions handed on: as edited models, adapters, folders of the hub, words and files for labelling."""
