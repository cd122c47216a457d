"""Teacher to cache: text becomes sequences, an engine scores them once, shards store the result.

The path of the data: ``sources`` -> ``tokenize`` -> ``plan`` -> ``teachers`` -> ``keep`` ->
``logitcask.cache_format.CacheWriter``.
"""
