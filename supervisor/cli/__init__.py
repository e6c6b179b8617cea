"""The command line `vnet`."""
