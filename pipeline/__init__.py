"""Teacher to cache: text becomes sequences, an engine scores them once, and what is kept goes into
shards.

The way of the data: ``sources`` -> ``tokenize`` -> ``plan`` -> ``teachers`` -> ``keep`` ->
``logitcask.cache_format.CacheWriter``.
"""
