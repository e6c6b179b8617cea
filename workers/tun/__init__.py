"""The TUN worker: moves packets and holds back each SYN until a proxy admits it."""
