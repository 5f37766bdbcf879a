"""One secure sum (the noun `Session`): pure state machines, bytes in, bytes out; no transport, clock or disk.

Stages, as in docs/secure-aggregation.md: M0 offer, M1 keys, M2 key list, M3 shares, M4 inbound shares, M5 masked
vector, M6 survivors, M9 unmasking shares. This version takes U3 = U2 = cohort (a dropout voids the round) and holds no
vote, so M7 and M8 don't exist yet.

Promise: the coordinator, colluding with up to n_C sites, learns of an honest site's update only the sum over the
cohort, even if it deviates; a site aborts before it reveals anything that could break that.
"""
