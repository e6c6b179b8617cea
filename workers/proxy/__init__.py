"""The proxy worker: credentials, clusters, and the relay of admitted connections."""
