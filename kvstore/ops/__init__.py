"""What an operator types: serve, restart, status, top, inspect, verify, doctor.

One module a command.
"""
