"""Conversations: turns and their branches, files, settings, commands, and the room in a context.

Nothing here knows of terminals; `phicore.cli.chat` does.
"""
