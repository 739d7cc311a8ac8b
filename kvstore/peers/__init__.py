"""Peers: blocks that no tier has here come from other daemons, and other daemons read ours.

Peers       of one process: its transport endpoint with the arena registered, and a Fetcher
Fetcher     one fetch for all who wait for the same blocks; rounds of flights
Flight      one run of blocks, striped over holders, each piece retried elsewhere if it fails
Holders     the daemons that we talk to: sessions, links, breakers
Quarantine  slots that a broken link may still write to
"""

from kvstore.peers.fetcher import Fetcher
from kvstore.peers.process import LatePeers, Peers, endpoint_secret

__all__ = ["Fetcher", "LatePeers", "Peers", "endpoint_secret"]
