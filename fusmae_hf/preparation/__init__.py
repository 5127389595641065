"""From an archive to shards: planning, working, resuming; and looking at what was made."""
