"""Parts of mixers: norms, rotary positions, caches, feature maps, shared attention projections."""
