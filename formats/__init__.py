"""What bytes mean: one module a format, the tensor on a grid that they meet in, and the lattice search.

Nothing here knows an exporter or a validator.
"""
