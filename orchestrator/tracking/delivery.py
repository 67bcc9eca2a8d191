"""a store that fails holds nobody up"""

SLOW_FAILURE_S = 1.0
"""A failed write that took longer holds up the search: the store is then left alone for PAUSE_S."""
PAUSE_S = 60.0
PROBE_S = 2.0
"""How long a server that has failed may take to say that it is there again, before anything is sent to it."""
