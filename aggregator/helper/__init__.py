"""``covey-helper``: run by a second organisation, it adds up the masks of listed updates, once for each round.

A helper sees no update, only sealed seeds of 16 bytes and signed contributions (docs/protocol.md, section 16).
"""
