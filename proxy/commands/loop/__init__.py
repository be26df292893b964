"""Command `autotts loop`: the whole loop of discovery on the embedded model, from recordings to rollback."""
