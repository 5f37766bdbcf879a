"""One secure sum (the noun `Session`): pure state machines, bytes in, bytes out; no transport, clock or disk.

Promise, protocol and argument: docs/secure-aggregation.md. `site` and `coordinator` are the two sides; `transcript` holds
M0 and what every signature is bound to, `messages` M1 to M9, `peers` the checks that both sides make; `encoding`, `prg`,
`shamir` and `hybrid` are the primitives; `plain` is the same interface without masks.
"""
