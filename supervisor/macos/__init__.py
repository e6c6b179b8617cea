"""What VNet asks of macOS. Never run on a real machine: see docs/macos.md."""
