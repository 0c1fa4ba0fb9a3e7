"""Records from files, and token ids from records: readers, public layouts, chat spans, checks, splits, filters."""
