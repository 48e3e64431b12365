"""Concepts, patches and the middle block of the Fashion-MNIST network (notebooks cnn and patches)."""
