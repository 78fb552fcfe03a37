"""Images: from the files and arrays of a source to pixels and classes, and the examples of the splits."""
