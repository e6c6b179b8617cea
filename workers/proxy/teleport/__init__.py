"""The client side of a Teleport cluster."""
