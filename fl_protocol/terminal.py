"""Text for a terminal: what came from outside cannot speak to it. Pure.

A broker needs no key to have its error texts shown by ``covey-device status``, and whoever hands a publisher a bundle
has its description shown. A terminal takes control characters (ECMA-48) for commands: clear the screen, change the
title, write over the line before; and characters that turn the direction of writing make a line read as another one.
"""

from __future__ import annotations


def visible(text: str) -> str:
    r"""The text with everything that is no printable character written out, such as ``\x1b``; one line stays one."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
