"""SSH: a server towards the program, a client towards the node, and what joins them."""
