"""Everything that happens before a server starts: labelled text in, model repository out."""
