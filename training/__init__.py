"""How the embedded model was made, from the artwork to the weights; README.md has the commands.

Nothing of the package imports this; it needs the extra ``train``.
"""
