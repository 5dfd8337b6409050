"""The model: all that travels with a saved folder. It imports nothing else of this package."""
