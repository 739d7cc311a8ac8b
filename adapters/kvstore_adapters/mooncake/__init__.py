"""A client with the methods of Mooncake Store that engines call, on kvstore."""
