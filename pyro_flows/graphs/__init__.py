"""Functions of tensors as flat lists of operations, which compiled code replaces behind the user's back."""

from .traced import Traced as Traced
