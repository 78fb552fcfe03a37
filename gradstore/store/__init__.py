"""The store: where the bytes are. Arguments and results are arrays, tables and plain values; no torch, no Dask.

backend    a URL becomes a storage of named objects: a directory, s3://, memory://
layout     the format: paths, shapes, chunks, metadata, version
codecs     arrays, tables and documents become bytes with checksums, and back
blocks     a unit of work is published object by object and committed last
features   the feature store and its feature sets
artifacts  kernels, queries, contributions, weights, scores
"""
