"""Recipe to plan: shards, memory bounds, tensor layout."""
