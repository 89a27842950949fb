"""Integer grids: finding the one that weights lie on, putting weights on one, and the vector codecs."""
