"""The stages of the method in the order of the paper; each is pure and imports no other."""
