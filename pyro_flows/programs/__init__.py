"""Pyro programs: the masks of their sites, and whether a guide's trace is one of the model's."""
