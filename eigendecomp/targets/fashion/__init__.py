"""A convolutional network on Fashion-MNIST."""
