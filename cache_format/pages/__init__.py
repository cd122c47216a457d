"""Parts of HTML pages that both stages write: one design, charts, packed data.

A page is one file that opens without a network and without a server.
"""
