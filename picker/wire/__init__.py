"""Hot messages as wire-compatible subsets of Envoy's protos, compiled onto upb: `make wire` writes the *_pb2 files.

Each field has the number and the type of the full message's field, so both encode and decode the same bytes
(tests/test_wire.py holds that against envoy-data-plane). Left out are fields this server neither reads nor writes.
"""
