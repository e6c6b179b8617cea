"""The embedded cluster and the private network of `vnet demo`; used by the tests too."""
