"""The messages and the generated client of the contract ``itemcache.v1``."""
