"""What the processes of VNet say to each other, and how it travels."""
