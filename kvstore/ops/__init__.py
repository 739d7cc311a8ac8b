"""What an operator types: serve, restart, status, top, inspect, verify, doctor; a module each."""
