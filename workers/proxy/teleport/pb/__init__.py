"""The part of Teleport's gRPC interface that VNet and its embedded cluster use.

The `.proto` files name only the fields that are needed; numbers and types are Teleport's, so
unknown fields of newer servers pass unread. `scripts/generate-protobuf` makes the modules.
"""
