"""Everything that runs inside the server, and the server itself."""
