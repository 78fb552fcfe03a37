"""serve: pages of a store for a browser, which only read it.

server    who may ask for what: addresses, tokens, headers
pages     what is asked for, as HTML
examples  what queries and examples are: their texts, labels and pictures
"""

from gradstore.stages.serve.server import TOKEN, Serving, serve

__all__ = ["TOKEN", "Serving", "serve"]
