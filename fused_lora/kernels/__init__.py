"""Everything that imports Triton. Reached through ``ops.py`` alone, and only when an implementation asks for it."""
