"""Several processes, on one host or on several, that compute one model together.

One process leads: it has the queue, the clients and the text. Before each step it tells the others,
which follow, what has changed (`protocol.py`). Their engines then decide alike, and all devices
make the same calls. The numbers that the devices exchange are the tensor library's matter.
"""
