"""Speed, by an explicit call from outside the model; it never travels with a saved folder."""
