"""`kvstore bench`: what the store does on this machine, beside the limits that it measures here.

Importing kvstore imports none of this.
"""
