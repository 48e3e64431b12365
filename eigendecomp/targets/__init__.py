"""The trained networks that the notebooks decompose: model, data and training of each."""
