"""How long a test waits for a process or a thread."""

# Limits catch hangs only: on a loaded machine work takes many times as long as on a quiet one.
HANGS_AFTER = 900  # seconds
