"""What an operator types: status, top, inspect, verify, doctor. One module a command."""
