"""Measurements that need hardware or time: what runs, what fits, how long it takes. Not part of the package."""
