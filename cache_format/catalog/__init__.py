"""The catalogue: caches of this user and of the remotes, found by what they hold."""
