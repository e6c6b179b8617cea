"""What VNet reads from and writes to the operating system's settings."""
