"""A small reference inference worker in plain torch, whose KV goes through kvstore.

Read in this order: `checkpoint` (weights), `model` (the decoder and its paged KV), `pages` and
`scheduler` (what runs in a step), `transfer` (the seam to the store), `worker` (the loop). Nothing
is imported here, so that torch stays optional.
"""
