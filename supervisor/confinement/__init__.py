"""What is taken from a worker before it begins: user, capabilities, files, system calls (Linux).

Each part that is a decision (`landlock_rules`, `system_calls`, `reach`) is pure and apart from the
system calls that carry it out (`landlock`, `seccomp`, `apply`).
"""
