"""The store: where the bytes are. Arguments and results are arrays, tables and plain values; no Dask, and torch in dtypes alone.

backend    a URL becomes a storage of named objects: a directory, s3://, memory://
layout     the format: paths, shapes, chunks, metadata, version
dtypes     numbers are rounded to a stored type, and read back
compression chunks are compressed, where asked for
codecs     arrays, tables and documents become bytes with checksums, and back
blocks     a unit of work is published object by object and committed last
read_ahead what comes next is read while what came last is worked on
features   the feature store and its feature sets, and the reader that streams their blocks
artifacts  kernels, queries, contributions, weights, scores
health     what is wrong with a store, what is missing of it, what nothing names; mending and tidying
"""
