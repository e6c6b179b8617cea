"""The worker processes. Each lives in a folder of its own and imports only `ipc`."""
