"""An embedded Teleport cluster: the server side of the wire protocol, for `vnet demo` and tests.

It shares nothing with the client in `workers/proxy/teleport` but the generated protobuf
messages, so that both cannot be wrong in the same way.
"""
