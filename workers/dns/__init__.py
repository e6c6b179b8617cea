"""The DNS worker: answers for names of VNet, forwards everything else."""
