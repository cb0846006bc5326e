"""Trainers that compute their loss with this package; each module imports its own trainer."""
